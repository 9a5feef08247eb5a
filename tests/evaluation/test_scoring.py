"""Likelihoods are those of one plain forward, whatever the batch; scoring leaves answers alone."""

from __future__ import annotations

import pytest
import torch

import toy
import trained
from compllm_rag.compression.compressor import Compressor
from compllm_rag.config import GenerationConfig
from compllm_rag.evaluation.questions import Question
from compllm_rag.evaluation.results import EvalConfig
from compllm_rag.evaluation.runner import evaluate
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import QAPrompt, TextSpan
from tests.evaluation.evaluation_samples import questions


@pytest.fixture(scope="module", params=toy.ARCHITECTURES)
def compressor(request: pytest.FixtureRequest) -> Compressor:
    llm = toy.llm(request.param)
    return Compressor(llm, information=trained.information(llm))


def prompt(llm: TargetLLM, question: Question):
    maker = QAPrompt(llm.tokenizer)
    bodies = [(p.title, [TextSpan(tuple(maker.template.plain(p.text)), i)]) for i, p in enumerate(question.passages)]
    return maker.plan(question.question, bodies)


def plain_log_likelihood(llm: TargetLLM, question: Question, continuation: str) -> tuple[float, int]:
    """From one forward over ids, without cache, padding or embeddings."""
    before = [i for span in prompt(llm, question).spans if isinstance(span, TextSpan) for i in span.ids]
    target = [*QAPrompt(llm.tokenizer).template.plain(continuation), llm.tokenizer.eos_token_id]
    with torch.inference_mode():
        logits = llm.model(input_ids=torch.tensor([before + target])).logits[0, len(before) - 1 : -1]
    each = torch.log_softmax(logits.double(), -1)[torch.arange(len(target)), torch.tensor(target)]
    return float(each.sum()), len(target)


def test_nll_and_options_are_those_of_a_plain_forward(compressor: Compressor) -> None:
    asked = questions()
    result = evaluate(compressor, asked, mode="text", config=EvalConfig(batch_size=4, generate=False))
    sums, tokens = 0.0, 0
    records = {record.id: record for record in result.records}
    for question in asked:
        total, count = plain_log_likelihood(compressor.llm, question, question.answers[0])
        assert records[question.id].n_tokens == count
        assert records[question.id].nll == pytest.approx(-total / count, abs=1e-4)
        sums, tokens = sums + total, tokens + count
        if question.options:
            scores = [plain_log_likelihood(compressor.llm, question, option) for option in question.options]
            means = [total / count for total, count in scores]
            assert records[question.id].option == means.index(max(means))
        assert records[question.id].answer is None
    # Weighted by tokens, not the mean of the questions' means.
    assert result.nll == pytest.approx(-sums / tokens, abs=1e-4)
    assert result.accuracy == 50 * sum(records[name].correct for name in ("q7", "q8"))
    assert (result.em, result.f1, result.agreement) == (None, None, None)


@pytest.mark.parametrize("mode", ["text", "concepts"])
def test_batches_change_nothing(compressor: Compressor, mode: str) -> None:
    results = [
        evaluate(compressor, questions(), mode=mode, config=EvalConfig(batch_size=size, max_new_tokens=6))
        for size in (1, 7)
    ]
    one, seven = ([(r.id, r.answer, r.option, r.positions) for r in result.records] for result in results)
    assert one == seven
    assert [r.nll for r in results[0].records] == pytest.approx([r.nll for r in results[1].records], abs=1e-4)


def test_scoring_leaves_the_answers_alone(compressor: Compressor) -> None:
    limits = GenerationConfig(max_new_tokens=6)
    alone = LocalGenerator(compressor.llm, limits)
    result = evaluate(compressor, questions(), mode="text", config=EvalConfig(max_new_tokens=6))
    expected = {q.id: alone.generate([prompt(compressor.llm, q)])[0].text for q in questions()}
    assert {r.id: r.answer for r in result.records} == expected

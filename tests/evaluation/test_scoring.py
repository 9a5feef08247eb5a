"""Likelihoods are those of one plain forward, whatever the batch; scoring leaves answers alone."""

from __future__ import annotations

import pytest
import torch

import toy
import trained
from compllm_rag.compression.compressor import Compressor
from compllm_rag.config import GenerationConfig
from compllm_rag.errors import DeviceMemoryError
from compllm_rag.evaluation.questions import Question
from compllm_rag.evaluation.results import EvalConfig
from compllm_rag.evaluation.runner import evaluate
from compllm_rag.evaluation.scoring import ScoringGenerator
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import PromptPlan, QAPrompt, TextSpan
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


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("deep", [True, False])
def test_a_batch_that_is_halved_for_memory_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, generate: bool, deep: bool
) -> None:
    llm = toy.llm()
    made = trained.trained_deep(llm) if deep else Compressor(llm, information=trained.information(llm))
    config = EvalConfig(batch_size=7, max_new_tokens=6, generate=generate)
    expected = evaluate(made, questions(), mode="concepts", config=config)
    lay_out, refused = LocalGenerator.lay_out, []

    def short(self: LocalGenerator, plans: list[PromptPlan]) -> object:
        if len(plans) > 2:
            refused.append(len(plans))
            raise DeviceMemoryError("no memory is left")
        return lay_out(self, plans)

    monkeypatch.setattr(LocalGenerator, "lay_out", short)
    result = evaluate(made, questions(), mode="concepts", config=config)
    assert refused
    assert [(r.id, r.answer, r.option) for r in result.records] == [
        (r.id, r.answer, r.option) for r in expected.records
    ]
    assert [r.nll for r in result.records] == pytest.approx([r.nll for r in expected.records], abs=1e-4)


def test_memory_that_ends_while_decoding_leaves_no_half_read_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = toy.llm()
    made, plans = ScoringGenerator(llm, GenerationConfig(max_new_tokens=4)), [prompt(llm, q) for q in questions()[:4]]
    golds = [tuple(QAPrompt(llm.tokenizer).template.plain(q.answers[0])) for q in questions()[:4]]
    answers, whole = made.run(plans, answer=True)
    tokens = LocalGenerator._tokens

    def short(self: LocalGenerator, forward: object, plans: list[PromptPlan], config: GenerationConfig):
        for step, chosen in enumerate(tokens(self, forward, plans, config)):
            if step == 1 and len(plans) > 1:
                raise DeviceMemoryError("no memory is left")
            yield chosen

    monkeypatch.setattr(LocalGenerator, "_tokens", short)
    halved, parts = made.run(plans, answer=True)
    assert (halved, len(parts.parts)) == (answers, 4)
    assert parts.log_likelihoods(golds) == pytest.approx(whole.log_likelihoods(golds), abs=1e-4)

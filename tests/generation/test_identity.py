"""With token embeddings in the place of concepts a prompt must read exactly like its text."""

from __future__ import annotations

import pytest
import torch

import toy
from compllm_rag.config import GenerationConfig
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import SLOT, ConceptSpan, Message, PromptPlan, PromptTemplate, TextSpan, lay_out

PASSAGES = [toy.TEXT[:200], toy.TEXT[200:700], toy.TEXT[:40]]


@pytest.fixture(scope="module", params=toy.ARCHITECTURES)
def llm(request: pytest.FixtureRequest) -> TargetLLM:
    return toy.llm(request.param)


def plans(llm: TargetLLM, *, as_concepts: bool, passages: list[str]) -> PromptPlan:
    template = PromptTemplate(llm.tokenizer)
    spans = []
    for i, passage in enumerate(passages):
        ids = template.plain(passage)
        spans.append(TextSpan(tuple(template.plain(f"[{i + 1}] "))))
        spans.append(ConceptSpan(llm.embed(ids), i) if as_concepts else TextSpan(tuple(ids), i))
    messages = [Message("system", ("Answer.",)), Message("user", (SLOT, "Question: who built it?"))]
    return PromptPlan(tuple(template.spans(messages, spans)))


def reference_ids(plan: PromptPlan) -> list[int]:
    return [i for span in plan.spans if isinstance(span, TextSpan) for i in span.ids]


def test_concepts_that_are_token_embeddings_give_the_logits_of_the_text(llm: TargetLLM) -> None:
    text, concepts = (plans(llm, as_concepts=flag, passages=PASSAGES) for flag in (False, True))
    with torch.inference_mode():
        expected = llm.model(input_ids=torch.tensor([reference_ids(text)])).logits[:, -1]
    got, _ = LocalGenerator(llm).prefill(lay_out([concepts], llm))
    assert text.positions == concepts.positions
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_left_padded_batch_of_unequal_prompts_gives_each_prompt_its_own_logits(llm: TargetLLM) -> None:
    different = [PASSAGES[:1], PASSAGES, PASSAGES[2:]]
    generator = LocalGenerator(llm)
    alone = [generator.prefill(lay_out([plans(llm, as_concepts=False, passages=p)], llm))[0] for p in different]
    batch = lay_out([plans(llm, as_concepts=True, passages=p) for p in different], llm)
    assert batch.attention_mask is not None
    together, _ = generator.prefill(batch)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_decoding_in_a_batch_gives_the_tokens_of_decoding_alone_and_of_transformers(llm: TargetLLM) -> None:
    config = GenerationConfig(max_new_tokens=24)
    different = [plans(llm, as_concepts=True, passages=p) for p in (PASSAGES[:1], PASSAGES)]
    generator = LocalGenerator(llm)
    together = generator.generate(different, config)
    for plan, batched, passages in zip(different, together, (PASSAGES[:1], PASSAGES), strict=True):
        stream = generator.stream(plan, config)
        assert "".join(stream) == batched.text
        assert stream.result.token_ids == batched.token_ids
        ids = torch.tensor([reference_ids(plans(llm, as_concepts=False, passages=passages))])
        expected = llm.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
        )[0, ids.shape[1] :].tolist()
        assert batched.token_ids == [token for token in expected if token not in llm.stop_ids()]


def test_passage_spans_point_at_the_passages_own_embeddings(llm: TargetLLM) -> None:
    batch = lay_out([plans(llm, as_concepts=True, passages=p) for p in (PASSAGES[:1], PASSAGES)], llm)
    for row, passages in enumerate((PASSAGES[:1], PASSAGES)):
        assert [p for p, _, _ in batch.spans[row]] == list(range(len(passages)))
        for passage, start, end in batch.spans[row]:
            expected = llm.embed(PromptTemplate(llm.tokenizer).plain(passages[passage]))
            torch.testing.assert_close(batch.inputs_embeds[row, start:end], expected)

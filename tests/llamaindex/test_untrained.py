"""Who gets concepts that nothing was trained for is told: once, in the numbers of the storage, and with each answer."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from llama_index.core import Document

import compllm_rag
import toy
import trained
from compllm_rag import Compressor, ConceptIndex, TargetLLM
from compllm_rag.compression.loading import untrained_deep
from compllm_rag.errors import UntrainedCompressorWarning
from compllm_rag.storage.stats import storage_stats
from toy_embedder import HashEmbedder


@pytest.mark.parametrize("kind", ["input", "deep", "trained", "trained deep"])
def test_it_is_said(llm: TargetLLM, tmp_path: Path, kind: str) -> None:
    made = {
        "input": Compressor,
        "deep": untrained_deep,
        "trained": trained.trained,
        "trained deep": trained.trained_deep,
    }[kind](llm)
    expected = "trained" if "trained" in kind else "untrained"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        index = ConceptIndex.create(tmp_path / "s", compressor=made, embedder=HashEmbedder())
        index.ingest([Document(text=toy.TEXT)])
        account = index.as_query_engine().query("Who built it?").metadata["compllm"]
    said = [warning for warning in told if warning.category is UntrainedCompressorWarning]
    assert len(said) == (expected == "untrained")
    assert all(llm.source in str(warning.message) and "compllm-rag train" in str(warning.message) for warning in said)
    assert account["compressor"] == index.stats()["compressor"] == expected
    index.close()
    assert storage_stats(tmp_path / "s")["compressor"] == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntrainedCompressorWarning)
        ConceptIndex.load(tmp_path / "s", compressor=made, embedder=HashEmbedder(), read_only=True).close()
    (tmp_path / "s" / "compressor" / "config.json").unlink()
    assert storage_stats(tmp_path / "s")["compressor"] is None


def test_what_loads_the_shipped_parts_has_a_public_name() -> None:
    assert compllm_rag.load_compressor_for.__name__ == "load_compressor_for"
    assert compllm_rag.ConceptLibrary.__name__ == "ConceptLibrary"
    assert {"load_compressor_for", "ConceptLibrary"} <= set(compllm_rag.__all__)

"""Storages of deep concepts in fewer bits: places stay, answers come, and nothing else is asked of the user."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import toy
from compllm_rag import ConceptIndex
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.storage.manifest import read_manifest
from compllm_rag.storage.stats import storage_stats
from tests.faults.fault_samples import check_whole, documents
from toy_embedder import HashEmbedder
from trained import trained_deep


@pytest.fixture(scope="module")
def deep() -> DeepCompressor:
    return trained_deep(toy.llm(layers=4))


@pytest.mark.parametrize("encoding", ["fp16", "int8", "int4"])
def test_a_storage_of_deep_concepts_in_every_encoding(tmp_path: Path, deep: DeepCompressor, encoding: str) -> None:
    path = tmp_path / "s"
    options = {"compressor": deep, "embedder": HashEmbedder()}
    with ConceptIndex.create(path, chunk_size=60, rate=2, encoding=encoding, **options) as index:
        index.ingest(documents())
        check_whole(index)
        [text, *_] = [node.text for node in index.faiss.iter_nodes()]
        passage = index.library.passage(text)
        [exact] = deep.compress(passage.segments, passage.n_concepts)
        fetched = index.library.fetch(text, missing="error")
        assert fetched.places is not None
        assert fetched.places.tolist() == exact[:, -1].long().tolist()
        off = (fetched.concepts.float() - exact[:, :-1]).square().mean().sqrt() / exact[:, :-1].square().mean().sqrt()
        assert float(off) < {"fp16": 1e-3, "int8": 2e-2, "int4": 0.2}[encoding]
        assert str(index.as_query_engine().query("Who built the lighthouse?"))
        assert torch.isfinite(fetched.concepts).all()
    assert storage_stats(path)["encoding"] == read_manifest(path).ingest.encoding == encoding
    with ConceptIndex.load(path, read_only=True, **options) as index:
        assert index.verify(deep=True).sound

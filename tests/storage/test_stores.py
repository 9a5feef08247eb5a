"""Opening the concept store of a storage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compllm_rag import Compressor, DiskStore, MemoryStore
from compllm_rag.config import IngestConfig
from compllm_rag.errors import ConfigurationError, StorageMismatchError
from compllm_rag.storage.manifest import Manifest
from compllm_rag.storage.stores import open_store


def manifest(compressor: Compressor, encoding: str = "int8") -> Manifest:
    return Manifest.of(compressor.spec, compressor.llm, "e", "e", 8, IngestConfig(encoding=encoding))


def test_a_manifest_says_how_concepts_are_kept(tmp_path: Path, compressor: Compressor) -> None:
    memory = open_store(manifest(compressor), None)
    assert isinstance(memory, MemoryStore)
    with open_store(manifest(compressor), tmp_path / "concepts") as disk:
        assert isinstance(disk, DiskStore)
        for store in (memory, disk):
            assert (store.hidden_size, store.encoding.name) == (compressor.hidden_size, "int8")
            store.put([("0" * 64, torch.ones(2, store.hidden_size))])
    with open_store(manifest(compressor), str(tmp_path / "concepts"), read_only=True) as again:
        assert again.contains(["0" * 64]) == [True]
    with pytest.raises(StorageMismatchError):
        open_store(manifest(compressor, "fp16"), tmp_path / "concepts")


def test_a_url_of_no_known_store_is_refused(compressor: Compressor) -> None:
    with pytest.raises(ConfigurationError, match="s3://"):
        open_store(manifest(compressor), "s3://bucket/concepts")

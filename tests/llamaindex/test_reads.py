"""Questions write nothing and wait for nobody; what holds files stays in its process."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document
from llama_index.core.postprocessor import MetadataReplacementPostProcessor

from compllm_rag import Compressor, ConceptIndex
from compllm_rag.catalog.database import claimed
from compllm_rag.errors import CompLLMError
from compllm_rag.store.lock import WriterLock
from toy_embedder import HashEmbedder

DOCUMENTS = [
    Document(id_=f"a{i}", text=f"Ferry number {i} leaves at nine. It is blue.", metadata={"window": f"Gull {i} left."})
    for i in range(4)
]


def made(path: Path | None, compressor: Compressor) -> ConceptIndex:
    index = ConceptIndex.create(path, compressor=compressor, embedder=HashEmbedder(), chunk_size=60)
    index.ingest(DOCUMENTS)
    return index


def engines(index: ConceptIndex) -> list[Any]:
    window = MetadataReplacementPostProcessor(target_metadata_key="window")
    return [index.as_query_engine(), index.as_query_engine(node_postprocessors=[window])]


def files(folder: Path) -> dict[str, bytes]:
    held = ("cache.db-shm", "catalog.db-shm")  # SQLite's shared memory, no part of what is kept
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in held
    }


def test_questions_write_nothing(tmp_path: Path, compressor: Compressor) -> None:
    with made(tmp_path / "s", compressor) as index:
        before, stats = files(tmp_path / "s"), index.stats()
        for engine in engines(index):
            for n in range(2):
                answer = engine.query(f"When does ferry number {n} leave?")
                assert str(answer) == str(asyncio.run(engine.aquery(f"When does ferry number {n} leave?")))
        assert index.stats() == stats
        assert files(tmp_path / "s") == before


def test_questions_wait_for_no_writer(tmp_path: Path, compressor: Compressor) -> None:
    with made(tmp_path / "s", compressor) as index, claimed(tmp_path / "s"):
        lock = WriterLock(tmp_path / "s" / "concepts" / "writer.lock")
        try:
            for engine in engines(index):
                assert engine.query("When does ferry number 1 leave?").source_nodes
        finally:
            lock.release()


def test_what_a_question_needed_is_at_hand_for_the_next(compressor: Compressor) -> None:
    index = made(None, compressor)
    engine = engines(index)[1]
    first = engine.query("When does ferry number 1 leave?").metadata["compllm"]
    again = engine.query("When does ferry number 1 leave?").metadata["compllm"]
    assert first["store"]["misses"] > 0
    assert (again["store"]["misses"], again["compress_s"]) == (0, 0.0)
    assert again["answer"] == first["answer"]


TRANSPORTS: dict[str, Callable[[Any], object]] = {"pickle": pickle.dumps, "copy": copy.copy, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("way", TRANSPORTS)
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_nothing_that_holds_files_is_pickled_or_copied(
    tmp_path: Path, compressor: Compressor, where: str, way: str
) -> None:
    index = made(tmp_path / "s" if where == "disk" else None, compressor)
    held = [index, index.store, index.faiss.catalog, index.library]
    if way != "copy":
        held += [index.faiss, index.as_query_engine(), index.as_retriever(), index.storage_context]
    for thing in held:
        with pytest.raises(TypeError, match="its process") as caught:
            TRANSPORTS[way](thing)
        assert isinstance(caught.value, CompLLMError)
    with pytest.raises(CompLLMError, match="its process"):
        index.faiss.model_copy(deep=True)
    assert index.as_query_engine().query("When does ferry number 1 leave?").source_nodes
    index.close()

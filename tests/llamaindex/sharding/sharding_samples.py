"""A corpus and toy models for tests of ingestion in parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import toy
from compllm_rag.llamaindex.documents import load_documents
from compllm_rag.llamaindex.index import ConceptIndex
from compllm_rag.llamaindex.sharding.driver import PartsIngest, PartsReport, job_of
from compllm_rag.llamaindex.sharding.encoder import PartEncoder
from compllm_rag.llamaindex.sharding.staging import Staging


def write_corpus(folder: Path, n: int = 12) -> Path:
    """Rows and two files; some chunks come twice."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "rows.jsonl").open("w") as rows:
        for i in range(n):
            text = f"Keeper {i} wrote: {toy.TEXT[: 300 + 37 * i % 400]} That was in {1871 + i}."
            rows.write(json.dumps({"id": f"r{i}", "title": f"Row {i}", "text": text}) + "\n")
    (folder / "a.md").write_text(f"# Lighthouse\n\n{toy.TEXT}")
    (folder / "b.txt").write_text(toy.TEXT * 2)
    return folder


def in_parts(
    index: ConceptIndex,
    staging: Staging,
    paths: list[Path],
    wrap: Any = None,
    *,
    dtype: str | None = None,
    **options: Any,
) -> PartsReport:
    """Ingest by one worker within this process."""

    def encode(keys: list[str]) -> Iterator[dict[str, Any]]:
        worker: Callable[..., Any] = PartEncoder(str(staging.folder))
        for key in keys:
            rows = worker({"part": [key]})
            yield {name: column[0] for name, column in rows.items()}
            if wrap:
                wrap(key)

    with staging.driven():
        job = job_of(index, llm=None, embedder=None, dtype=dtype)
        return PartsIngest(index, staging, **options).run(load_documents(paths), encode, job, within=paths)


def contents(storage: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[float]]]:
    """What a storage holds: documents, records and vectors."""
    with ConceptIndex.load(storage, read_only=True) as index:
        nodes = {
            node.node_id: [node.ref_doc_id, node.get_content(), node.metadata, node.start_char_idx]
            for node in index.faiss.iter_nodes()
        }
        documents = {key: info.node_ids for key, info in index.ref_doc_info.items()}
        hashes = {key: index.docstore.get_document_hash(key) for key in documents}
        files = {key: index.origins.file_of(key) for key in documents}
        keys = [key for key, _ in index.store.iter_records()]
        records = dict(zip(keys, index.store.get(keys), strict=True))
        vectors = {node.node_id: node.embedding for node in index.faiss.embedded_nodes(sorted(nodes))}
        assert not len(index.pending)
        assert index.verify(deep=True).sound
        accounts = {key: index.accounts.of_document(key) for key in documents}
    about = {"nodes": nodes, "documents": documents, "hashes": hashes, "files": files, "accounts": accounts}
    return about, records, vectors


def assert_same(one: Path, other: Path) -> None:
    """Two storages hold the same."""
    (about, records, vectors), (others, other_records, other_vectors) = contents(one), contents(other)
    assert about == others
    assert about["nodes"]
    assert records.keys() == other_records.keys()
    for key, concepts in records.items():
        np.testing.assert_allclose(concepts.float(), other_records[key].float(), rtol=1e-3, atol=1e-3)
    assert vectors.keys() == other_vectors.keys()
    for key, vector in vectors.items():
        np.testing.assert_allclose(vector, other_vectors[key], atol=1e-5)

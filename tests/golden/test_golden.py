"""Storages that older formats were written in still open, verify, answer and compact. The files are kept in git."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from compllm_rag import ConceptIndex
from compllm_rag.cli.main import app
from compllm_rag.llamaindex.documents import load_documents
from compllm_rag.llamaindex.repair import repair_storage
from compllm_rag.storage.compaction import compact_storage
from compllm_rag.storage.migration import migrate_storage
from compllm_rag.storage.stats import storage_stats
from compllm_rag.storage.verification import verify_storage
from toy_embedder import HashEmbedder

V1 = Path(__file__).parent / "v1"
EXPECTED = json.loads((V1 / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A copy of the storage of version 1."""
    return Path(shutil.copytree(V1 / "made", tmp_path / "made"))


def load(path: Path, **options) -> ConceptIndex:
    return ConceptIndex.load(path, llm=str(V1 / "llm"), embedder=HashEmbedder(), **options)


def same(index: ConceptIndex) -> bool:
    """Whether text, ids and concepts are those that were written, to the last bit."""
    nodes = {node.node_id: node.text for node in index.faiss.iter_nodes()}
    concepts = {
        id_: index.library.fetch(text, missing="error").concepts.numpy().tobytes().hex() for id_, text in nodes.items()
    }
    return (nodes, concepts) == (EXPECTED["nodes"], EXPECTED["concepts"])


def test_it_opens_and_answers(path: Path) -> None:
    with load(path, read_only=True) as index:
        assert same(index)
        stats = index.stats()
        assert {name: stats[name] for name in EXPECTED["stats"]} == EXPECTED["stats"]
        found = index.as_query_engine(similarity_top_k=1).query("Who built the lighthouse on Gull Rock?")
    assert found.source_nodes[0].node.ref_doc_id == "rock.md"
    assert found.metadata["compllm"]["store"]["misses"] == 0


def test_it_verifies_and_has_nothing_to_migrate_or_repair(path: Path) -> None:
    check = verify_storage(path, deep=True)
    assert check.sound, check.findings
    assert (check.format_version, check.documents, check.records) == (1, 2, EXPECTED["stats"]["unique_segments"])
    assert not migrate_storage(path).changed
    assert repair_storage(path).findings == 0
    for command in ("verify", "migrate", "compact", "repair"):
        done = CliRunner().invoke(app, [command, str(path), "--json"])
        assert done.exit_code == 0, done.output
        json.loads(done.stdout)


def test_it_compacts_and_goes_on(path: Path) -> None:
    before = storage_stats(path)
    report = compact_storage(path)
    assert report.concepts.records_dropped > 0
    assert report.bytes_after < report.bytes_before
    with load(path) as index:
        assert same(index)
        assert index.ingest(load_documents([V1 / "corpus"])).segments_compressed == 0
        assert index.stats()["unique_segments"] == before["unique_segments"] - report.concepts.records_dropped
    assert verify_storage(path, deep=True).sound


def test_its_concepts_can_be_made_again(path: Path) -> None:
    shutil.rmtree(path / "concepts")
    assert repair_storage(path, llm=str(V1 / "llm"), embedder=HashEmbedder()).sound
    with load(path) as index:
        for id_, text in EXPECTED["nodes"].items():
            written = torch.frombuffer(bytearray.fromhex(EXPECTED["concepts"][id_]), dtype=torch.float16)
            made = index.library.fetch(text, missing="error").concepts.reshape(-1)
            torch.testing.assert_close(made, written, atol=2e-3, rtol=2e-3)  # another CPU rounds otherwise

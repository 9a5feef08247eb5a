"""A storage keeps the encoding it was made with; concepts are the same whether made now or read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from llama_index.core import Document
from typer.testing import CliRunner

import toy
from compllm_rag import Compressor, ConceptIndex, DiskStore, MemoryStore
from compllm_rag.cli.main import app
from compllm_rag.errors import ConfigurationError, StorageMismatchError
from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.repair import repair_storage
from compllm_rag.models.llm import TargetLLM
from compllm_rag.storage.compaction import compact_storage
from compllm_rag.storage.stats import storage_stats
from compllm_rag.storage.verification import verify_storage
from toy_embedder import HashEmbedder, save_sentence_transformer
from trained import trained

PARAGRAPHS = toy.TEXT.split("\n\n")
ENCODINGS = ("fp16", "int8", "int4")


@pytest.fixture(scope="module")
def compressor(llm: TargetLLM) -> Compressor:
    return trained(llm)


def make(path: Path | None, compressor: Compressor, **options) -> ConceptIndex:
    index = ConceptIndex.create(path, compressor=compressor, embedder=HashEmbedder(), chunk_size=60, **options)
    index.ingest([Document(id_=f"d{i}", text=text) for i, text in enumerate(PARAGRAPHS)])
    return index


def load(path: Path, compressor: Compressor, **options) -> ConceptIndex:
    return ConceptIndex.load(path, compressor=compressor, embedder=HashEmbedder(), **options)


def concepts(library: ConceptLibrary, first: int = 0) -> torch.Tensor:
    return torch.cat([library.fetch(text, missing="error").concepts for text in PARAGRAPHS[first:]])


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("disk", [True, False], ids=["disk", "memory"])
def test_concepts_made_now_are_those_read_back_later(
    tmp_path: Path, compressor: Compressor, encoding: str, disk: bool
) -> None:
    store = DiskStore(tmp_path / "s", hidden_size=32, encoding=encoding) if disk else MemoryStore(32, encoding=encoding)
    with store:
        library = ConceptLibrary(compressor, store)
        library.ensure([PARAGRAPHS[0][:60]])  # so that some are made now and others read
        made = torch.cat([library.fetch(text).concepts for text in PARAGRAPHS])
        assert made.dtype == torch.float16
        assert torch.equal(concepts(library), made)
        exact = ConceptLibrary(compressor, MemoryStore(32))
        exact.ensure(PARAGRAPHS)
        # Other batches, so the last digit may differ; less than any quantisation makes of it.
        assert torch.allclose(concepts(exact).float(), made.float(), atol=1e-4, rtol=2e-3) == (encoding == "fp16")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_storage_stays_what_it_was_made_as(tmp_path: Path, compressor: Compressor, encoding: str) -> None:
    path = tmp_path / "s"
    with make(path, compressor, encoding=encoding) as index:
        expected, stats = concepts(index.library, 1), index.stats()
        assert index.store.encoding.name == stats["encoding"] == encoding
        assert stats["concept_bytes"] == index.store.encoding.nbytes(stats["concepts"], 32)
    assert storage_stats(path)["encoding"] == encoding
    assert verify_storage(path, deep=True).sound
    other = ENCODINGS[ENCODINGS.index(encoding) - 1]
    with pytest.raises(StorageMismatchError, match=f"encoding: got {other}, expected {encoding}"):
        make(path, compressor, encoding=other)
    with make(path, compressor) as index:  # nothing asked for is the storage's own
        index.delete_ref_doc("d0")
        index.commit()
    compact_storage(path)
    with load(path, compressor) as index:
        assert torch.equal(concepts(index.library, 1), expected)
    make(path, compressor, encoding=encoding).close()


def test_the_encoding_is_no_part_of_what_concepts_are(compressor: Compressor) -> None:
    indexes = [make(None, compressor, encoding=encoding) for encoding in ENCODINGS]
    assert len({index.stats()["fingerprint"] for index in indexes}) == 1
    assert len({index.library.passage(PARAGRAPHS[0]).keys for index in indexes}) == 1


def test_an_unknown_encoding_is_refused(tmp_path: Path, compressor: Compressor) -> None:
    with pytest.raises(ConfigurationError, match="int3"):
        make(tmp_path / "s", compressor, encoding="int3")
    assert not (tmp_path / "s").exists()


def test_a_store_of_another_encoding_is_found_and_made_anew(tmp_path: Path, compressor: Compressor) -> None:
    """A folder restored from the wrong copy."""
    for encoding in ("int8", "int4"):
        make(tmp_path / encoding, compressor, encoding=encoding).close()
    shutil.rmtree(tmp_path / "int8" / "concepts")
    shutil.copytree(tmp_path / "int4" / "concepts", tmp_path / "int8" / "concepts")
    with pytest.raises(StorageMismatchError, match="int4"):
        load(tmp_path / "int8", compressor)
    assert "another encoding" in verify_storage(tmp_path / "int8").findings[0].what
    repair_storage(tmp_path / "int8", compressor=compressor, embedder=HashEmbedder())
    assert verify_storage(tmp_path / "int8", deep=True).sound
    with load(tmp_path / "int8", compressor) as index:
        assert index.store.encoding.name == "int8"
        assert len(concepts(index.library))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("damage", ["payload", "index", "manifest", "all"])
def test_a_repair_keeps_the_encoding(tmp_path: Path, compressor: Compressor, encoding: str, damage: str) -> None:
    path = tmp_path / "s"
    make(path, compressor, encoding=encoding).close()
    with load(path, compressor) as index:
        before = concepts(index.library)
    folder = path / "concepts"
    if damage == "payload":
        [pack] = (folder / "packs").iterdir()
        data = bytearray(pack.read_bytes())
        data[100] ^= 1
        pack.write_bytes(data)
    elif damage == "index":
        (folder / "index" / "cache.db").write_bytes(b"no database" * 100)
    elif damage == "manifest":
        (folder / "store.json").unlink()
    else:
        shutil.rmtree(folder)
    report = repair_storage(path, compressor=compressor, embedder=HashEmbedder())
    assert report.findings and report.sound
    assert (report.segments_compressed > 0) == (damage != "manifest")  # it is made again, and all else was there
    assert verify_storage(path, deep=True).sound
    with load(path, compressor, read_only=True) as index:
        assert index.store.encoding.name == encoding
        # Compressed in other company, floats differ in their last bits, and now and then by a step of the encoding.
        difference = (concepts(index.library).float() - before.float()).abs()
        assert difference.mean() < 0.002 * before.float().abs().max()


def test_on_the_command_line(tmp_path: Path, toy_folder: Path) -> None:
    embedder = save_sentence_transformer(tmp_path / "embedder", toy.TEXT)
    (tmp_path / "rock.md").write_text(toy.TEXT, encoding="utf-8")
    words = ["ingest", tmp_path / "rock.md", "--storage", tmp_path / "s"]
    made = [*words, "--llm", toy_folder, "--embedder", embedder, "--encoding", "int4"]
    done = CliRunner().invoke(app, [str(word) for word in made])
    assert done.exit_code == 0, done.output
    stats = CliRunner().invoke(app, ["stats", "--storage", str(tmp_path / "s"), "--json"])
    assert json.loads(stats.stdout)["encoding"] == "int4"
    refused = CliRunner().invoke(app, [str(word) for word in [*words, "--encoding", "int8"]])
    assert refused.exit_code == 2
    assert "error: storage was made with another encoding: got int8, expected int4" in refused.stderr

"""Storages whose chunks are longer than the units of the compressor that they are made by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.node_parser import HierarchicalNodeParser, SentenceSplitter
from llama_index.core.vector_stores import SimpleVectorStore

import toy
from compllm_rag import ConceptIndex, import_index
from compllm_rag.compression.segmentation import unit_length_for
from compllm_rag.errors import ConfigurationError, StorageMismatchError
from tests.llamaindex.test_index import documents
from toy_embedder import HashEmbedder
from trained import trained_deep

LONG = Document(text=" ".join(document.text for document in documents(6)) * 6, id_="long")


@pytest.fixture(scope="module")
def made_by(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Names of an LLM and of a compressor of deep concepts for it, with units of 240 tokens."""
    folder = tmp_path_factory.mktemp("unit_length")
    llm = toy.save(folder / "llm", layers=4)
    trained_deep(toy.TargetLLM.from_pretrained(str(llm))).save_pretrained(folder / "deep")
    return {"llm": str(llm), "reader": None, "compressor": folder / "deep", "embedder": HashEmbedder()}


def units(index: ConceptIndex) -> int:
    return index.library.spec.config.unit_length


def longest(index: ConceptIndex) -> int:
    """Tokens of the longest chunk."""
    return max(len(index.library.passage(node.text).ids) for node in index.faiss.iter_nodes())


def test_a_chunk_is_one_unit_however_long(made_by: dict[str, Any], tmp_path: Path) -> None:
    with ConceptIndex.create(tmp_path / "s", chunk_size=700, **made_by) as index:
        assert units(index) == 840
        report = index.ingest([LONG])
        assert report.segments == report.chunks, "a chunk is a unit"
        assert longest(index) > 300
        fingerprint = index.stats()["fingerprint"]
    with ConceptIndex.create(tmp_path / "s", chunk_size=700, **made_by) as index:
        assert (units(index), index.stats()["fingerprint"]) == (840, fingerprint), "it keeps what it was made with"
    with ConceptIndex.load(tmp_path / "s", embedder=HashEmbedder(), read_only=True) as index:
        answer = index.as_query_engine(similarity_top_k=1).query("Who built the lighthouse?")
        assert answer.metadata["compllm"]["store"]["misses"] == 0


def test_smaller_chunks_leave_the_compressor_as_it_is(made_by: dict[str, Any]) -> None:
    with ConceptIndex.create(**made_by) as plain, ConceptIndex.create(chunk_size=60, **made_by) as small:
        assert units(plain) == units(small) == 240
        assert plain.stats()["fingerprint"] == small.stats()["fingerprint"]
    with ConceptIndex.create(chunk_size=700, **{**made_by, "compressor": None, "codec": "input"}) as index:
        assert not index.library.spec.config.deep


def test_a_loaded_compressor_keeps_its_units_unless_asked(made_by: dict[str, Any]) -> None:
    with ConceptIndex.create(**made_by) as index:
        loaded = index.library.compressor
    own: dict[str, Any] = {"compressor": loaded, "embedder": HashEmbedder()}
    with ConceptIndex.create(chunk_size=700, **own) as index:
        assert units(index) == 240
        report = index.ingest([LONG])
        assert report.segments > report.chunks
    with ConceptIndex.create(chunk_size=700, unit_length=500, **own) as index:
        assert units(index) == 500
    for wrong in ("many", 3, -800):
        with pytest.raises(ConfigurationError, match="chunk size makes no sense"):
            ConceptIndex.create(chunk_size=wrong, **made_by)
    with pytest.raises(ConfigurationError, match="units are of deep concepts"):
        ConceptIndex.create(**{**made_by, "compressor": None, "codec": "input"}, unit_length=500)


def test_a_storage_keeps_its_units(made_by: dict[str, Any], tmp_path: Path) -> None:
    ConceptIndex.create(tmp_path / "s", unit_length=120, **made_by).close()
    for open_it in (
        lambda length: ConceptIndex.create(tmp_path / "s", unit_length=length, **made_by),
        lambda length: ConceptIndex.load(tmp_path / "s", unit_length=length, embedder=HashEmbedder()),
    ):
        with open_it(120) as index:
            assert units(index) == 120
        with pytest.raises(StorageMismatchError, match=r"another unit length.*got 240.*expected 120"):
            open_it(240)
    one_of_segments = {**made_by, "compressor": None, "codec": "input"}
    ConceptIndex.create(tmp_path / "input", **one_of_segments).close()
    with pytest.raises(StorageMismatchError, match=r"unit length.*input embeddings"):
        ConceptIndex.load(tmp_path / "input", unit_length=240, embedder=HashEmbedder())


def test_units_hold_what_a_splitter_cuts(made_by: dict[str, Any], tmp_path: Path) -> None:
    splitter = SentenceSplitter(chunk_size=400, chunk_overlap=0)
    with ConceptIndex.create(transformations=[splitter], **made_by) as index:
        assert units(index) == unit_length_for(400)
    levels = HierarchicalNodeParser.from_defaults(chunk_sizes=[512, 128])
    with ConceptIndex.create(transformations=[levels], **made_by) as index:
        assert units(index) == unit_length_for(512)
    with ConceptIndex.create(transformations=[splitter], unit_length=300, **made_by) as index:
        assert units(index) == 300
    other = {**made_by, "embed_model": made_by["embedder"]}
    del other["embedder"]
    for read_only in (False, True):
        with ConceptIndex.from_vector_store(
            SimpleVectorStore(stores_text=False), storage_dir=tmp_path / "beside", transformations=[splitter],
            read_only=read_only, **(other if not read_only else {"embed_model": made_by["embedder"]}),
        ) as index:  # fmt: skip
            assert units(index) == unit_length_for(400)


def test_units_hold_the_nodes_of_an_index_that_is_imported(made_by: dict[str, Any], tmp_path: Path) -> None:
    stock = VectorStoreIndex.from_documents(
        [LONG], embed_model=HashEmbedder(), transformations=[SentenceSplitter(chunk_size=450, chunk_overlap=0)]
    )
    stock.storage_context.persist(str(tmp_path / "stock"))
    import_index(tmp_path / "stock", tmp_path / "s", **made_by)
    with ConceptIndex.load(tmp_path / "s", embedder=HashEmbedder()) as index:
        assert longest(index) > 240
        assert units(index) == unit_length_for(longest(index))
        assert index.stats()["segments"] == index.stats()["chunks"]
    assert import_index(tmp_path / "stock", tmp_path / "s", **made_by).nodes_added == 0, "the storage is found again"

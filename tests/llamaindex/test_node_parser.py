"""Chunks: complete, stable, and at home in a stock pipeline; and compression as a step of one."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core import Document
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.node_parser import SentenceSplitter

import toy
from compllm_rag import (
    Compressor,
    CompressorConfig,
    ConceptNodeParser,
    ConceptTransform,
    FaissTextVectorStore,
    MemoryStore,
)
from compllm_rag.errors import ConfigurationError
from compllm_rag.library import ConceptLibrary
from toy_embedder import HashEmbedder

LONG = "\n\n".join(f"{toy.TEXT.strip()}\n\nKeeper number {i} left in {1871 + i}." for i in range(8))


@pytest.fixture(scope="module")
def parser(compressor: Compressor) -> ConceptNodeParser:
    return ConceptNodeParser(compressor.segmenter, chunk_size=60)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["Yes. ", "It burns! ", "\n\n", "  ", "東京。", "a" * 90, "🙂", "\n", *toy.TEXT.split(". ")]),
        max_size=40,
    )
)
def test_chunks_joined_are_the_document(pieces: list[str]) -> None:
    text = "".join(pieces)
    parser = ConceptNodeParser(Compressor(toy.llm()).segmenter, chunk_size=40) if not _CACHE else _CACHE[0]
    _CACHE[:] = [parser]
    nodes = parser.get_nodes_from_documents([Document(id_="d", text=text)])
    assert "".join(n.text for n in nodes) == text
    assert [text[n.start_char_idx : n.end_char_idx] for n in nodes] == [n.text for n in nodes]
    assert len({n.node_id for n in nodes}) == len(nodes)


_CACHE: list[ConceptNodeParser] = []


def test_an_edit_leaves_other_nodes_their_ids(parser: ConceptNodeParser) -> None:
    at = LONG.index("Keeper number 4")
    changed = LONG[:at] + "A storm broke the lamp that year. " + LONG[at:]
    old, new = (parser.get_nodes_from_documents([Document(id_="d", text=t)]) for t in (LONG, changed))
    fresh = {n.node_id for n in new} - {n.node_id for n in old}
    assert 1 <= len(fresh) <= 3
    assert len(old) > 20


def test_nodes_know_their_document(parser: ConceptNodeParser) -> None:
    document = Document(
        id_="d", text=LONG, metadata={"title": "T", "source": "x"}, excluded_llm_metadata_keys=["source"]
    )
    for node in parser.get_nodes_from_documents([document]):
        assert node.ref_doc_id == "d"
        assert node.metadata == {"title": "T", "source": "x"}
        assert node.excluded_llm_metadata_keys == ["source"]


def test_the_parser_can_be_copied(parser: ConceptNodeParser) -> None:
    document = Document(id_="d", text=LONG)
    expected = [n.node_id for n in parser.get_nodes_from_documents([document])]
    for other in (copy.deepcopy(parser), pickle.loads(pickle.dumps(parser))):
        assert [n.node_id for n in other.get_nodes_from_documents([document])] == expected


@pytest.mark.parametrize("stock_splitter", [False, True])
async def test_in_a_stock_pipeline(compressor: Compressor, parser: ConceptNodeParser, stock_splitter: bool) -> None:
    library = ConceptLibrary(compressor, MemoryStore(compressor.hidden_size))
    first = SentenceSplitter(chunk_size=64, chunk_overlap=0) if stock_splitter else parser
    step, vectors = ConceptTransform(library), FaissTextVectorStore(dim=64)
    pipeline = IngestionPipeline(
        transformations=[first, step, HashEmbedder()], vector_store=vectors, disable_cache=True
    )
    nodes = pipeline.run(documents=[Document(id_="d", text=LONG)])
    assert step.last_report.compressed > 0
    assert vectors.n_nodes == len(nodes)
    for node in nodes:
        assert library.store.get_joined(library.passage(node.text).keys) is not None
        assert node.metadata == {}
    await pipeline.arun(documents=[Document(id_="d", text=LONG)])
    assert step.last_report.compressed == 0
    assert step.last_report.reused == step.last_report.segments > 0


def test_the_cache_key_tells_compressors_and_rates_apart(compressor: Compressor) -> None:
    def key(made: Compressor, rate: float, namespace: str = "default") -> str:
        library = ConceptLibrary(made, MemoryStore(made.hidden_size), rate=rate, namespace=namespace)
        return get_transformation_hash([], ConceptTransform(library))

    shallow = Compressor(compressor.llm, CompressorConfig(layers=1))
    keys = [key(compressor, 2), key(compressor, 4), key(shallow, 2), key(compressor, 2, "other")]
    assert len(set(keys)) == 4
    assert key(compressor, 2) == keys[0]


def test_the_step_does_not_travel_to_workers(compressor: Compressor) -> None:
    step = ConceptTransform(ConceptLibrary(compressor, MemoryStore(compressor.hidden_size)))
    with pytest.raises(ConfigurationError, match="num_workers"):
        pickle.dumps(step)

"""Components as dictionaries and JSON, and back: working ones, or one line that says how."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.schema import TextNode

import toy
from compllm_rag import (
    Compressor,
    ConceptIndex,
    ConceptLLM,
    ConceptNodeParser,
    ConceptTransform,
    DiskStore,
    FaissTextVectorStore,
    GenerationConfig,
    LocalGenerator,
    MemoryStore,
    TargetLLM,
)
from compllm_rag.errors import (
    ConfigurationError,
    EmbedderMismatchError,
    FingerprintMismatchError,
    StorageMismatchError,
    StorageNotFoundError,
)
from compllm_rag.generation.named import NamedGenerator
from compllm_rag.library import ConceptLibrary
from toy_embedder import HashEmbedder

SHORT = GenerationConfig(max_new_tokens=6, stop=("never",))
DOCUMENT = Document(id_="rock", text=toy.TEXT, metadata={"title": "Rock"})


@pytest.fixture
def index(tmp_path: Path, toy_folder: Path) -> Iterator[ConceptIndex]:
    with ConceptIndex.create(
        tmp_path / "s", llm=str(toy_folder), embedder=HashEmbedder(), generation=SHORT, chunk_size=60
    ) as index:
        yield index


def again(component: Any, **kwargs: Any) -> Any:
    """Through JSON, as a file would keep it."""
    return type(component).from_json(component.to_json(), **kwargs)


# --- the LLM ------------------------------------------------------------------------------------------------------


def test_an_llm_comes_back_by_its_name_and_loads_when_it_is_asked(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = ConceptLLM(LocalGenerator(TargetLLM.from_pretrained(toy_folder), SHORT), system_prompt="Be brief.")
    described = llm.to_dict()
    assert described["class_name"] == "ConceptLLM" and described["llm"]["source"] == str(toy_folder)
    loads: list[Any] = []
    load = TargetLLM.from_pretrained
    monkeypatch.setattr(TargetLLM, "from_pretrained", lambda *args, **kw: loads.append(args) or load(*args, **kw))
    back = again(llm)
    assert not loads and back.to_dict() == described
    assert back.complete("Who?").text == llm.complete("Who?").text
    assert back.metadata == llm.metadata and back.system_prompt == "Be brief."
    assert len(loads) == 1
    assert [part.delta for part in back.stream_complete("Who?")] == [part.delta for part in llm.stream_complete("Who?")]
    assert again(back).complete("Who?").text == llm.complete("Who?").text


def test_the_llm_of_an_index_comes_back(index: ConceptIndex) -> None:
    llm = ConceptLLM(index.generator)
    assert again(llm).complete("Who?").text == llm.complete("Who?").text


def test_an_llm_without_a_name_is_refused(llm: TargetLLM, toy_folder: Path) -> None:
    made = ConceptLLM(LocalGenerator(llm, SHORT))
    with pytest.raises(ConfigurationError, match="generator="):
        again(made)
    assert again(made, generator=LocalGenerator(llm, SHORT)).complete("Who?").text == made.complete("Who?").text

    class Elsewhere(NamedGenerator):
        """Not one of ours, as far as anybody knows."""

        llm_name = None  # type: ignore[assignment]

        def __init__(self) -> None:
            self._config = SHORT

    with pytest.raises(ConfigurationError, match="names no LLM"):
        again(ConceptLLM(Elsewhere()))


def test_another_llm_under_the_same_name_is_refused(tmp_path: Path) -> None:
    folder = toy.save(tmp_path / "llm")
    described = ConceptLLM(LocalGenerator(TargetLLM.from_pretrained(folder))).to_json()
    toy.save(folder, seed=7)
    with pytest.raises(FingerprintMismatchError, match="another LLM"):
        ConceptLLM.from_json(described).complete("Who?")


# --- the parser ---------------------------------------------------------------------------------------------------


def test_a_parser_comes_back_with_the_tokenizer_alone(index: ConceptIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TargetLLM, "from_pretrained", lambda *args, **kw: pytest.fail("the LLM is not needed"))
    back = again(index.parser)
    nodes, before = (parser.get_nodes_from_documents([DOCUMENT]) for parser in (back, index.parser))
    assert len(nodes) > 3
    assert [(n.node_id, n.text) for n in nodes] == [(n.node_id, n.text) for n in before]
    assert back.to_dict() == index.parser.to_dict()
    assert again(index.parser, chunk_size=40).chunk_size == 40


def test_a_parser_without_a_name_is_refused(compressor: Compressor, toy_folder: Path) -> None:
    parser = ConceptNodeParser(compressor.segmenter)
    with pytest.raises(ConfigurationError, match="segmenter="):
        again(parser)
    assert again(parser, segmenter=compressor.segmenter).get_nodes_from_documents([DOCUMENT])
    assert ConceptNodeParser(compressor.segmenter, llm=compressor.llm.source).llm is None


def test_a_parser_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = toy.save(tmp_path / "llm")
    parser = ConceptNodeParser(Compressor(TargetLLM.from_pretrained(folder)).segmenter, llm=str(folder))
    toy.tokenizer(text="Quite another text, quite other tokens. " * 20).save_pretrained(folder)
    with pytest.raises(FingerprintMismatchError, match="another tokenizer"):
        again(parser)


def test_the_cache_tells_parsers_of_two_llms_apart(compressor: Compressor) -> None:
    other = Compressor(TargetLLM(toy.model(), toy.tokenizer(text="Quite another text. " * 30)))
    one, two = (ConceptNodeParser(made.segmenter).to_dict() for made in (compressor, other))
    assert one != two


# --- the transform ------------------------------------------------------------------------------------------------


def test_a_transform_comes_back_by_its_storage(index: ConceptIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    index.ingest([DOCUMENT])
    transform = ConceptTransform(index.library)
    described = transform.to_json()
    nodes = index.faiss.get_nodes()
    index.close()
    loads: list[Any] = []
    load = TargetLLM.from_pretrained
    monkeypatch.setattr(TargetLLM, "from_pretrained", lambda *args, **kw: loads.append(args) or load(*args, **kw))
    back = ConceptTransform.from_json(described)
    assert not loads and back.to_json() == described
    back([*nodes, TextNode(text="Tom rowed back alone.")])
    assert len(loads) == 1
    assert back.last_report is not None
    assert (back.last_report.compressed, back.last_report.reused) == (1, len(nodes))
    back._library.store.close()


def test_a_transform_without_a_storage_is_refused(compressor: Compressor, tmp_path: Path) -> None:
    width = compressor.hidden_size
    for store in (MemoryStore(width), DiskStore(tmp_path / "concepts", hidden_size=width)):
        library = ConceptLibrary(compressor, store)
        transform = ConceptTransform(library)
        with pytest.raises(ConfigurationError, match="library="):
            again(transform)
        assert again(transform, library=library)([TextNode(text="Tom.")])
        store.close()


def test_a_transform_whose_storage_changed_is_refused(index: ConceptIndex, compressor: Compressor) -> None:
    described = ConceptTransform(index.library).to_dict()
    with pytest.raises(StorageMismatchError, match="another rate"):
        ConceptTransform.from_dict(described | {"rate": "FixedRate(4.0)"})
    with pytest.raises(StorageMismatchError, match="another fingerprint"):
        ConceptTransform.from_dict(
            described, library=ConceptLibrary(compressor, MemoryStore(compressor.hidden_size), rate=1.0)
        )
    with pytest.raises(StorageNotFoundError):
        ConceptTransform.from_dict(described | {"storage": "/no/such/folder"})


# --- the vector store ---------------------------------------------------------------------------------------------


def test_a_vector_store_comes_back_by_its_folder(index: ConceptIndex, tmp_path: Path) -> None:
    index.ingest([DOCUMENT])
    described = index.faiss.to_json()
    assert json.loads(described)["folder"] == str(tmp_path / "s")
    index.close()
    back = FaissTextVectorStore.from_json(described, read_only=True)
    assert back.n_nodes and back.catalog.read_only
    back.close()
    with pytest.raises(EmbedderMismatchError, match="another length"):
        FaissTextVectorStore.from_json(described, dim=3)
    with pytest.raises(ConfigurationError, match="in memory"):
        again(FaissTextVectorStore(dim=3))
    with pytest.raises(StorageNotFoundError):
        FaissTextVectorStore.from_json(described, folder=str(tmp_path / "gone"))


# --- a pipeline of ours -------------------------------------------------------------------------------------------


def test_a_pipeline_persists_and_goes_on(index: ConceptIndex, tmp_path: Path) -> None:
    def pipeline() -> IngestionPipeline:
        return IngestionPipeline(
            transformations=[again(index.parser), ConceptTransform(index.library), index.embedder],
            vector_store=index.faiss,
            docstore=index.docstore,
            docstore_strategy=DocstoreStrategy.UPSERTS,
        )

    first = pipeline()
    with index.bulk():
        made = first.run(documents=[DOCUMENT])
    first.persist(str(tmp_path / "pipeline"))
    stats = index.stats()
    assert stats["chunks"] == len(made) > 3
    second = pipeline()
    second.load(str(tmp_path / "pipeline"))
    second.docstore = index.docstore  # the cache is what was persisted; what is known of documents lies in the storage
    changed = Document(id_="rock", text=toy.TEXT + "\n\nTom rowed back alone.", metadata=DOCUMENT.metadata)
    with index.bulk():
        assert not second.run(documents=[DOCUMENT])
        assert second.run(documents=[changed])
    assert index.stats()["chunks"] >= stats["chunks"]
    assert index.as_query_engine().query("Who?").metadata["compllm"]["store"]["misses"] == 0

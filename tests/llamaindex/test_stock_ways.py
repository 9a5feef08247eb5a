"""What works with a stock VectorStoreIndex: works here, or is refused by name with the way that does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, StorageContext, load_index_from_storage
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import HierarchicalNodeParser, SentenceSplitter, SentenceWindowNodeParser
from llama_index.core.schema import BaseNode, TextNode, TransformComponent

from compllm_rag import Compressor, ConceptIndex
from compllm_rag.errors import ConfigurationError, EmptyCorpusError, StorageMismatchError
from toy_embedder import HashEmbedder

DOCUMENTS = [
    Document(id_=f"d{i}", text=" ".join(f"Ferry {i} of line {j} leaves at {j}." for j in range(12))) for i in range(3)
]


def made(compressor: Compressor, path: Path | None = None, **options: Any) -> ConceptIndex:
    return ConceptIndex.create(path, compressor=compressor, embedder=HashEmbedder(), **options)


def splitter(size: int = 60) -> SentenceSplitter:
    return SentenceSplitter(chunk_size=size, chunk_overlap=0)


def test_options_of_a_stock_index_are_heeded(compressor: Compressor, capsys: pytest.CaptureFixture[str]) -> None:
    heard = LlamaDebugHandler(print_trace_on_end=False)
    index = ConceptIndex.from_documents(
        DOCUMENTS,
        compressor=compressor,
        embed_model=HashEmbedder(),
        show_progress=True,
        insert_batch_size=1,
        use_async=True,
        callback_manager=CallbackManager([heard]),
    )
    assert "Ingesting" in capsys.readouterr().err
    assert index.stats()["documents"] == 3
    assert heard.get_events()
    assert set(index.ref_doc_info) == {"d0", "d1", "d2"}
    assert index.ref_doc_info["d0"].node_ids == index.faiss.node_ids("d0")


@pytest.mark.parametrize(
    ("option", "way"),
    [
        ({"storage_context": StorageContext.from_defaults()}, "create"),
        ({"nodes": []}, "insert_nodes"),
        ({"num_workers": 2}, "leave it out"),
        ({"chunk_sise": 2}, "did you mean chunk_size"),
        ({"llm": MockLLM()}, "leave it out"),
        ({"embed_model": object()}, "embedder"),
        ({"insert_batch_size": 0}, "at least 1"),
        ({"transformations": []}, "no transformations"),
        ({"transformations": [splitter()], "chunk_size": 50}, "both"),
    ],
)
def test_other_options_are_refused_by_name(
    tmp_path: Path, compressor: Compressor, option: dict[str, Any], way: str
) -> None:
    options = {"compressor": compressor, **({} if "embed_model" in option else {"embedder": HashEmbedder()}), **option}
    name = next(iter(option))
    for make in (
        lambda: ConceptIndex.from_documents(DOCUMENTS, tmp_path / "s", **options),
        lambda: ConceptIndex.create(tmp_path / "s", **options),
    ):
        with pytest.raises(ConfigurationError, match=way) as caught:
            make()
        assert name in str(caught.value) or name in ("embed_model",)
    assert not (tmp_path / "s").exists()


def test_a_storage_context_in_place_of_the_folder(compressor: Compressor) -> None:
    with pytest.raises(ConfigurationError, match="storage_context"):
        ConceptIndex.from_documents(DOCUMENTS, StorageContext.from_defaults())


@pytest.mark.parametrize("given", [{"nodes": []}, {"index_struct": None}, {"objects": []}])
def test_the_constructor_refuses_what_the_stock_one_takes(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(given))):
        ConceptIndex(**given)
    with pytest.raises(ConfigurationError, match="insert_nodes"):
        ConceptIndex([TextNode(text="x")])


def test_no_documents(tmp_path: Path, compressor: Compressor) -> None:
    with pytest.raises(EmptyCorpusError, match="no documents.*ConceptIndex.create"):
        ConceptIndex.from_documents([], tmp_path / "s", compressor=compressor, embedder=HashEmbedder())
    made(compressor, tmp_path / "s").close()  # nobody holds it


def test_what_persist_writes_finds_the_storage_again(tmp_path: Path, compressor: Compressor) -> None:
    options = {"compressor": compressor, "embedder": HashEmbedder()}
    with made(compressor, tmp_path / "s") as index:
        index.ingest(DOCUMENTS)
        index.storage_context.persist(str(tmp_path / "persisted"))
        again = load_index_from_storage(index.storage_context, **options)
        assert again.stats() == index.stats()
        again.close()
    context = StorageContext.from_defaults(persist_dir=str(tmp_path / "persisted"))
    opened = load_index_from_storage(context, **options, read_only=True)
    assert isinstance(opened, ConceptIndex)
    assert opened.as_query_engine().query("When does ferry 1 leave?").source_nodes
    opened.close()
    memory = made(compressor)
    with pytest.raises(ConfigurationError, match="memory"):
        memory.storage_context.persist(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match="memory"):
        load_index_from_storage(memory.storage_context)


async def test_async_twins(compressor: Compressor) -> None:
    index = made(compressor)
    assert (await index.aingest(DOCUMENTS)).documents == 3
    assert (await index.aupload(Document(id_="u", text="An upload."))).documents_changed == 1
    index.close(drain=True)


def texts(index: ConceptIndex) -> list[str]:
    return [node.text for node in index.faiss.iter_nodes()]


def test_transformations_of_ones_own_make_the_nodes(tmp_path: Path, compressor: Compressor) -> None:
    wanted = [n.text for n in splitter().get_nodes_from_documents(DOCUMENTS)]
    with made(compressor, tmp_path / "s", transformations=[splitter()]) as index:
        assert index.ingest(DOCUMENTS).documents_changed == 3
        assert texts(index) == wanted
        again = index.ingest(DOCUMENTS)
        assert (again.documents_changed, again.segments_compressed) == (0, 0)
        assert index.refresh_ref_docs(DOCUMENTS) == [False] * 3
        assert index.upload(DOCUMENTS).documents_changed == 0
        index.insert(DOCUMENTS[0])
        assert sorted(texts(index)) == sorted(wanted)
        assert index.as_query_engine().query("When does ferry 1 leave?").metadata["compllm"]["store"]["misses"] == 0
    with ConceptIndex.load(tmp_path / "s", compressor=compressor, embedder=HashEmbedder()) as index:
        for way in (
            lambda: index.ingest(DOCUMENTS),
            lambda: index.insert(DOCUMENTS[0]),
            lambda: index.upload(DOCUMENTS),
            lambda: index.refresh_ref_docs(DOCUMENTS),
        ):
            with pytest.raises(StorageMismatchError, match="SentenceSplitter"):
                way()
        assert sorted(texts(index)) == sorted(wanted)
        assert index.as_query_engine().query("When does ferry 1 leave?").source_nodes
        index.use_transformations([splitter(30)])
        changed = index.ingest(DOCUMENTS)
        assert changed.documents_changed == 3
        assert len(texts(index)) > len(wanted)
        index.use_transformations([index.parser])
        assert index.ingest(DOCUMENTS).documents_changed == 3
    with made(compressor, tmp_path / "s") as index:
        assert index.ingest(DOCUMENTS).documents_changed == 0


@pytest.mark.parametrize(
    "parser",
    [
        SentenceWindowNodeParser.from_defaults(window_size=1),
        HierarchicalNodeParser.from_defaults(chunk_sizes=[120, 40], chunk_overlap=0),
    ],
    ids=["windows", "levels"],
)
def test_nodes_of_every_splitter_belong_to_their_document(compressor: Compressor, parser: TransformComponent) -> None:
    index = made(compressor, transformations=[parser])
    index.ingest(DOCUMENTS)
    count = len(texts(index))
    assert set(index.faiss.chunks_by_document()) == {"d0", "d1", "d2"}
    changed = Document(id_="d1", text=DOCUMENTS[1].text.replace("line 3", "line three"))
    assert index.ingest([changed]).documents_changed == 1
    assert len(texts(index)) == count
    index.delete_ref_doc("d1")
    assert set(index.faiss.chunks_by_document()) == {"d0", "d2"}


class Orphans(TransformComponent):
    """Makes nodes of no document."""

    def __call__(self, nodes: list[BaseNode], **kwargs: Any) -> list[BaseNode]:
        return [TextNode(text="an orphan") for _ in nodes]


def test_nodes_of_no_document_are_refused(compressor: Compressor) -> None:
    index = made(compressor, transformations=[Orphans()])
    with pytest.raises(ConfigurationError, match="names no document"):
        index.ingest(DOCUMENTS)
    assert texts(index) == []

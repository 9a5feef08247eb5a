"""ConceptIndex beside other vector stores: Qdrant, Chroma and LlamaIndex's own, and one that can do next to nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.schema import BaseNode, Document, MetadataMode, TextNode
from llama_index.core.vector_stores import MetadataFilter, MetadataFilters, SimpleVectorStore
from llama_index.core.vector_stores.types import BasePydanticVectorStore, VectorStoreQuery, VectorStoreQueryResult

from compllm_rag import Compressor, ConceptIndex
from compllm_rag.errors import ConfigurationError, NotTransferableError, StorageMismatchError, StoreFullError
from compllm_rag.llamaindex.repair import repair_storage
from compllm_rag.llamaindex.vector_store import FaissTextVectorStore
from compllm_rag.storage.stats import storage_stats
from compllm_rag.storage.verification import verify_storage
from tests.llamaindex.test_index import documents
from toy_embedder import HashEmbedder

QUESTION = "Who built the lighthouse on Gull Rock?"


def qdrant() -> BasePydanticVectorStore:
    import qdrant_client
    from llama_index.vector_stores.qdrant import QdrantVectorStore

    return QdrantVectorStore("texts", client=qdrant_client.QdrantClient(":memory:"))


def chroma() -> BasePydanticVectorStore:
    import chromadb
    from llama_index.vector_stores.chroma import ChromaVectorStore

    client = chromadb.EphemeralClient(chromadb.Settings(anonymized_telemetry=False, is_persistent=False))
    return ChromaVectorStore(
        chroma_collection=client.create_collection(f"c-{uuid.uuid4()}", metadata={"hnsw:space": "cosine"})
    )


class Bare(BasePydanticVectorStore):
    """Keeps text, deletes documents, and can do nothing that LlamaIndex does not demand."""

    stores_text: bool = True

    def __init__(self) -> None:
        super().__init__(stores_text=True)
        self._nodes: dict[str, BaseNode] = {}

    @property
    def client(self) -> Any:
        return None

    def add(self, nodes: list[BaseNode], **kwargs: Any) -> list[str]:
        self._nodes |= {node.node_id: node for node in nodes}
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **kwargs: Any) -> None:
        self._nodes = {id_: node for id_, node in self._nodes.items() if node.ref_doc_id != ref_doc_id}

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        found = list(self._nodes.values())[: query.similarity_top_k]
        return VectorStoreQueryResult(nodes=found, similarities=[1.0] * len(found), ids=[n.node_id for n in found])


KINDS: dict[str, Callable[[], BasePydanticVectorStore]] = {
    "qdrant": qdrant,
    "chroma": chroma,
    "simple": SimpleVectorStore,
    "bare": Bare,
}
LISTING = ["qdrant", "chroma", "simple"]


def beside(store: BasePydanticVectorStore, compressor: Compressor, path: Path | None = None, **options) -> ConceptIndex:
    return ConceptIndex.from_vector_store(
        store, HashEmbedder(), storage_dir=path, compressor=compressor, chunk_size=60, **options
    )


def records(index: ConceptIndex) -> int:
    return index.store.stats().records


def referred(index: ConceptIndex, texts: list[str]) -> set[str]:
    return {key for text in texts for key in index.library.passage(text).keys}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=LISTING)
def listing(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_queries_hit_all_concepts(kind: str, compressor: Compressor, tmp_path: Path) -> None:
    store = KINDS[kind]()
    with beside(store, compressor, tmp_path / "s") as index:
        assert index.as_query_engine().query(QUESTION).source_nodes == []
        index.ingest(documents(3))
        first = index.as_query_engine(similarity_top_k=2).query(QUESTION)
        account = first.metadata["compllm"]
        assert account["store"]["misses"] == 0 < account["store"]["hits"]
        assert {facts["used"] for facts in account["nodes"].values()} == {"concepts"}
        late = asyncio.run(index.as_query_engine(similarity_top_k=2).aquery(QUESTION))
        assert str(late) == str(first)
    # The vectors are where they were; concepts, counts and hashes are in the storage.
    with beside(store, compressor, tmp_path / "s", read_only=True) as index:
        again = index.as_query_engine(similarity_top_k=2).query(QUESTION)
        assert str(again) == str(first) and again.metadata["compllm"]["store"]["misses"] == 0
        assert [n.node.node_id for n in again.source_nodes] == [n.node.node_id for n in first.source_nodes]
    assert verify_storage(tmp_path / "s", deep=True).findings == []
    assert storage_stats(tmp_path / "s")["documents"] == 3


def test_the_stores_find_what_faiss_finds(listing: str, compressor: Compressor) -> None:
    with beside(KINDS[listing](), compressor) as index:
        index.ingest(documents(3))
        ours = ConceptIndex.create(None, compressor=compressor, embedder=HashEmbedder(), chunk_size=60)
        ours.ingest(documents(3))
        # Chroma's scores are of another kind, its order is the same.
        want = [n.node.node_id for n in ours.as_retriever(similarity_top_k=3).retrieve(QUESTION)]
        assert [n.node.node_id for n in index.as_retriever(similarity_top_k=3).retrieve(QUESTION)] == want
        only = MetadataFilters(filters=[MetadataFilter(key="title", value="T2")])
        found = index.as_retriever(similarity_top_k=9, filters=only).retrieve(QUESTION)
        assert found and {n.node.metadata["title"] for n in found} == {"T2"}


def test_documents_come_change_and_go(kind: str, compressor: Compressor, tmp_path: Path) -> None:
    with beside(KINDS[kind](), compressor, tmp_path / "s") as index:
        docs = documents(3)
        index.ingest(docs)
        assert index.ingest(docs).documents_changed == 0
        changed = documents(3)
        changed[1].set_content(changed[1].text + " The lamp was sold in 1999.")
        if kind == "bare":
            with pytest.raises(ConfigurationError, match="cannot delete single nodes.*delete_ref_doc"):
                index.ingest(changed)
            index.delete_ref_doc("d1")
        report = index.ingest(changed)
        assert report.documents_changed == 1
        nodes = {n.node.text for n in index.as_retriever(similarity_top_k=50).retrieve("The lamp was sold in 1999.")}
        assert sum("1999" in text for text in nodes) == 1
        assert index.refresh_ref_docs(changed) == [False, False, False]
        index.delete_ref_doc("d1")
        index.delete_ref_doc("d2")
        left = index.as_retriever(similarity_top_k=50).retrieve(QUESTION)
        assert {n.node.ref_doc_id for n in left} == {"d0"}
        stats = index.stats()
        assert stats["documents"] == 1 and stats["chunks"] == len(left) == index.faiss.n_nodes
    assert verify_storage(tmp_path / "s", deep=True).sound


def test_garbage_goes_by_reference(listing: str, compressor: Compressor, tmp_path: Path) -> None:
    store = KINDS[listing]()
    with beside(store, compressor, tmp_path / "s") as index:
        index.ingest(documents(3))
        everything = records(index)
        assert index.collect_garbage().nodes_forgotten == 0 and records(index) == everything
        store.delete("d1")  # by somebody else, of whom the index hears nothing
        gone = index.faiss.node_ids("d1")
        report = index.collect_garbage()
        assert report.nodes_forgotten == len(gone) and index.faiss.node_ids("d1") == []
        texts = [n.node.text for n in index.as_retriever(similarity_top_k=50).retrieve(QUESTION)]
        kept = referred(index, texts)
        assert records(index) == len(kept) == everything - report.concepts.records_dropped < everything
        assert all(index.store.contains(sorted(kept)))
        answer = index.as_query_engine(similarity_top_k=2).query(QUESTION)
        assert answer.metadata["compllm"]["store"]["misses"] == 0
        # The hash is still known, so the document is not brought back unasked; deleted here, it is.
        index.delete_ref_doc("d1")
        assert index.ingest(documents(3)).documents_changed == 1
    assert verify_storage(tmp_path / "s", deep=True).sound


def test_garbage_in_memory(compressor: Compressor) -> None:
    with beside(SimpleVectorStore(), compressor) as index:
        index.ingest(documents(2))
        everything = records(index)
        index.delete_ref_doc("d1")
        assert records(index) == everything
        assert 0 < index.collect_garbage().concepts.records_dropped == everything - records(index)
        assert index.as_query_engine().query(QUESTION).metadata["compllm"]["store"]["misses"] == 0


def test_a_store_that_cannot_list_says_so(compressor: Compressor) -> None:
    with beside(Bare(), compressor) as index:
        index.ingest(documents(1))
        with pytest.raises(ConfigurationError, match="cannot list its nodes: got Bare"):
            index.collect_garbage()
        with pytest.raises(ConfigurationError, match="cannot list its nodes: got Bare"):
            index.adopt()


@pytest.mark.parametrize("kind", ["qdrant", "chroma"])
def test_nodes_that_were_there_are_adopted(kind: str, compressor: Compressor) -> None:
    store, embedder = KINDS[kind](), HashEmbedder()
    nodes = [TextNode(id_=str(uuid.uuid4()), text=f"{d.text} Of old.", metadata={"title": "old"}) for d in documents(3)]
    for node in nodes:
        node.embedding = embedder.get_text_embedding(node.get_content(MetadataMode.EMBED))
    store.add(nodes)
    with beside(store, compressor) as index:
        told: list[float | None] = []
        assert index.adopt(progress=lambda message, share: told.append(share)) == 3
        assert index.adopt() == 0 and told[-1] == 1.0
        answer = index.as_query_engine(similarity_top_k=3).query(QUESTION)
        assert answer.metadata["compllm"]["store"]["misses"] == 0 and len(answer.source_nodes) == 3
        assert index.stats()["chunks"] == 3
        index.delete_nodes([nodes[0].node_id])
        assert len(index.as_retriever(similarity_top_k=9).retrieve(QUESTION)) == 2


def test_uploads_are_read_as_text_until_they_are_compressed(kind: str, compressor: Compressor) -> None:
    with beside(KINDS[kind](), compressor) as index:
        if kind == "bare":  # a worker has to read the text again
            index.upload(documents(1))
            assert not index.uploads.wait() and index.uploads.status().failed
            return
        assert index.upload(documents(2)).chunks_queued
        assert index.uploads.wait()
        assert index.as_query_engine().query(QUESTION).metadata["compllm"]["store"]["misses"] == 0


def test_an_error_undoes_nothing_that_the_store_has_done(compressor: Compressor, tmp_path: Path) -> None:
    store = SimpleVectorStore()
    with beside(store, compressor, tmp_path / "s") as index:
        index.ingest(documents(1))
        with pytest.raises(ZeroDivisionError), index.bulk():
            index.insert_nodes(index.parser.get_nodes_from_documents(documents(2)[1:]))
            raise ZeroDivisionError
        assert index.faiss.n_nodes == len(store.data.embedding_dict) > 1
        assert index.collect_garbage().nodes_forgotten == 0
    assert verify_storage(tmp_path / "s", deep=True).sound


def test_concepts_that_were_lost_before_they_were_on_the_disk_are_awaited(
    compressor: Compressor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SimpleVectorStore()
    with beside(store, compressor, tmp_path / "s") as index:
        index.ingest(documents(1))
        sync, fired = os.fsync, []

        def failing(file: int) -> None:
            if not fired and os.readlink(f"/proc/self/fd/{file}").endswith(".pack"):
                fired.append(True)
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(file)

        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises(StoreFullError):
            index.ingest(documents(2))
        monkeypatch.setattr(os, "fsync", sync)
        nodes = [node for page in index.faiss.iter_pages() for node in page]
        kept = {n.node_id: all(index.store.contains(index.library.passage(n.get_content()).keys)) for n in nodes}
        assert fired and not all(kept.values())
        assert set(index.pending.nodes()) == {node_id for node_id, there in kept.items() if not there}
    with beside(store, compressor, tmp_path / "s") as index:  # whoever opens it next makes them
        index.uploads.wait()
        assert not len(index.pending)
    assert verify_storage(tmp_path / "s", deep=True).sound


def test_a_failing_store_leaves_the_catalog_as_it_was(
    compressor: Compressor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Bare()
    with beside(store, compressor, tmp_path / "s") as index:
        index.ingest(documents(1))
        before = index.stats()["chunks"]
        monkeypatch.setattr(Bare, "add", lambda self, nodes, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            index.ingest(documents(2))
        assert index.stats()["chunks"] == index.faiss.n_nodes == before
    assert verify_storage(tmp_path / "s", deep=True).sound


@pytest.mark.parametrize("broken", ["embedder", "store"])
@pytest.mark.parametrize("way", ["ingest", "update"])
def test_an_update_that_fails_is_made_up_for(
    compressor: Compressor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, way: str
) -> None:
    """The other store takes nothing back: what was lost must not count as there."""

    def bring(text: str) -> None:
        document = Document(id_="d", text=text)
        index.ingest([document]) if way == "ingest" else index.update_ref_doc(document)

    former = "The ferry to Orsa leaves at nine."
    with beside(Bare(), compressor, tmp_path / "s") as index:
        bring(former)
        with monkeypatch.context() as patched:
            if broken == "store":
                patched.setattr(Bare, "add", lambda self, nodes, **kwargs: 1 / 0)
            else:
                patched.setattr(HashEmbedder, "_get_text_embedding", lambda self, text: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                bring("The ferry to Orsa leaves at ten.")
        if broken == "embedder":
            assert index.faiss.n_nodes == 1  # nothing was deleted before
        assert index.ingest([Document(id_="d", text=former)]).documents_changed == (broken == "store")
        found = index.as_retriever().retrieve("When does the ferry leave?")
        assert [n.node.get_content(MetadataMode.NONE) for n in found] == [former]
    assert verify_storage(tmp_path / "s", deep=True).sound


def test_limits_are_heeded_or_refused(compressor: Compressor) -> None:
    with beside(SimpleVectorStore(), compressor) as index:
        index.ingest(documents(3))
        found = index.as_retriever(similarity_top_k=9, doc_ids=["d2"]).retrieve(QUESTION)
        assert found and {n.node.ref_doc_id for n in found} == {"d2"}
        assert index.as_retriever(doc_ids=[]).retrieve(QUESTION) == []
    with beside(qdrant(), compressor) as index:
        index.ingest(documents(3))
        assert {n.node.ref_doc_id for n in index.as_retriever(doc_ids=["d2"]).retrieve(QUESTION)} == {"d2"}
        assert index.as_retriever(doc_ids=[]).retrieve(QUESTION) == []
    with beside(chroma(), compressor) as index:
        index.ingest(documents(3))
        with pytest.raises(ConfigurationError, match="would not heed"):
            index.as_retriever(doc_ids=["d2"]).retrieve(QUESTION)


def test_what_needs_text_in_the_storage_is_refused_by_name(compressor: Compressor, tmp_path: Path) -> None:
    with beside(Bare(), compressor, tmp_path / "s") as index:
        index.ingest(documents(1))
        with pytest.raises(ConfigurationError, match="words are searched.*Bare"):
            index.as_query_engine(retrieval="hybrid")
        pack = next((tmp_path / "s").glob("concepts/packs/*"))
    pack.write_bytes(pack.read_bytes()[:-9])
    with pytest.raises(StorageMismatchError, match="own text.*Bare.*adopt"):
        repair_storage(tmp_path / "s", compressor=compressor, embedder=HashEmbedder())


def test_a_storage_belongs_to_one_kind_of_store(compressor: Compressor, tmp_path: Path) -> None:
    beside(SimpleVectorStore(), compressor, tmp_path / "s").close()
    with pytest.raises(StorageMismatchError, match="expected SimpleVectorStore.*from_vector_store"):
        ConceptIndex.load(tmp_path / "s", compressor=compressor, embedder=HashEmbedder())
    with pytest.raises(StorageMismatchError, match="got Bare, expected SimpleVectorStore"):
        beside(Bare(), compressor, tmp_path / "s")
    ConceptIndex.create(tmp_path / "own", compressor=compressor, embedder=HashEmbedder()).close()
    with pytest.raises(StorageMismatchError, match=r"got Bare.*ConceptIndex.load"):
        ConceptIndex.from_vector_store(Bare(), HashEmbedder(), storage_dir=tmp_path / "own", compressor=compressor)


@pytest.mark.parametrize("wrong", [FaissTextVectorStore(dim=4), "qdrant"])
def test_other_things_are_no_vector_stores(wrong: Any, compressor: Compressor) -> None:
    with pytest.raises(ConfigurationError, match="ConceptIndex.create"):
        beside(wrong, compressor)
    with pytest.raises(ConfigurationError, match="embedder and embed_model"):
        beside(Bare(), compressor, embedder=HashEmbedder())


def test_documents_are_listed(listing: str, compressor: Compressor) -> None:
    with beside(KINDS[listing](), compressor, show_progress=False) as index:
        index.ingest(documents(2))
        found = index.ref_doc_info
        assert {doc: info.metadata["title"] for doc, info in found.items()} == {"d0": "T0", "d1": "T1"}
        assert sorted(found["d1"].node_ids) == sorted(index.faiss.node_ids("d1"))
        with pytest.raises(NotTransferableError, match="from_vector_store"):
            pickle.dumps(index.faiss)
    with pytest.raises(ConfigurationError, match="no such option.*got chunksize"):
        beside(Bare(), compressor, chunksize=9)


def test_vectors_of_another_storage_are_no_silent_answer(compressor: Compressor) -> None:
    store = SimpleVectorStore()
    with beside(store, compressor) as index:
        index.ingest(documents(1))
    with beside(store, compressor) as other, pytest.raises(StorageMismatchError, match="text is not in this storage"):
        other.as_query_engine().query(QUESTION)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ANONYMIZED_TELEMETRY", "False")
    yield

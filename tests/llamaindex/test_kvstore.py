"""Document and index stores of LlamaIndex on a catalog."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from llama_index.core import MockEmbedding, StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.schema import Document
from llama_index.core.storage.docstore.keyval_docstore import KVDocumentStore
from llama_index.core.storage.index_store.keyval_index_store import KVIndexStore

from compllm_rag.catalog.catalog import Catalog
from compllm_rag.errors import ConfigurationError, StoreReadOnlyError
from compllm_rag.llamaindex.kvstore import CatalogKVStore
from compllm_rag.llamaindex.vector_store import FaissTextVectorStore
from tests.catalog.catalog_samples import DIM, axis, node


@pytest.fixture
def kv() -> CatalogKVStore:
    return CatalogKVStore(Catalog.in_memory(DIM))


def test_put_get_delete(kv: CatalogKVStore) -> None:
    kv.put("b", {"n": 1, "deep": [{"x": None}]})
    kv.put_all([("a", {"n": 2}), ("b", {"n": 3})], batch_size=7)
    kv.put("a", {"other": True}, collection="elsewhere")
    assert kv.get("b") == {"n": 3}
    assert list(kv.get_all().items()) == [("b", {"n": 3}), ("a", {"n": 2})]  # in order of arrival, as in a dict
    assert (kv.delete("a"), kv.delete("a"), kv.get("a")) == (True, False, None)
    assert kv.get("a", collection="elsewhere") == {"other": True}
    assert kv.get_all("nowhere") == {}


def test_async_twins(kv: CatalogKVStore) -> None:
    async def all_of_them() -> None:
        await asyncio.gather(kv.aput("a", {"n": 1}), kv.aput_all([("b", {"n": 2}), ("c", {"n": 3})], batch_size=2))
        assert await kv.aget("c") == {"n": 3}
        assert await kv.adelete("b")
        assert sorted(await kv.aget_all()) == ["a", "c"]

    asyncio.run(all_of_them())


def test_strange_keys_and_values(kv: CatalogKVStore) -> None:
    for key in ("", "nul\x00", "../x", "x" * 10_000, "ü'; --"):
        kv.put(key, {"text": "lone \ud800 and nul \x00"})
        assert kv.get(key) == {"text": "lone \ud800 and nul \x00"}
    with pytest.raises(ConfigurationError, match="Unicode"):
        kv.put("bad\ud800", {})
    with pytest.raises(ConfigurationError, match="JSON"):
        kv.put_all([("good", {}), ("bad", {"x": object()})])
    assert kv.get("good") is None


def test_documents_and_vectors_commit_together(tmp_path: Path) -> None:
    store = FaissTextVectorStore.create(tmp_path / "s", DIM)
    documents = KVDocumentStore(CatalogKVStore(store.catalog))

    def add(name: str) -> None:
        store.add([node(name, axis(0), doc=name)])
        documents.add_documents([Document(text=name, id_=name)])
        documents.set_document_hash(name, "hash of " + name)

    add("kept")
    store.commit()
    add("lost")
    assert documents.get_document("lost") is not None
    store.close()
    with FaissTextVectorStore.open(tmp_path / "s", read_only=True) as again:
        documents = KVDocumentStore(CatalogKVStore(again.catalog))
        assert [n.node_id for n in again.get_nodes()] == list(documents.docs) == ["kept"]
        assert documents.get_all_document_hashes() == {"hash of kept": "kept"}
        with pytest.raises(StoreReadOnlyError):
            documents.set_document_hash("kept", "x")


@pytest.mark.parametrize("use_async", [False, True])
def test_whole_storage_of_an_index_in_one_catalog(tmp_path: Path, use_async: bool) -> None:
    embed = MockEmbedding(embed_dim=DIM)

    def context(store: FaissTextVectorStore) -> StorageContext:
        kv = CatalogKVStore(store.catalog)
        return StorageContext.from_defaults(
            docstore=KVDocumentStore(kv), index_store=KVIndexStore(kv), vector_store=store
        )

    with FaissTextVectorStore.create(tmp_path / "s", DIM) as store:
        index = VectorStoreIndex([], storage_context=context(store), embed_model=embed, store_nodes_override=True)
        document = Document(text="Gulls nest here.", id_="gulls")
        if use_async:
            asyncio.run(index.ainsert(document))
        else:
            index.insert(document)
        index_id = index.index_id
    with FaissTextVectorStore.open(tmp_path / "s") as store:
        again = load_index_from_storage(context(store), index_id=index_id, embed_model=embed, store_nodes_override=True)
        assert [hit.node.ref_doc_id for hit in again.as_retriever().retrieve("gulls")] == ["gulls"]
        assert list(again.ref_doc_info) == ["gulls"]
        # Unchanged, changed, new: what refreshing needs the document store for.
        refreshed = again.refresh_ref_docs(
            [Document(text="Gulls nest here.", id_="gulls"), Document(text="The lamp burns.", id_="lamp")]
        )
        assert refreshed == [False, True]
        again.delete_ref_doc("gulls", delete_from_docstore=True)
        assert [n.ref_doc_id for n in store.get_nodes()] == ["lamp"]
        assert list(again.ref_doc_info) == ["lamp"]


@pytest.mark.parametrize("use_async", [False, True])
def test_pipeline_knows_after_reopening_what_it_has_ingested(tmp_path: Path, use_async: bool) -> None:
    def ingest(*documents: Document) -> int:
        path = tmp_path / "s"
        made = FaissTextVectorStore.open(path) if path.exists() else FaissTextVectorStore.create(path, DIM)
        with made as store:
            pipeline = IngestionPipeline(
                transformations=[MockEmbedding(embed_dim=DIM)],
                vector_store=store,
                docstore=KVDocumentStore(CatalogKVStore(store.catalog)),
                docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
            )
            if use_async:
                new = asyncio.run(pipeline.arun(documents=list(documents)))
            else:
                new = pipeline.run(documents=list(documents))
            texts = {n.get_content() for n in store.get_nodes()}
        assert texts == {d.text for d in documents}
        return len(list(new))

    one, two = Document(text="one", id_="1"), Document(text="two", id_="2")
    assert ingest(one, two) == 2
    assert ingest(one, two) == 0
    assert ingest(one, Document(text="two, changed", id_="2")) == 1
    assert ingest(one) == 0

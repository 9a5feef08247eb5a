"""The FAISS vector store: what LlamaIndex expects of one, and the faults of the stock ones."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_index.core import MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.schema import Document, IndexNode, NodeRelationship, NodeWithScore, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)

from compllm_rag.errors import ConfigurationError, EmbedderMismatchError
from compllm_rag.llamaindex.vector_store import FaissTextVectorStore
from tests.catalog.catalog_samples import DIM, axis, filled, find, node
from tests.processes import join


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FaissTextVectorStore:
    """An empty store, in memory and in a folder."""
    if request.param == "memory":
        return FaissTextVectorStore(dim=DIM)
    return FaissTextVectorStore.create(tmp_path / "s", DIM)


def where(key: str, value: Any, operator: FilterOperator = FilterOperator.EQ) -> MetadataFilter:
    return MetadataFilter(key=key, value=value, operator=operator)


def test_deleted_place_is_not_taken_again(store: FaissTextVectorStore) -> None:
    # FaissMapVectorStore numbers by ntotal: after a delete the next node takes the id of a living one, which is lost.
    store.add([node(f"n{i}", axis(i), doc=f"d{i}") for i in range(3)])
    store.delete("d0")
    store.add([node("new", axis(3))])
    assert find(store, axis(2)) == ["n2"]
    assert find(store, axis(3)) == ["new"]
    assert sorted(find(store, axis(0), 9)) == ["n1", "n2", "new"]


def test_ids_are_not_reused_after_reopening(tmp_path: Path) -> None:
    # The same collision would come back if the counter were the largest living id.
    with filled(tmp_path) as store:
        store.delete("d2")
    with FaissTextVectorStore.open(tmp_path) as store:
        store.add([node("late", axis(2))])
        with store.catalog.reading() as connection:
            assert connection.execute("SELECT id FROM nodes ORDER BY id").fetchall() == [(1,), (2,), (4,)]
            assert store.catalog.vectors().ids().tolist() == [1, 2, 4]


def test_delete_goes_by_document(store: FaissTextVectorStore) -> None:
    # FaissVectorStore.delete raises; FaissMapVectorStore.delete compares with node ids and removes nothing.
    store.add([node("a", axis(0), doc="one"), node("b", axis(1), doc="one"), node("c", axis(2), doc="two")])
    store.delete("one")
    assert find(store, axis(0), 5) == ["c"]
    assert [n.node_id for n in store.get_nodes()] == ["c"]
    store.delete("never there")
    assert store.n_nodes == 1


def test_node_without_document_is_its_own(store: FaissTextVectorStore) -> None:
    # A pipeline without splitter adds Documents themselves, and deletes them by their own id.
    store.add([node("whole", axis(0)), node("part", axis(1), doc="d")])
    store.delete("whole")
    assert find(store, axis(0), 5) == ["part"]


def test_vector_store_index_stands_on_it(store: FaissTextVectorStore) -> None:
    # FaissVectorStore has stores_text=False, so VectorStoreIndex.from_vector_store refuses it.
    embed = MockEmbedding(embed_dim=DIM)
    index = VectorStoreIndex.from_documents(
        [Document(text="Gulls nest here.", id_="gulls")],
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=embed,
    )
    again = VectorStoreIndex.from_vector_store(store, embed_model=embed)
    (hit,) = again.as_retriever(similarity_top_k=3).retrieve("gulls")
    assert (hit.node.get_content(), hit.node.ref_doc_id) == ("Gulls nest here.", "gulls")
    assert hit.node.embedding is None
    (hit,) = asyncio.run(again.as_retriever().aretrieve("gulls"))
    assert hit.node.ref_doc_id == "gulls"
    index.delete_ref_doc("gulls")
    assert again.as_retriever().retrieve("gulls") == []


def test_scores_are_similarities(store: FaissTextVectorStore) -> None:
    # FaissVectorStore hands L2 distances out as similarities: SimilarityPostprocessor then keeps the worst nodes.
    store.add([node("same", axis(0)), node("near", axis(0, 1.0)), node("far", axis(2)), node("anti", [-3.0, 0, 0, 0])])
    result = store.query(VectorStoreQuery(query_embedding=[5.0, 0, 0, 0], similarity_top_k=4))
    assert result.ids == ["same", "near", "far", "anti"]
    assert result.similarities == pytest.approx([1.0, 0.5**0.5, 0.0, -1.0], abs=1e-6)
    scored = [
        NodeWithScore(node=n, score=s) for n, s in zip(result.nodes or [], result.similarities or [], strict=True)
    ]
    kept = SimilarityPostprocessor(similarity_cutoff=0.5).postprocess_nodes(scored)
    assert [n.node.node_id for n in kept] == ["same", "near"]


@pytest.mark.parametrize("use_async", [False, True])
def test_pipeline_upserts_leave_nothing_stale(store: FaissTextVectorStore, use_async: bool) -> None:
    # With FaissVectorStore a changed document crashes the pipeline; with the map store its old vectors stay.
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(chunk_size=32, chunk_overlap=0), MockEmbedding(embed_dim=DIM)],
        vector_store=store,
        docstore=SimpleDocumentStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS,
    )

    def ingest(*documents: Document) -> None:
        if use_async:
            asyncio.run(pipeline.arun(documents=list(documents)))
        else:
            pipeline.run(documents=list(documents))

    other = Document(text="The museum keeps the lens.", id_="museum")
    ingest(Document(text="The lamp burns. " * 20, id_="lamp"), other)
    before = store.n_nodes
    ingest(Document(text="The lamp is dark.", id_="lamp"), other)
    texts = sorted(n.get_content() for n in store.get_nodes())
    assert before > 2
    assert texts == ["The lamp is dark.", "The museum keeps the lens."]
    assert len(find(store, [0.5] * DIM, 50)) == 2


def test_nodes_come_back_whole(store: FaissTextVectorStore) -> None:
    first = node("a", axis(0), doc="d", text="räum\x00 auf", title="T", tags=["x", "y"], year=1871, note=None)
    first.excluded_llm_metadata_keys = ["year"]
    first.relationships[NodeRelationship.NEXT] = node("b", axis(1)).as_related_node_info()
    first.start_char_idx, first.end_char_idx = 3, 9
    store.add([first])
    (back,) = store.query(VectorStoreQuery(query_embedding=axis(0))).nodes or []
    assert type(back) is TextNode
    assert back.model_dump(exclude={"embedding"}) == first.model_dump(exclude={"embedding"})
    assert back.hash == first.hash
    assert back.embedding is None


@pytest.mark.parametrize(
    "kept",
    [
        Document(text="whole", id_="doc", metadata={"a": 1}),
        IndexNode(text="see there", id_="idx", index_id="other"),
    ],
)
def test_other_kinds_keep_their_class(store: FaissTextVectorStore, kept: Document | IndexNode) -> None:
    kept = kept.model_copy(update={"embedding": axis(0)})
    store.add([kept])
    (back,) = store.get_nodes()
    assert type(back) is type(kept)
    assert back.get_content() == kept.get_content()
    assert back.node_id == kept.node_id


def test_add_replaces_a_node_of_the_same_id(store: FaissTextVectorStore) -> None:
    store.add([node("a", axis(0), doc="old"), node("b", axis(1))])
    assert store.add([node("a", axis(2), doc="new", text="first"), node("a", axis(3), doc="new", text="last")]) == [
        "a",
        "a",
    ]
    assert store.n_nodes == 2
    assert find(store, axis(3)) == ["a"]
    assert [n.get_content() for n in store.get_nodes(["a"])] == ["last"]
    assert find(store, axis(0), 5, doc_ids=["old"]) == []


def test_equal_texts_are_both_found(store: FaissTextVectorStore) -> None:
    # Content-addressed vector ids would merge these.
    store.add([node("a", axis(0), doc="one", text="same"), node("b", axis(0), doc="two", text="same")])
    store.add([node("c", axis(0), doc="two", text="same")])
    assert find(store, axis(0), 3) == ["a", "b", "c"]
    store.delete("one")
    assert find(store, axis(0), 3) == ["b", "c"]


def test_limits_by_node_and_document(store: FaissTextVectorStore) -> None:
    store.add([node(f"n{i}", axis(0, i / 10), doc=f"d{i % 2}") for i in range(6)])
    assert find(store, axis(0), 2, node_ids=["n4", "n5", "gone"]) == ["n4", "n5"]
    assert find(store, axis(0), 9, doc_ids=["d1"]) == ["n1", "n3", "n5"]
    assert find(store, axis(0), 9, doc_ids=["d1"], node_ids=["n0", "n3"]) == ["n3"]
    assert find(store, axis(0), 9, doc_ids=["gone"]) == []
    # An empty list of documents is somebody who may read nothing; an empty list of nodes is LlamaIndex's default.
    assert find(store, axis(0), 9, doc_ids=[]) == []
    assert len(find(store, axis(0), 9, node_ids=[])) == 6


def test_filters_look_as_far_as_they_must(store: FaissTextVectorStore) -> None:
    store.add([node(f"n{i:03}", axis(0, i / 1000), kind="rare" if i % 150 == 149 else "common") for i in range(600)])
    rare = MetadataFilters(filters=[where("kind", "rare")])
    assert find(store, axis(0), 2, filters=rare) == ["n149", "n299"]
    assert find(store, axis(0), 9, filters=rare) == ["n149", "n299", "n449", "n599"]
    assert find(store, axis(0), 1, filters=MetadataFilters(filters=[where("kind", "none")])) == []


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (where("year", 1871), "a"),
        (where("year", 1871, FilterOperator.NE), "bc"),
        (where("year", 1900, FilterOperator.GT), "b"),
        (where("year", 1950, FilterOperator.GTE), "b"),
        (where("year", 1900, FilterOperator.LT), "a"),
        (where("year", 1871, FilterOperator.LTE), "a"),
        (where("year", [1871, 1950], FilterOperator.IN), "ab"),
        (where("year", [1950], FilterOperator.NIN), "ac"),
        (where("tags", ["x", "z"], FilterOperator.ANY), "ab"),
        (where("tags", ["x", "y"], FilterOperator.ALL), "a"),
        (where("tags", "z", FilterOperator.CONTAINS), "b"),
        (where("title", "Light", FilterOperator.TEXT_MATCH), "a"),
        (where("title", "LIGHT", FilterOperator.TEXT_MATCH_INSENSITIVE), "ab"),
        (where("tags", None, FilterOperator.IS_EMPTY), "c"),
        (where("year", "1871", FilterOperator.GT), ""),  # a text is not more or less than a number
        (where("doc_id", "d"), "ab"),
        (
            MetadataFilters(filters=[where("year", 1871), where("title", "moonlight")], condition=FilterCondition.OR),
            "ab",
        ),
        (MetadataFilters(filters=[where("year", 1871), where("year", 1950)], condition=FilterCondition.NOT), "c"),
    ],
)
def test_filter_operators(store: FaissTextVectorStore, asked: MetadataFilter | MetadataFilters, expected: str) -> None:
    store.add(
        [
            node("a", axis(0), doc="d", year=1871, tags=["x", "y"], title="Lighthouse"),
            node("b", axis(1), doc="d", year=1950, tags=["z"], title="moonlight"),
            node("c", axis(2), tags=[]),
        ]
    )
    nested = MetadataFilters(filters=[asked])
    assert [n.node_id for n in store.get_nodes(filters=nested)] == list(expected)
    assert sorted(find(store, [1.0] * DIM, 9, filters=nested)) == list(expected)
    store.delete_nodes(filters=nested)
    assert sorted(n.node_id for n in store.get_nodes()) == sorted(set("abc") - set(expected))


@pytest.mark.parametrize(
    "asked", [where("year", "18", FilterOperator.IN), where("year", 18, FilterOperator.TEXT_MATCH)]
)
def test_senseless_filters_are_refused(store: FaissTextVectorStore, asked: MetadataFilter) -> None:
    store.add([node("a", axis(0), year=1871)])
    with pytest.raises(ConfigurationError, match="year"):
        find(store, axis(0), filters=MetadataFilters(filters=[asked]))


def test_get_and_delete_nodes(store: FaissTextVectorStore) -> None:
    store.add([node(f"n{i}", axis(i), doc="d", even=i % 2 == 0) for i in range(4)])
    assert [n.node_id for n in store.get_nodes(["n2", "n0", "gone"])] == ["n0", "n2"]
    assert store.get_nodes([]) == []
    assert store.node_ids("d") == ["n0", "n1", "n2", "n3"]
    store.delete_nodes(["n0", "n1"], MetadataFilters(filters=[where("even", 1)]))
    assert store.node_ids("d") == ["n1", "n2", "n3"]
    store.delete_nodes([])
    assert [n.node_id for n in store.iter_nodes(page=2)] == ["n1", "n2", "n3"]
    with pytest.raises(ConfigurationError, match="clear"):
        store.delete_nodes()
    assert (store.n_nodes, store.n_documents) == (3, 1)


def test_clear(store: FaissTextVectorStore) -> None:
    store.add([node("a", axis(0))])
    store.commit()
    store.clear()
    assert (find(store, axis(0)), store.get_nodes(), store.n_nodes) == ([], [], 0)
    store.add([node("b", axis(0))])
    store.commit()
    assert find(store, axis(0), 3) == ["b"]


def test_wrong_dimensions_name_both(store: FaissTextVectorStore) -> None:
    with pytest.raises(EmbedderMismatchError, match=r"'a'.*got 3 dimensions.*expected 4 dimensions"):
        store.add([node("ok", axis(0)), node("a", [1.0, 0, 0])])
    assert store.n_nodes == 0
    store.add([node("ok", axis(0))])
    with pytest.raises(EmbedderMismatchError, match=r"query.*got 5 dimensions.*expected 4 dimensions"):
        find(store, [1.0] * 5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_vectors_without_direction_are_refused(store: FaissTextVectorStore, bad: float) -> None:
    store.add([node("ok", axis(0))])
    for vector in ([bad, 0, 0, 0], [0.0] * DIM):
        with pytest.raises(ConfigurationError, match="'x'"):
            store.add([node("x", vector)])
        with pytest.raises(ConfigurationError, match="query"):
            find(store, vector)
    assert find(store, axis(0), 3) == ["ok"]


def test_extreme_lengths_do_not_matter(store: FaissTextVectorStore) -> None:
    store.add([node("huge", [1e300, 0, 0, 0]), node("tiny", [0, 1e-300, 0, 0])])
    result = store.query(VectorStoreQuery(query_embedding=[0, 1e200, 0, 0], similarity_top_k=2))
    assert result.ids == ["tiny", "huge"]
    assert result.similarities == pytest.approx([1.0, 0.0])


def test_refused_nodes_leave_the_rest_alone(store: FaissTextVectorStore) -> None:
    bare = TextNode(id_="bare", text="no vector")
    with pytest.raises(ConfigurationError, match="no embedding"):
        store.add([node("a", axis(0)), bare])
    for value in (torch.zeros(2), np.zeros(2), object()):
        with pytest.raises(ConfigurationError, match="JSON"):
            store.add([node("a", axis(0)), node("b", axis(1), concepts=value)])
    assert (store.n_nodes, store.catalog.pending) == (0, False)


@pytest.mark.parametrize("mode", [VectorStoreQueryMode.HYBRID, VectorStoreQueryMode.SPARSE])
def test_other_query_modes_are_refused(store: FaissTextVectorStore, mode: VectorStoreQueryMode) -> None:
    store.add([node("a", axis(0))])
    with pytest.raises(ConfigurationError, match=mode.value):
        find(store, axis(0), mode=mode)


def test_senseless_queries_are_refused(store: FaissTextVectorStore) -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        find(store, axis(0), 0)
    with pytest.raises(ConfigurationError, match="embedding"):
        store.query(VectorStoreQuery(query_str="words only"))
    assert find(store, axis(0), 3) == []  # an empty store has no answer, and no error


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "nul\x00inside", "x" * 10_000, "", "ünï ©ode 🗼", "'; --"])
def test_strange_ids_round_trip(store: FaissTextVectorStore, name: str, tmp_path: Path) -> None:
    store.add([node(name, axis(0), doc=name), node("nul", axis(1), doc="nul")])
    store.commit()
    assert find(store, axis(0)) == [name]
    assert store.node_ids(name) == [name]
    assert {p.name for p in tmp_path.iterdir()} <= {"s"}
    store.delete(name)
    assert find(store, axis(0), 3) == ["nul"]


def test_half_characters_are_replaced_in_text_and_refused_in_ids(store: FaissTextVectorStore) -> None:
    for bad in (node("bad\ud800", axis(0)), node("a", axis(0), doc="bad\ud800")):
        with pytest.raises(ConfigurationError, match="half a character"):
            store.add([bad])
    assert store.n_nodes == 0
    assert store.node_ids("bad\ud800") == []  # what cannot be there is not there
    store.add([node("a", axis(0), text="bad\ud800", title="x\udfff", pair="\ud835\udc65")])
    (kept,) = store.get_nodes()
    assert (kept.text, kept.metadata["title"], kept.metadata["pair"]) == ("bad\ufffd", "x\ufffd", "\U0001d465")


def test_async_twins(store: FaissTextVectorStore) -> None:
    async def all_of_them() -> None:
        assert await store.async_add([node("a", axis(0), doc="d"), node("b", axis(1)), node("c", axis(2))]) == list(
            "abc"
        )
        result = await store.aquery(VectorStoreQuery(query_embedding=axis(1)))
        assert result.ids == ["b"]
        await store.adelete("d")
        await store.adelete_nodes(["b"])
        assert [n.node_id for n in await store.aget_nodes()] == ["c"]
        await store.aclear()
        assert await store.aget_nodes() == []

    asyncio.run(all_of_them())


def test_threads_share_one_store(store: FaissTextVectorStore) -> None:
    faults: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(20):
                store.add([node(f"{number}-{step}", axis(number, step / 100), doc=f"{number}")])
                assert find(store, axis(number, step / 100), 1, doc_ids=[str(number)]) == [f"{number}-{step}"]
                if step % 5 == 4:
                    store.commit()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    join(threads)
    assert faults == []
    assert store.n_nodes == 80


def test_in_memory_store_commits_and_rolls_back() -> None:
    store = FaissTextVectorStore(dim=DIM)
    store.add([node("a", axis(0))])
    store.commit()
    store.delete("a")
    store.add([node("b", axis(1))])
    store.rollback()
    assert find(store, axis(0), 5) == ["a"]
    with pytest.raises(ConfigurationError, match="memory"):
        store.persist("anywhere")


@pytest.mark.parametrize("dim", [0, -1, 2**40])
def test_senseless_dimensions(dim: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="dimensions"):
        FaissTextVectorStore(dim=dim)
    with pytest.raises(ConfigurationError, match="dimensions"):
        FaissTextVectorStore.create(tmp_path / "s", dim)
    assert not (tmp_path / "s").exists()


def test_storage_context_persist_commits(tmp_path: Path) -> None:
    # FaissVectorStore.persist wants an index path of its own; ours commits, and writes nowhere else.
    store = FaissTextVectorStore.create(tmp_path / "s", DIM)
    index = VectorStoreIndex.from_documents(
        [Document(text="Gulls nest here.")],
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=MockEmbedding(embed_dim=DIM),
    )
    index.storage_context.persist(persist_dir=tmp_path / "elsewhere")
    store.close()
    assert not list((tmp_path / "elsewhere").glob("default__*"))
    with FaissTextVectorStore.open(tmp_path / "s", read_only=True) as again:
        assert (again.n_nodes, again.dim) == (1, DIM)

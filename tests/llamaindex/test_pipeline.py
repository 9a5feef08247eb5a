"""IngestionPipeline with our transform, vector store and docstore: every strategy leaves a storage that is whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from llama_index.core import Document
from llama_index.core.ingestion import DocstoreStrategy, IngestionCache, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.storage.docstore.keyval_docstore import KVDocumentStore

from compllm_rag import Compressor, ConceptIndex, ConceptTransform
from compllm_rag.llamaindex.kvstore import CatalogKVStore
from tests.faults.fault_samples import check_whole, create, documents, load, sound, texts

S = DocstoreStrategy


def pipeline(index: ConceptIndex, strategy: DocstoreStrategy, **options) -> IngestionPipeline:
    """As a user would build it from the parts of an index."""
    steps = options.pop("steps", [index.parser, ConceptTransform(index.library), index.embedder])
    return IngestionPipeline(
        transformations=steps,
        vector_store=index.faiss,
        docstore=options.pop("docstore", index.docstore),
        docstore_strategy=strategy,
        **options,
    )


def said(docs: list[Document]) -> dict[str, str]:
    return {document.id_: document.text for document in docs}


@pytest.mark.parametrize("strategy", [S.UPSERTS, S.UPSERTS_AND_DELETE])
def test_upserts(tmp_path: Path, compressor: Compressor, strategy: DocstoreStrategy) -> None:
    path, docs = tmp_path / "s", documents()
    with create(path, compressor) as index:
        made = pipeline(index, strategy)
        with index.bulk():
            assert made.run(documents=docs)
        check_whole(index)
        before = {node.node_id for node in index.faiss.iter_nodes()}
        assert made.run(documents=docs) == []
        changed = [*docs[:2], *documents(version=1)[2:3], *docs[3:5]]
        with index.bulk():
            nodes = made.run(documents=changed)
        assert {node.ref_doc_id for node in nodes} == {"d2"}
        transform = made.transformations[1]
        assert isinstance(transform, ConceptTransform)
        assert 1 <= transform.last_report.compressed <= 3
        expected = said(changed) | ({} if strategy is S.UPSERTS_AND_DELETE else said(docs[5:]))
        assert texts(index) == expected
        assert {node.node_id for node in index.faiss.iter_nodes()} & before
        check_whole(index)
        assert set(index.docstore.get_all_ref_doc_info() or {}) <= set(expected)
    sound(path)
    with load(path, compressor) as index:  # and another process goes on where this one was
        assert pipeline(index, strategy).run(documents=changed) == []
        assert texts(index) == expected
        found = index.as_query_engine().query("Who built the lighthouse on Gull Rock?")
        assert found.metadata["compllm"]["store"]["misses"] == 0
    sound(path)


def test_duplicates_only(tmp_path: Path, compressor: Compressor) -> None:
    docs = documents()
    with create(tmp_path / "s", compressor) as index:
        made = pipeline(index, S.DUPLICATES_ONLY)
        with index.bulk():
            made.run(documents=docs)
            assert made.run(documents=[*docs, *documents(7)[6:]])
            assert made.run(documents=docs) == []
        assert texts(index) == said(documents(7))
        check_whole(index)
    sound(tmp_path / "s")


async def test_async(tmp_path: Path, compressor: Compressor) -> None:
    docs = documents()
    with create(tmp_path / "s", compressor) as index:
        made = pipeline(index, S.UPSERTS_AND_DELETE)
        with index.bulk():
            await made.arun(documents=docs)
            await made.arun(documents=documents(4, version=1))
        assert texts(index) == said(documents(4, version=1))
        check_whole(index)
    sound(tmp_path / "s")


def test_a_pipeline_and_the_index_agree_on_what_changed(tmp_path: Path, compressor: Compressor) -> None:
    docs = documents()
    with create(tmp_path / "s", compressor) as index:
        index.ingest(docs)
        made = pipeline(index, S.UPSERTS)
        assert made.run(documents=docs) == []
        with index.bulk():
            made.run(documents=documents(2, version=1))
        report = index.ingest([*documents(2, version=1), *docs[2:]])
        assert (report.documents_changed, report.segments_compressed) == (0, 0)
        index.delete_ref_doc("d0")
        with index.bulk():
            assert {node.ref_doc_id for node in made.run(documents=documents(1))} == {"d0"}
        assert texts(index) == said([docs[0], *documents(2, version=1)[1:], *docs[2:]])
        check_whole(index)
    sound(tmp_path / "s")


def test_a_pipeline_that_compresses_nothing_leaves_it_to_the_queue(tmp_path: Path, compressor: Compressor) -> None:
    with create(tmp_path / "s", compressor) as index:
        made = pipeline(index, S.UPSERTS, steps=[index.parser, index.embedder])
        with index.bulk():
            made.run(documents=documents())
        assert len(index.pending) == index.faiss.n_nodes
        answer = index.as_query_engine().query("Who built it?")
        assert {node["used"] for node in answer.metadata["compllm"]["nodes"].values()} == {"text"}
    assert sound(tmp_path / "s").segments_awaiting > 0
    with load(tmp_path / "s", compressor) as index:
        assert index.uploads.wait(60)
        check_whole(index)


def test_stock_parts_around_ours(tmp_path: Path, compressor: Compressor) -> None:
    """A splitter of LlamaIndex, its cache, and a docstore of the user's own over our key-value store."""
    with create(tmp_path / "s", compressor) as index:
        docstore = KVDocumentStore(CatalogKVStore(index.faiss.catalog), namespace="own")
        steps = [SentenceSplitter(chunk_size=60, chunk_overlap=0), ConceptTransform(index.library), index.embedder]
        made = pipeline(index, S.UPSERTS, steps=steps, docstore=docstore, cache=IngestionCache())
        for version in (0, 1, 0):
            with index.bulk():
                made.run(documents=documents(version=version))
            assert {node.ref_doc_id for node in index.faiss.iter_nodes()} == {f"d{i}" for i in range(6)}
            assert all(f"version {version}" in text for text in texts(index).values())
            check_whole(index)
    sound(tmp_path / "s")


def test_a_pipeline_that_fails_leaves_what_was_there(tmp_path: Path, compressor: Compressor) -> None:
    class Broken(ConceptTransform):
        def __call__(self, nodes, **kwargs):  # noqa: ANN204
            raise RuntimeError("not today")

    with create(tmp_path / "s", compressor) as index:
        index.ingest(documents())
        before = texts(index)
        made = pipeline(index, S.UPSERTS_AND_DELETE, steps=[index.parser, Broken(index.library), index.embedder])
        with pytest.raises(RuntimeError, match="not today"), index.bulk():
            made.run(documents=documents(2, version=1))
        assert texts(index) == before
        assert pipeline(index, S.UPSERTS).run(documents=documents()) == []
        check_whole(index)
    sound(tmp_path / "s")

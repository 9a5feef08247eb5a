"""ConceptIndex: ingestion, updates, storage, and what it refuses."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from llama_index.core import Document
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores import MetadataFilter, MetadataFilters
from typer.testing import CliRunner

import toy
from compllm_rag import Compressor, CompressorConfig, ConceptIndex, load_documents
from compllm_rag.catalog.generations import GenerationFiles
from compllm_rag.cli.main import app
from compllm_rag.errors import (
    ConfigurationError,
    EmbedderMismatchError,
    EmptyCorpusError,
    FingerprintMismatchError,
    RateOutOfReachError,
    StorageMismatchError,
    StorageNotFoundError,
    StoreLockedError,
    StoreReadOnlyError,
)
from compllm_rag.llamaindex import storage_parts
from tests.processes import said, started, tell
from toy_embedder import HashEmbedder, save_sentence_transformer

PARAGRAPHS = toy.TEXT.split("\n\n")


def documents(n: int = 3) -> list[Document]:
    return [
        Document(id_=f"d{i}", text=f"{PARAGRAPHS[i % 3]} Copy {i}.", metadata={"title": f"T{i}", "kind": i % 2})
        for i in range(n)
    ]


def open_index(path: Path | None, compressor: Compressor, **options) -> ConceptIndex:
    return ConceptIndex.create(path, compressor=compressor, embedder=HashEmbedder(), chunk_size=60, **options)


def counted(index: ConceptIndex) -> tuple[int, int, int, int]:
    """Counts taken from the nodes themselves."""
    passages = [index.library.passage(node.text) for node in index.faiss.iter_nodes()]
    sums = (sum(len(p.keys) for p in passages), sum(len(p.ids) for p in passages))
    return (len(passages), *sums, sum(sum(p.n_concepts) for p in passages))


def check_counts(index: ConceptIndex) -> None:
    stats = index.stats()
    assert tuple(stats[k] for k in ("chunks", "segments", "source_tokens", "concepts")) == counted(index)


def test_a_storage_answers_after_it_is_opened_again(tmp_path: Path, compressor: Compressor) -> None:
    question = "Who built the lighthouse on Gull Rock?"
    with open_index(tmp_path / "s", compressor) as index:
        index.ingest(documents())
        before = index.as_query_engine(similarity_top_k=2).query(question)
        stats = index.stats()
        check_counts(index)
    with ConceptIndex.load(tmp_path / "s", compressor=compressor, embedder=HashEmbedder(), read_only=True) as index:
        after = index.as_query_engine(similarity_top_k=2).query(question)
        assert index.stats() == stats
    assert str(before) == str(after)
    assert [n.node.node_id for n in before.source_nodes] == [n.node.node_id for n in after.source_nodes]
    assert before.source_nodes[0].node.ref_doc_id == "d0"
    assert after.metadata["compllm"]["store"]["misses"] == 0
    assert stats["documents"] == 3
    assert 1.8 < stats["achieved_rate"] <= 2


def test_only_what_changed_is_done_again(tmp_path: Path, compressor: Compressor) -> None:
    docs = documents(6)
    with open_index(tmp_path / "s", compressor) as index:
        first = index.ingest(docs)
        assert (first.documents, first.documents_changed) == (6, 6)
        ids = {d.id_: index.faiss.node_ids(d.id_) for d in docs}
        again = index.ingest(docs)
        assert (again.documents_changed, again.segments_compressed) == (0, 0)
        assert again.segments_reused == again.segments == first.segments
        docs[4] = Document(id_="d4", text=docs[4].text + " It was painted white in 1902.", metadata=docs[4].metadata)
        changed = index.ingest(docs)
        assert changed.documents_changed == 1
        assert 1 <= changed.segments_compressed <= 3
        for key in ids.keys() - {"d4"}:
            assert index.faiss.node_ids(key) == ids[key]
        assert len(set(index.faiss.node_ids("d4")) - set(ids["d4"])) == 1
        check_counts(index)


def test_an_ingest_counts_every_segment_once(tmp_path: Path, compressor: Compressor) -> None:
    docs = documents(4)
    with open_index(tmp_path / "s", compressor) as index:
        first = index.ingest(docs)
        assert index.metrics.work.segments == first.segments_compressed
        assert index.metrics.snapshot()["segments_reused"] == first.segments_reused
        docs[2] = Document(id_="d2", text=docs[2].text + " It was painted white in 1902.", metadata=docs[2].metadata)
        again = index.ingest(docs)
        passages = [index.library.passage(node.text) for node in index.faiss.get_nodes(index.faiss.node_ids("d2"))]
        reused = sum(len(passage.keys) for passage in passages) - again.segments_compressed
        assert index.metrics.snapshot()["segments_reused"] == first.segments_reused + reused


def test_a_storage_that_is_opened_again_reads_its_vectors_once(
    tmp_path: Path, compressor: Compressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_index(tmp_path / "s", compressor) as index:
        index.ingest(documents())
    loads = []
    load = GenerationFiles.load
    monkeypatch.setattr(GenerationFiles, "load", lambda self, state: loads.append(state) or load(self, state))
    with open_index(tmp_path / "s", compressor) as index:
        index.as_retriever().retrieve("Who built the lighthouse?")
    assert len(loads) == 1


@pytest.mark.parametrize(
    "option",
    [
        {"llm": "another"},
        {"response_mode": "tree_summarize"},
        {"similarty_top_k": 2},
        {"structured_answer_filtering": True},
    ],
)
def test_an_option_of_a_query_engine_that_nothing_heeds_is_refused(
    compressor: Compressor, option: dict[str, object]
) -> None:
    index = open_index(None, compressor)
    with pytest.raises(ConfigurationError, match=next(iter(option))):
        index.as_query_engine(**option)
    made = index.as_synthesizer(mode="text")
    with pytest.raises(ConfigurationError, match="response_synthesizer"):
        index.as_query_engine(response_synthesizer=made, mode="concepts")


@pytest.mark.parametrize("codec", ["deep", "input"])
def test_a_compressor_is_loaded_on_the_first_miss(
    tmp_path: Path, toy_folder: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    options = {"llm": str(toy_folder), "embedder": HashEmbedder(), "reader": None, "compressor": None, "codec": codec}
    with ConceptIndex.create(tmp_path / "s", chunk_size=60, **options) as index:
        index.ingest(documents())
    loaded = []
    load = storage_parts.load_compressor
    monkeypatch.setattr(storage_parts, "load_compressor", lambda *args: loaded.append(args) or load(*args))
    with ConceptIndex.load(tmp_path / "s", embedder=HashEmbedder()) as index:
        answer = index.as_query_engine().query("Who built the lighthouse?")
        assert answer.metadata["compllm"]["store"]["misses"] == 0
        assert index.ingest(documents()).documents_changed == 0
        assert not loaded
        index.insert(Document(id_="new", text="A tower of brick stands in the marsh.", metadata={"title": "N"}))
        assert len(loaded) == 1
        assert index.compressor.fingerprint == index.library.spec.fingerprint
    assert len(loaded) == 1


@pytest.mark.parametrize("codec", ["deep", "input"])
def test_a_compressor_that_was_changed_after_the_opening_makes_nothing(
    tmp_path: Path, toy_folder: Path, codec: str
) -> None:
    options = {"llm": str(toy_folder), "embedder": HashEmbedder(), "reader": None, "compressor": None, "codec": codec}
    with ConceptIndex.create(tmp_path / "s", chunk_size=60, **options) as index:
        index.ingest(documents())
    with ConceptIndex.load(tmp_path / "s", embedder=HashEmbedder()) as index:
        other = Compressor(index.library.llm, CompressorConfig(segment_length=12))
        other.save_pretrained(tmp_path / "s" / "compressor")
        with pytest.raises(FingerprintMismatchError, match="changed since"):
            index.insert(Document(id_="new", text="A tower of brick stands in the marsh."))
        assert index.faiss.node_ids("new") == []


def test_documents_of_the_cli_and_of_the_library_are_the_same(
    tmp_path: Path, toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "rock.md").write_text(f"# Rock\n\n{PARAGRAPHS[0]}", encoding="utf-8")
    (corpus / "row.jsonl").write_text('{"id": "r", "title": "Row", "text": "They rowed out."}\n', encoding="utf-8")
    embedder = save_sentence_transformer(tmp_path / "embedder", toy.TEXT)
    words = ["ingest", str(corpus), "--storage", str(tmp_path / "s"), "--llm", str(toy_folder)]
    made = CliRunner().invoke(app, [*words, "--embedder", str(embedder), "--json"])
    assert made.exit_code == 0, made.output
    with ConceptIndex.create(tmp_path / "s") as index:
        report = index.ingest(load_documents([corpus]))
        assert (report.documents, report.documents_changed, index.stats()["documents"]) == (2, 0, 2)


def test_insert_delete_refresh(tmp_path: Path, compressor: Compressor) -> None:
    docs = documents()
    with open_index(tmp_path / "s", compressor) as index:
        index.ingest(docs)
        assert index.refresh_ref_docs(docs) == [False, False, False]
        index.delete_ref_doc("d1", delete_from_docstore=True)
        assert index.faiss.node_ids("d1") == []
        check_counts(index)
        assert index.stats()["documents"] == 2
        assert index.refresh_ref_docs(docs) == [False, True, False]
        changed = Document(id_="d1", text="Something else entirely.", metadata={"title": "T1"})
        index.update_ref_doc(changed)
        assert [n.text for n in index.faiss.get_nodes(index.faiss.node_ids("d1"))] == ["Something else entirely."]
        index.insert(changed)
        assert len(index.faiss.node_ids("d1")) == 1
        index.insert_nodes([TextNode(id_="own", text="A node that somebody made. It has no document.")])
        index.delete_nodes(["own"])
        check_counts(index)
        assert index.stats()["documents"] == 3


async def test_async_twins(compressor: Compressor) -> None:
    index = open_index(None, compressor)
    docs = documents()
    await index.ainsert(docs[0])
    assert await index.arefresh_ref_docs(docs) == [False, True, True]
    await index.adelete_ref_doc("d1")
    await index.ainsert_nodes([TextNode(id_="own", text="A node that somebody made.")])
    await index.adelete_nodes(["own"])
    answer, streamed = await asyncio.gather(
        index.as_query_engine().aquery("Who built it?"), index.as_query_engine(streaming=True).aquery("Who built it?")
    )
    assert "".join([piece async for piece in streamed.async_response_gen()]) == str(answer)
    check_counts(index)
    index.close()


def test_metadata_filters(compressor: Compressor) -> None:
    index = open_index(None, compressor)
    index.ingest(documents(6))
    only = MetadataFilters(filters=[MetadataFilter(key="kind", value=1)])
    found = index.as_retriever(similarity_top_k=20, filters=only).retrieve("the lamp")
    assert {n.node.ref_doc_id for n in found} == {"d1", "d3", "d5"}


def test_identical_texts_in_two_documents_are_both_found_and_stored_once(compressor: Compressor) -> None:
    index = open_index(None, compressor)
    index.ingest([Document(id_=name, text=PARAGRAPHS[0]) for name in ("a", "b")])
    assert {n.node.ref_doc_id for n in index.as_retriever(similarity_top_k=9).retrieve("lighthouse")} == {"a", "b"}
    stats = index.stats()
    assert stats["segments"] == 2 * stats["unique_segments"]


def test_an_interrupted_ingest_keeps_its_work_and_completes(
    tmp_path: Path, compressor: Compressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compllm_rag.llamaindex.ingest._BATCH_CHARS", 400)
    docs = documents(9)

    def interrupt(report) -> None:
        if report.documents >= 4:
            raise KeyboardInterrupt

    with open_index(tmp_path / "s", compressor) as index:
        with pytest.raises(KeyboardInterrupt):
            index.ingest(docs, progress=interrupt)
        assert index.stats()["documents"] == 0
    with open_index(tmp_path / "s", compressor) as index:
        report = index.ingest(docs)
        assert report.segments_reused > 0
        assert index.stats()["documents"] == 9
        check_counts(index)
    with open_index(tmp_path / "t", compressor) as fresh:
        fresh.ingest(docs)
        whole = {node.node_id for node in fresh.faiss.iter_nodes()}
    with open_index(tmp_path / "s", compressor) as index:
        assert {node.node_id for node in index.faiss.iter_nodes()} == whole


_KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
import toy
from compllm_rag import Compressor
from compllm_rag.llamaindex import ingest
from llamaindex.test_index import documents, open_index
ingest._BATCH_CHARS, ingest._COMMIT_EVERY_S = 400, 0.0
def kill(report):
    if report.documents >= 5:
        os.kill(os.getpid(), signal.SIGKILL)
open_index(Path(sys.argv[1]), Compressor(toy.llm())).ingest(documents(9), progress=kill)
"""


def test_a_killed_ingest_leaves_whole_documents_and_completes(tmp_path: Path, compressor: Compressor) -> None:
    tests = Path(__file__).parents[1]
    script = _KILLED.format(tests=str(tests), root=str(tests.parent))
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "s")], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    with open_index(tmp_path / "s", compressor) as index:
        partial = index.stats()["documents"]
        assert 0 < partial < 9
        check_counts(index)
        index.ingest(documents(9))
        assert index.stats()["documents"] == 9
        check_counts(index)


def test_an_id_that_comes_twice_is_a_change(compressor: Compressor) -> None:
    index = open_index(None, compressor)
    texts = ["The first of two.", "The second of two."]
    report = index.ingest([Document(id_="d", text=text) for text in texts])
    assert [node.text for node in index.faiss.iter_nodes()] == texts[1:]
    assert (report.documents, report.documents_changed, index.stats()["documents"]) == (2, 2, 1)
    check_counts(index)
    assert index.ingest([Document(id_="d", text=texts[1])]).documents_changed == 0


def test_a_document_may_become_empty(compressor: Compressor) -> None:
    index = open_index(None, compressor)
    index.ingest(documents())
    index.ingest([Document(id_="d1", text="")])
    assert index.faiss.node_ids("d1") == []
    assert index.stats()["documents"] == 2
    check_counts(index)
    assert index.ingest([Document(id_="d1", text="")]).documents_changed == 0


_READER = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import toy
from compllm_rag import Compressor, ConceptIndex
from toy_embedder import HashEmbedder, save_sentence_transformer
index = ConceptIndex.load(sys.argv[1], compressor=Compressor(toy.llm()), embedder=HashEmbedder(), read_only=True)
for line in sys.stdin:
    found = index.as_query_engine(similarity_top_k=1).query(line.strip())
    print(found.source_nodes[0].node.ref_doc_id, found.metadata["compllm"]["store"]["misses"], flush=True)
"""


def test_a_reader_in_another_process_sees_each_commit(tmp_path: Path, compressor: Compressor) -> None:
    tests = Path(__file__).parents[1]
    script = _READER.format(tests=str(tests), root=str(tests.parent))
    with (
        open_index(tmp_path / "s", compressor) as index,
        started([sys.executable, "-c", script, str(tmp_path / "s")]) as reader,
    ):
        index.ingest(documents())

        def ask() -> str:
            tell(reader, "late otters in the harbour")
            return said(reader)

        assert ask() != "late 0"
        with index.bulk():
            index.insert(Document(id_="late", text="late otters in the harbour"))
            assert ask() != "late 0"
        assert ask() == "late 0"
        index.delete_ref_doc("late")
        assert ask() != "late 0"
        reader.stdin.close()
        assert reader.wait(60) == 0


def test_a_reader_writes_nothing(tmp_path: Path, compressor: Compressor) -> None:
    with open_index(tmp_path / "s", compressor) as index:
        index.ingest(documents())
    with ConceptIndex.load(tmp_path / "s", compressor=compressor, embedder=HashEmbedder(), read_only=True) as index:
        before = index.stats()
        for write in (
            lambda: index.insert(Document(id_="x", text="A new text that nobody has seen.")),
            lambda: index.delete_ref_doc("d0"),
            lambda: index.ingest([Document(id_="x", text="A new text that nobody has seen.")]),
        ):
            with pytest.raises(StoreReadOnlyError):
                write()
        assert index.stats() == before
        assert index.as_query_engine().query("Who built it?").source_nodes


def test_two_handles_in_one_process(tmp_path: Path, compressor: Compressor) -> None:
    first = ConceptIndex.from_documents(
        documents(), storage_dir=tmp_path / "s", compressor=compressor, embedder=HashEmbedder(), chunk_size=60
    )
    second = ConceptIndex.load(tmp_path / "s", compressor=compressor, embedder=HashEmbedder())
    assert second.stats() == first.stats()
    first.insert(Document(id_="late", text="A late document about otters."))
    assert second.as_retriever(similarity_top_k=1).retrieve("late otters")[0].node.ref_doc_id == "late"
    with first.bulk():
        first.insert(Document(id_="later", text="Held back."))
        with pytest.raises(StoreLockedError):
            second.insert(Document(id_="no", text="Not now."))
    first.close()
    second.close()


def test_what_it_refuses(tmp_path: Path, compressor: Compressor) -> None:
    with pytest.raises(StorageNotFoundError, match="nowhere"):
        ConceptIndex.load(tmp_path / "nowhere", compressor=compressor, embedder=HashEmbedder())
    with open_index(tmp_path / "s", compressor) as index:
        with pytest.raises(EmptyCorpusError):
            index.ingest([])
        index.ingest(documents())
    other = Compressor(toy.llm(seed=1))
    with pytest.raises(FingerprintMismatchError) as caught:
        open_index(tmp_path / "s", other)
    assert other.fingerprint[:16] in str(caught.value)
    assert compressor.fingerprint[:16] in str(caught.value)
    with pytest.raises(FingerprintMismatchError):
        open_index(tmp_path / "s", Compressor(toy.llm(), CompressorConfig(layers=1)))
    with pytest.raises(EmbedderMismatchError, match="64 dimensions"):
        ConceptIndex.create(tmp_path / "s", compressor=compressor, embedder=HashEmbedder(dim=32))
    with pytest.raises(StorageMismatchError, match="rate"):
        open_index(tmp_path / "s", compressor, rate=4.0)
    with pytest.raises(RateOutOfReachError):
        open_index(tmp_path / "u", compressor, rate=9.0)
    for setting in ({"rate": 0.5}, {"rate": float("nan")}, {"namespace": ""}):
        with pytest.raises(ConfigurationError, match=f"^{next(iter(setting))} makes no sense"):
            open_index(tmp_path / "u", compressor, **setting)
    with pytest.raises(ConfigurationError, match="chunk size makes no sense: got 3"):
        ConceptIndex.create(tmp_path / "u", compressor=compressor, embedder=HashEmbedder(), chunk_size=3)
    assert not (tmp_path / "u" / "catalog.db").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="not a folder"):
        open_index(tmp_path / "file", compressor)


def test_an_interrupted_making_is_taken_up(tmp_path: Path, compressor: Compressor) -> None:
    from compllm_rag import FaissTextVectorStore

    FaissTextVectorStore.create(tmp_path / "s", 64).close()
    with open_index(tmp_path / "s", compressor) as index:
        index.ingest(documents())
        assert index.stats()["documents"] == 3


def test_other_splitters_and_namespaces(compressor: Compressor) -> None:
    ours = open_index(None, compressor, namespace="a")
    theirs = open_index(None, compressor, namespace="b")
    for index in (ours, theirs):
        index.ingest(documents(1))
    keys = [index.library.passage(PARAGRAPHS[0]).keys for index in (ours, theirs)]
    assert not set(keys[0]) & set(keys[1])

"""Pruning by origin, and the reference counts that say which concepts are dead."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from llama_index.core import Document
from llama_index.core.schema import TextNode

import toy
from compllm_rag import Compressor, ConceptIndex
from compllm_rag.errors import ConfigurationError, EmptyCorpusError, PruneRefusedError
from compllm_rag.llamaindex.documents import load_documents
from toy_embedder import HashEmbedder

PARAGRAPHS = toy.TEXT.split("\n\n")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two files in a folder, one below, and two lines of JSON."""
    folder = tmp_path / "docs"
    (folder / "deep").mkdir(parents=True)
    for name, text in zip(("a.md", "b.txt", "deep/c.txt"), PARAGRAPHS, strict=True):
        (folder / name).write_text(text)
    lines = [{"id": name, "title": name, "text": f"Line {name} stands alone. {PARAGRAPHS[0]}"} for name in ("x", "y")]
    (folder / "more.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def index(tmp_path: Path, compressor: Compressor):
    """An empty index."""
    with ConceptIndex.create(tmp_path / "s", compressor=compressor, embedder=HashEmbedder(), chunk_size=60) as made:
        yield made


def ingest(index: ConceptIndex, *paths: Path, prune: bool = False):
    report = index.ingest(load_documents(paths), within=paths, prune=prune)
    check_references(index)
    return report


def held(index: ConceptIndex) -> set[str]:
    return {node.ref_doc_id or "" for node in index.faiss.iter_nodes()}


def check_references(index: ConceptIndex) -> None:
    """The counts are those that the nodes themselves give."""
    counted = Counter(key for node in index.faiss.iter_nodes() for key in index.library.passage(node.text).keys)
    with index.faiss.catalog.reading() as connection:
        rows = {bytes(key).hex(): n for key, n in connection.execute("SELECT key, n FROM refs")}
    assert rows == counted


def test_documents_whose_files_are_gone_or_empty_are_pruned(index: ConceptIndex, corpus: Path) -> None:
    assert ingest(index, corpus).documents_deleted == 0
    assert held(index) == {"a.md", "b.txt", "deep/c.txt", "x", "y"}
    (corpus / "b.txt").unlink()
    (corpus / "deep" / "c.txt").write_text("  \n")
    (corpus / "more.jsonl").write_text((corpus / "more.jsonl").read_text().splitlines()[1])
    assert ingest(index, corpus).documents_deleted == 0  # only when asked
    assert len(held(index)) == 5
    report = ingest(index, corpus, prune=True)
    assert (report.documents, report.documents_deleted, report.segments_compressed) == (2, 3, 0)
    assert held(index) == {"a.md", "y"}
    assert index.stats()["documents"] == 2
    assert ingest(index, corpus, prune=True).documents_deleted == 0
    (corpus / "b.txt").write_text(PARAGRAPHS[1])
    assert ingest(index, corpus, prune=True).segments_compressed == 0  # its concepts are dead, and still there
    assert held(index) == {"a.md", "b.txt", "y"}


def test_nothing_beyond_the_paths_given_is_pruned(index: ConceptIndex, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "docs-other"  # a name that begins alike
    other.mkdir()
    (other / "o.txt").write_text("Another folder. " + PARAGRAPHS[2])
    ingest(index, corpus, other)
    index.ingest([Document(id_="mine", text="Made by hand.", metadata={"source": str(corpus / "never.txt")})])
    index.insert_nodes([TextNode(id_="own", text="A node that somebody made.")])
    (other / "o.txt").unlink()
    (corpus / "a.md").unlink()
    (corpus / "deep" / "c.txt").unlink()
    (corpus / "deep").rmdir()
    (other / "new.txt").write_text("New there.")
    assert ingest(index, corpus / "b.txt", prune=True).documents_deleted == 0
    assert ingest(index, other, prune=True).documents_deleted == 1
    assert {"a.md", "deep/c.txt", "mine"} <= held(index)
    assert ingest(index, corpus, prune=True).documents_deleted == 2
    assert {"b.txt", "x", "y", "mine", "new.txt"} <= held(index)


def test_a_folder_has_one_identity_under_any_name(
    index: ConceptIndex, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(corpus)
    monkeypatch.chdir(tmp_path)
    ingest(index, Path("docs"))
    (corpus / "a.md").unlink()
    monkeypatch.chdir(corpus / "deep")
    assert ingest(index, Path("../../link"), prune=True).documents_deleted == 1
    assert held(index) == {"b.txt", "deep/c.txt", "x", "y"}
    # The same file under another id takes the place of the former one: it is not kept twice.
    assert ingest(index, Path("..") / "deep", prune=True).documents_deleted == 1
    assert held(index) == {"b.txt", "c.txt", "x", "y"}


def test_a_folder_that_moves_is_neither_embedded_nor_compressed_again(
    index: ConceptIndex, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest(index, corpus)
    question, embedded, embed = "Who built the lighthouse?", [], HashEmbedder._get_text_embedding
    found = index.as_retriever(similarity_top_k=9).retrieve(question)
    monkeypatch.setattr(
        HashEmbedder, "_get_text_embedding", lambda self, text: embedded.append(text) or embed(self, text)
    )
    moved = corpus.rename(corpus.with_name("elsewhere"))
    report = ingest(index, moved, prune=True)
    # The files of another folder, under the same ids: none of them is gone from there, and none is left behind.
    assert (report.documents_changed, report.documents_deleted, report.segments_compressed) == (5, 0, 0)
    assert not embedded
    again = index.as_retriever(similarity_top_k=9).retrieve(question)
    assert [(n.text, n.node.ref_doc_id) for n in again] == [(n.text, n.node.ref_doc_id) for n in found]
    assert [n.score for n in again] == pytest.approx([n.score for n in found], abs=1e-6)
    assert all(n.metadata["source"].startswith(str(moved)) for n in again)
    # A folder within is part of the ids: its files are other documents, whose concepts are there already.
    (moved / "deep").rename(moved / "deeper")
    report = ingest(index, moved, prune=True)
    assert (report.documents_changed, report.documents_deleted, report.segments_compressed) == (1, 1, 0)
    assert len(embedded) == len(index.faiss.node_ids("deeper/c.txt")) > 0


def test_nothing_is_pruned_when_something_is_wrong(index: ConceptIndex, corpus: Path) -> None:
    ingest(index, corpus)
    before = held(index)
    with pytest.raises(ConfigurationError, match="prune"):
        index.ingest(load_documents([corpus]), prune=True)
    (corpus / "a.md").unlink()
    (corpus / "b.txt").write_bytes(bytes(range(256)))
    with pytest.raises(PruneRefusedError, match=r"b\.txt: byte 128"):
        ingest(index, corpus, prune=True)
    assert held(index) == before
    (corpus / "b.txt").unlink()
    (corpus / "b.txt").symlink_to("b.txt")
    with pytest.raises(PruneRefusedError, match=r"b\.txt: a link that leads to itself"):
        ingest(index, corpus, prune=True)
    (corpus / "b.txt").unlink()
    (corpus / "more.jsonl").write_text('{"id": "x", "text": "still here"}\n{"id": "y"')
    with pytest.raises(PruneRefusedError, match=r"more\.jsonl:2: no JSON"):
        ingest(index, corpus, prune=True)
    assert held(index) == before
    for path in [*corpus.rglob("*.*")]:
        path.unlink()
    with pytest.raises(EmptyCorpusError):  # a folder that is not mounted is empty, too
        ingest(index, corpus, prune=True)
    assert held(index) == before
    check_references(index)


def test_nothing_is_pruned_that_could_not_be_listed(
    index: ConceptIndex, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest(index, corpus)
    before = held(index)
    (corpus / "a.md").unlink()
    (corpus / "new.md").write_text("A new one comes in all the same.")
    real = os.scandir

    def listed(path: Path):
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", listed)
    with pytest.raises(PruneRefusedError, match="deep: permission denied"):
        ingest(index, corpus, prune=True)
    assert held(index) == before | {"new.md"}
    with pytest.raises(PruneRefusedError, match=r"c\.txt: it is there, and none"):
        index.ingest(list(load_documents([corpus])), within=[corpus], prune=True)
    monkeypatch.undo()
    assert held(index) == before | {"new.md"}
    assert ingest(index, corpus, prune=True).documents_deleted == 1


def test_nothing_is_pruned_of_a_disk_that_is_not_mounted(index: ConceptIndex, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "below").mkdir(parents=True)
    (other / "below" / "o.txt").write_text("Another folder.")
    ingest(index, corpus, other)
    before = held(index)
    for folder in ("deep", "../other/below", "../other"):
        file = next((corpus / folder).rglob("*.txt"))
        kept = file.read_text()
        file.unlink()
        with pytest.raises(PruneRefusedError, match="is empty now|not one document"):
            ingest(index, corpus, other, prune=True)
        with pytest.raises(PruneRefusedError, match="is empty now|not one document"):
            index.ingest(list(load_documents([corpus, other])), within=[corpus, other], prune=True)
        assert held(index) == before
        file.write_text(kept)
    (corpus / "deep" / "c.txt").unlink()
    (corpus / "deep").rmdir()
    assert ingest(index, corpus, other, prune=True).documents_deleted == 1


def test_what_is_no_corpus_any_more_stays_or_goes(
    index: ConceptIndex, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was ingested before hidden folders and storages were left out."""
    with monkeypatch.context() as before:
        before.setattr("compllm_rag.llamaindex.readers.walk.holds_storage", lambda folder: False)
        before.setattr("compllm_rag.llamaindex.readers.walk._left_out", lambda folder: None)
        for folder in (".hidden", "s/reader"):
            (corpus / folder).mkdir(parents=True)
            (corpus / folder / "README.md").write_text("# A card")
        (corpus / "s/catalog.db").write_bytes(b"")
        ingest(index, corpus)
    assert {".hidden/README.md", "s/reader/README.md"} <= held(index)
    assert ingest(index, corpus, prune=True).documents_deleted == 1
    assert ".hidden/README.md" in held(index)
    assert "s/reader/README.md" not in held(index)


def test_pruning_a_list_needs_files_that_are_gone(index: ConceptIndex, corpus: Path) -> None:
    ingest(index, corpus)
    some = [d for d in load_documents([corpus]) if d.id_ not in ("a.md", "y")]
    with pytest.raises(PruneRefusedError, match=r"a\.md: it is there, and none"):
        index.ingest(some, within=[corpus], prune=True)
    (corpus / "a.md").unlink()
    assert index.ingest(some, within=[corpus], prune=True).documents_deleted == 2  # `y` has no line any more


def test_references_follow_every_way_in_and_out(index: ConceptIndex) -> None:
    texts = [f"{text} Copy {i % 2}." for i, text in enumerate(PARAGRAPHS * 2)]
    index.ingest([Document(id_=f"d{i}", text=text) for i, text in enumerate(texts)])
    check_references(index)
    index.insert(Document(id_="d1", text=PARAGRAPHS[0] * 2))
    index.refresh_ref_docs([Document(id_="d2", text=PARAGRAPHS[0])])
    index.insert_nodes([TextNode(id_="own", text=PARAGRAPHS[0]), TextNode(id_="own", text=PARAGRAPHS[1])])
    check_references(index)
    index.delete_nodes(["own", "not there"])
    index.delete_ref_doc("d0")
    check_references(index)
    with pytest.raises(RuntimeError), index.bulk():
        index.delete_ref_doc("d1")
        raise RuntimeError("the caller's own")
    check_references(index)
    for i in range(6):
        index.delete_ref_doc(f"d{i}")
    check_references(index)
    with index.faiss.catalog.reading() as connection:
        assert connection.execute("SELECT count(*) FROM refs").fetchone() == (0,)

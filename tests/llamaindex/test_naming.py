"""Documents of one name from several folders: all of them live, and each is found again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llama_index.core import Document

from compllm_rag import Compressor, ConceptIndex
from compllm_rag.catalog.origins import Origins
from compllm_rag.llamaindex.documents import load_documents
from toy_embedder import HashEmbedder


@pytest.fixture
def index(tmp_path: Path, compressor: Compressor):
    """An empty index."""
    with ConceptIndex.create(tmp_path / "s", compressor=compressor, embedder=HashEmbedder(), chunk_size=60) as made:
        yield made


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders that hold a file of the same name, and a line of the same id."""
    made = []
    for name in ("boats", "bread"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "ferry.md").write_text(f"# Ferry\n\nWhat is said of {name}.")
        (folder / f"{name}.jsonl").write_text(json.dumps({"id": 1, "text": f"A line of {name}."}))
        made.append(folder)
    return made[0], made[1]


def held(index: ConceptIndex) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in index.faiss.iter_nodes():
        found[str(node.ref_doc_id)] = found.get(str(node.ref_doc_id), "") + node.get_content().split()[-1]
    return found


BOTH = {"ferry.md": "boats.", "1": "boats.", "bread/ferry.md": "bread.", "bread.jsonl#1": "bread."}


@pytest.mark.parametrize("at_once", [True, False])
def test_both_live_and_are_found_again(
    index: ConceptIndex, folders: tuple[Path, Path], at_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    boats, bread = folders
    if at_once:
        report = index.ingest(load_documents([boats, bread]))
    else:
        index.ingest(load_documents([boats]))
        report = index.ingest(load_documents([bread]))
    assert held(index) == BOTH
    assert len([r for r in caplog.records if "is the id of" in r.getMessage()]) == 2
    assert [note.what.split(" of ")[0] for note in report.notes] == ["1 is the id", "ferry.md is the id"]
    for paths in ([bread], [boats], [bread, boats], [boats, bread]):
        report = index.ingest(load_documents(paths), within=paths, prune=True)
        assert (report.documents_changed, report.documents_deleted, report.notes) == (0, 0, ())
    assert held(index) == BOTH
    (bread / "ferry.md").write_text("# Ferry\n\nNow of cakes.")
    assert index.ingest(load_documents([bread])).documents_changed == 1
    assert held(index) == BOTH | {"bread/ferry.md": "cakes."}
    (bread / "ferry.md").unlink()
    assert index.ingest(load_documents([bread]), within=[bread], prune=True).documents_deleted == 1
    (bread / "ferry.md").write_text("# Ferry\n\nAgain of bread.")
    index.ingest(load_documents([bread]))
    assert held(index) == BOTH


def test_a_folder_that_moved_takes_its_documents_along(index: ConceptIndex, folders: tuple[Path, Path]) -> None:
    boats, bread = folders
    index.ingest(load_documents([boats, bread]))
    bread = bread.rename(bread.with_name("loaves"))
    report = index.ingest(load_documents([bread]))
    assert (report.documents, report.documents_moved, report.segments_compressed) == (2, 2, 0)
    assert held(index) == BOTH
    bread, boats = bread.rename(bread.with_name("b")), boats.rename(boats.with_name("a"))
    assert index.ingest(load_documents([bread, boats])).documents_moved == 4  # told apart by their text
    assert held(index) == BOTH


def test_a_file_that_is_gone_is_succeeded_by_what_says_the_like(
    index: ConceptIndex, folders: tuple[Path, Path]
) -> None:
    boats, bread = folders
    index.ingest(load_documents([boats]))
    boats = boats.rename(boats.with_name("elsewhere"))  # or on a disk that is not mounted
    (bread / "ferry.md").write_text("Knead for ten minutes, then wait.")
    (bread / "bread.jsonl").write_text(json.dumps({"id": 1, "text": "A line of boats, edited."}))
    report = index.ingest(load_documents([bread]))
    assert (report.documents_moved, len(report.notes)) == (1, 1)
    assert held(index) == {"ferry.md": "boats.", "1": "edited.", "bread/ferry.md": "wait."}
    (boats / "ferry.md").write_text("# Ferry\n\nWhat is said of boats now.")
    assert index.ingest(load_documents([boats / "ferry.md"])).documents_moved == 1
    assert held(index)["ferry.md"] == "now."


def test_other_names_of_a_folder_make_no_other_documents(
    index: ConceptIndex, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boats, _ = folders
    index.ingest(load_documents([boats]))
    (tmp_path / "link").symlink_to(boats)
    monkeypatch.chdir(tmp_path)
    for path in ("boats", "./boats/../boats", "link", "boats/ferry.md"):
        report = index.ingest(load_documents([path]))
        assert (report.segments_compressed, report.documents_moved, report.notes) == (0, 0, ())
    (tmp_path / "farm").mkdir()
    (tmp_path / "farm" / "ferry.md").symlink_to(boats / "ferry.md")
    index.ingest(load_documents(["farm", "boats"]))
    assert held(index) == {"ferry.md": "boats.", "1": "boats."}


def test_documents_of_other_ways_are_not_replaced(index: ConceptIndex, folders: tuple[Path, Path]) -> None:
    boats, bread = folders
    index.insert(Document(id_="ferry.md", text="Written by hand."))
    index.ingest(load_documents([boats]))
    assert held(index) == {"ferry.md": "hand.", "1": "boats.", "boats/ferry.md": "boats."}
    index.upload(load_documents([bread]))
    index.uploads.wait()
    assert held(index) == {"ferry.md": "hand.", "1": "boats.", "boats/ferry.md": "boats."} | {
        "bread/ferry.md": "bread.", "bread.jsonl#1": "bread.",
    }  # fmt: skip
    index.ingest([Document(id_="ferry.md", text="Written again.")])  # whose id is its identity
    assert held(index)["ferry.md"] == "again."


def test_a_storage_of_before_knows_files_by_their_metadata(
    index: ConceptIndex, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    boats, bread = folders
    with monkeypatch.context() as before:
        before.setattr(Origins, "put", lambda self, doc_id, file: None)
        index.ingest(load_documents([boats]))
    assert index.origins.file_of("ferry.md") is None
    index.ingest(load_documents([bread]))
    assert held(index) == BOTH
    assert index.ingest(load_documents([boats])).documents_changed == 0
    assert held(index) == BOTH

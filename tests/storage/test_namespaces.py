"""Several tenants in one storage folder: none sees anything of another, and a deleted one leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document
from llama_index.core.vector_stores.types import VectorStoreQuery
from typer.testing import CliRunner

from compllm_rag import Compressor, ConceptIndex
from compllm_rag.cli.main import app
from compllm_rag.errors import CompLLMError, ConfigurationError, StorageNotFoundError, StoreLockedError
from compllm_rag.llamaindex.opening import create_index
from compllm_rag.storage.compaction import compact_storage
from compllm_rag.storage.namespaces import delete_namespace, list_namespaces, namespace_folder
from tests.faults.fault_samples import QUESTION, check_whole, create, documents, load, run, sound, texts
from toy_embedder import HashEmbedder

AWKWARD = ("a/b", "../up", "A", "a", ".deleted-x", "tab\tand\nline", "nul\0", "été", "é", "x" * 200, "default ")


def files(folder: Path) -> dict[str, str]:
    """Digests of all files of a folder, sub-folders included."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.endswith(("-wal", "-shm", ".lock")):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def contains(folder: Path, words: bytes) -> bool:
    return any(words in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_tenants_see_nothing_of_each_other(tmp_path: Path, compressor: Compressor) -> None:
    path = tmp_path / "s"
    secret = "The vault opens at midnight. Only Ada Marsh knows the word."
    with create(path, compressor, namespace="a") as a:
        first = a.ingest(documents())
        a.insert(Document(id_="secret", text=secret))
    before = files(a.storage_dir)
    with create(path, compressor, namespace="b") as b, load(path, compressor, namespace="a", read_only=True) as a:
        # What one tenant compressed is no hit for another, and takes it as long as if nobody had.
        fetched = b.library.fetch(secret, missing="text")
        assert (fetched.hits, fetched.misses > 0, fetched.concepts) == (0, True, None)
        report = b.ingest(documents())
        assert report.segments_compressed == first.segments_compressed
        assert (b.stats()["documents"], a.stats()["documents"]) == (6, 7)
        assert b.metrics.work.segments == report.segments_compressed
        assert a.metrics.snapshot()["hits"] == 0
        assert not any("vault" in node.text for node in b.faiss.iter_nodes())
        found = b.as_retriever(similarity_top_k=50).retrieve(secret)
        assert "secret" not in {node.node.ref_doc_id for node in found}
        vector = b.embedder.get_text_embedding(secret)
        theirs = a.faiss.node_ids("secret")
        query = VectorStoreQuery(query_embedding=vector, similarity_top_k=50, node_ids=theirs)
        assert b.faiss.query(query).nodes == []
        assert b.faiss.get_nodes(theirs) == []
        assert b.docstore.get_document_hash("secret") is None
        assert a.docstore.get_document_hash("secret") is not None
        assert not any(b.store.contains([k for n in a.faiss.iter_nodes() for k in a.library.passage(n.text).keys]))
        assert b.store.stats().records == b.stats()["unique_segments"] < a.stats()["unique_segments"]
        b.delete_ref_doc("d0")
        b.compact()
        assert a.as_query_engine().query(QUESTION).metadata["compllm"]["store"]["misses"] == 0
        check_whole(b)
    assert files(a.storage_dir) == before
    assert not contains(namespace_folder(path, "b"), b"vault")
    assert contains(namespace_folder(path, "a"), b"vault")


def test_locks_are_not_shared(tmp_path: Path, compressor: Compressor) -> None:
    with create(tmp_path / "s", compressor, namespace="a") as a, create(tmp_path / "s", compressor) as own:
        with a.bulk():
            a.insert(documents(1)[0])
            own.ingest(documents())
            with pytest.raises(StoreLockedError):
                delete_namespace(tmp_path / "s", "a")
        assert (a.stats()["documents"], own.stats()["documents"]) == (1, 6)


@pytest.mark.parametrize("gone", ["default", "a"])
def test_a_deleted_namespace_is_gone(tmp_path: Path, compressor: Compressor, gone: str) -> None:
    path, kept = tmp_path / "s", "a" if gone == "default" else "default"
    names = ("default", "a", "b")
    for number, name in enumerate(names):
        with create(path, compressor, namespace=name) as index:
            index.ingest(documents(3 + number))
            index.insert(Document(id_="own", text=f"Only tenant{number} knows."))
            index.delete_ref_doc("d0")
    before = files(namespace_folder(path, kept))
    if kept == "default":
        before = {name: digest for name, digest in before.items() if not name.startswith("namespaces")}
    assert [one.name for one in list_namespaces(path)] == list(names)
    sizes = {one.name: one.bytes for one in list_namespaces(path)}
    assert delete_namespace(path, gone) == sizes[gone]
    assert not contains(path, f"tenant{names.index(gone)}".encode())
    after = files(namespace_folder(path, kept))
    assert {name: after[name] for name in before} == before
    assert [one.name for one in list_namespaces(path)] == [name for name in names if name != gone]
    assert len([p for p in (path / "namespaces").iterdir()]) == (2 if gone == "default" else 1)
    with pytest.raises(StorageNotFoundError):
        load(path, compressor, namespace=gone)
    with pytest.raises(StorageNotFoundError, match="no such namespace"):
        delete_namespace(path, gone)
    sound(namespace_folder(path, kept))
    with create(path, compressor, namespace=gone) as index:
        assert index.stats()["documents"] == index.stats()["unique_segments"] == 0


def test_compaction_of_the_folder_leaves_the_others(tmp_path: Path, compressor: Compressor) -> None:
    path = tmp_path / "s"
    for name in (None, "a"):
        with create(path, compressor, namespace=name) as index:
            index.ingest(documents())
            index.delete_ref_doc("d1")
    before = files(namespace_folder(path, "a"))
    report = compact_storage(path)
    assert report.bytes_before == sum(one.bytes for one in list_namespaces(path) if one.name == "default") + (
        report.bytes_before - report.bytes_after
    )
    assert files(namespace_folder(path, "a")) == before


def test_a_storage_of_before_keeps_its_name(tmp_path: Path, compressor: Compressor) -> None:
    path = tmp_path / "s"
    parts = create_index(path, compressor=compressor, embedder=HashEmbedder(), chunk_size=60, namespace="old")
    with ConceptIndex.of(parts) as index:
        index.ingest(documents())
    for name in (None, "old"):
        with load(path, compressor, namespace=name) as index:
            assert index.stats()["documents"] == 6
    with create(path, compressor, namespace="default") as index:
        assert index.stats()["documents"] == 0
    assert [one.name for one in list_namespaces(path)] == ["old", "default"]
    delete_namespace(path, "old")
    assert [one.name for one in list_namespaces(path)] == ["default"]


def test_any_name_is_a_name_and_nothing_else(tmp_path: Path, compressor: Compressor) -> None:
    path = tmp_path / "deep" / "s"
    for number, name in enumerate(AWKWARD, 1):
        with create(path, compressor, namespace=name) as index:
            assert index.stats()["documents"] == 0
            index.ingest(documents(number)[-1:])
    assert {one.name for one in list_namespaces(path)} == set(AWKWARD)
    assert set(os.listdir(tmp_path / "deep")) == {"s"}
    assert os.listdir(path) == ["namespaces"]
    for number, name in enumerate(AWKWARD[:-1], 1):
        delete_namespace(path, name)
        assert {one.name for one in list_namespaces(path)} == set(AWKWARD[number:])
    with load(path, compressor, namespace=AWKWARD[-1]) as index:
        assert set(texts(index)) == {f"d{len(AWKWARD) - 1}"}


def test_what_is_refused(tmp_path: Path, compressor: Compressor) -> None:
    for name in ("", "x" * 201, "\ud800"):
        with pytest.raises(ConfigurationError, match="^namespace makes no sense"):
            create(tmp_path / "s", compressor, namespace=name)
        with pytest.raises(ConfigurationError):
            delete_namespace(tmp_path / "s", name)
    with pytest.raises(StorageNotFoundError):
        list_namespaces(tmp_path / "s")
    create(tmp_path / "s", compressor, namespace="a").close()
    with pytest.raises(StorageNotFoundError, match="namespace list"):
        load(tmp_path / "s", compressor)
    with pytest.raises(StorageNotFoundError, match="no such namespace"):
        load(tmp_path / "s", compressor, namespace="b")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="not a folder"):
        create(tmp_path / "file", compressor, namespace="a")
    with pytest.raises(CompLLMError):
        load(tmp_path / "file", compressor, namespace="a")


_KILLED = """
from compllm_rag.storage import namespaces
path, name = Path(sys.argv[1]), sys.argv[2]
remove, calls = namespaces._remove, []
def dying(path):
    calls.append(path)
    if len(calls) == 4 or path.name.startswith(".deleted"):
        die()
    remove(path)
namespaces._remove = dying
namespaces.delete_namespace(path, name)
"""


@pytest.mark.parametrize("name", ["default", "a"])
def test_a_killed_deletion_is_taken_up(tmp_path: Path, compressor: Compressor, name: str) -> None:
    path = tmp_path / "s"
    for each in ("default", "a"):
        with create(path, compressor, namespace=each) as index:
            index.ingest(documents())
            index.insert(Document(id_="own", text=f"A note of tenant {each}."))
    assert run(_KILLED, path, name).returncode == -9
    assert contains(path, f"tenant {name}".encode())
    delete_namespace(path, name)
    assert not contains(path, f"tenant {name}".encode())
    (left,) = list_namespaces(path)
    sound(left.path)


def test_folders_that_were_never_a_storage_are_left_alone(tmp_path: Path, compressor: Compressor) -> None:
    notes = tmp_path / "notes"
    for name in ("concepts/thesis.md", "reader/book.txt", "backup-v2/x", "compressor/y"):
        (notes / name).parent.mkdir(parents=True)
        (notes / name).write_text("mine")
    before = files(notes)
    with pytest.raises(StorageNotFoundError):
        delete_namespace(notes, "default")
    with pytest.raises(StorageNotFoundError):
        list_namespaces(notes)
    assert files(notes) == before and not list(notes.glob("*.lock"))
    # beside what is left of a storage that lost its catalog
    (notes / "vectors-1.faiss").write_bytes(b"x")
    delete_namespace(notes, "default")
    assert files(notes) == before


def test_what_goes_while_it_is_counted_or_deleted_is_no_error(
    tmp_path: Path, compressor: Compressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    for each in ("default", "a"):
        with create(path, compressor, namespace=each) as index:
            index.ingest(documents())
    real = os.walk

    def walk(top: Path, **options: Any) -> Iterator[Any]:
        for folder, names, found in real(top, **options):
            yield folder, names, [*found, "vectors-9.faiss.tmp"]

    with monkeypatch.context() as patched:
        patched.setattr(os, "walk", walk)
        assert {space.name for space in list_namespaces(path)} == {"default", "a"}
        unlink = os.unlink

        def twice(name: str, **options: Any) -> None:
            unlink(name, **options)
            raise FileNotFoundError(2, "No such file or directory", name)

        patched.setattr(os, "unlink", twice)
        assert delete_namespace(path, "a") > 0
    assert [space.name for space in list_namespaces(path)] == ["default"]


def test_a_deleted_namespace_refuses_what_a_process_still_writes(tmp_path: Path, compressor: Compressor) -> None:
    with create(tmp_path / "s", compressor, namespace="a") as index:
        index.ingest(documents())
        delete_namespace(tmp_path / "s", "a")
        with pytest.raises((CompLLMError, OSError)):
            index.ingest(documents(7))
        assert not (tmp_path / "s" / "namespaces").exists() or not os.listdir(tmp_path / "s" / "namespaces")


def test_the_commands(tmp_path: Path, compressor: Compressor) -> None:
    path, runner = tmp_path / "s", CliRunner()
    for name in ("a", "b"):
        with create(path, compressor, namespace=name) as index:
            index.ingest(documents(2))
    listed = json.loads(runner.invoke(app, ["namespace", "list", "--storage", str(path), "--json"]).stdout)
    assert [one["namespace"] for one in listed] == ["a", "b"]
    assert "a  " in runner.invoke(app, ["namespace", "list", "--storage", str(path)]).stdout
    words = ["stats", "--storage", str(path), "--namespace", "a", "--json"]
    assert json.loads(runner.invoke(app, words).stdout)["namespace"] == "a"
    assert "namespace list" in runner.invoke(app, ["stats", "--storage", str(path)]).stderr
    done = runner.invoke(app, ["namespace", "delete", "a", "--storage", str(path), "--json"])
    assert json.loads(done.stdout)["bytes"] >= listed[0]["bytes"] > 10000
    assert runner.invoke(app, ["namespace", "delete", "a", "--storage", str(path)]).exit_code == 2
    assert "deleted b" in runner.invoke(app, ["namespace", "delete", "b", "--storage", str(path)]).stdout
    assert runner.invoke(app, words).exit_code == 2
    for name in ("ingest", "query", "stats"):
        assert "--namespace" in runner.invoke(app, [name, "--help"], env={"COLUMNS": "200"}).stdout

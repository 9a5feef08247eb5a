"""Verify, repair and compact a whole storage: what is damaged is found, made again from text, and never an answer."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from llama_index.core import Document

import toy
from compllm_rag import Compressor, ConceptIndex
from compllm_rag.errors import (
    ConfigurationError,
    CorruptRecordError,
    FingerprintMismatchError,
    StorageMismatchError,
    StorageNotFoundError,
    StoreLockedError,
    UnsupportedFormatError,
)
from compllm_rag.llamaindex.repair import repair_storage
from compllm_rag.storage.compaction import compact_storage
from compllm_rag.storage.migration import migrate_storage
from compllm_rag.storage.verification import verify_storage
from tests.faults.fault_samples import (
    QUESTION,
    check_whole,
    documents,
    execute,
    filled,
    flip,
    load,
    run,
    said,
    sound,
    talking,
    texts,
)
from toy_embedder import HashEmbedder

pytestmark = pytest.mark.faults


def repair(path: Path, compressor: Compressor):
    return repair_storage(path, compressor=compressor, embedder=HashEmbedder())


def vectors(path: Path) -> Path:
    (only,) = path.glob("vectors-*.faiss")
    return only


def last_pack(path: Path) -> Path:
    return max((path / "concepts" / "packs").iterdir())


def _swap(path: Path) -> None:
    execute(path / "catalog.db", "UPDATE nodes SET id = id + 1000 WHERE id = (SELECT max(id) FROM nodes)")


DAMAGE = {
    "payload bit": (lambda p: flip(last_pack(p), 3000), "concepts", True),
    "pack cut": (lambda p: last_pack(p).write_bytes(last_pack(p).read_bytes()[:-5]), "concepts", False),
    "pack header": (lambda p: flip(last_pack(p), 12), "concepts", False),
    "pack gone": (lambda p: last_pack(p).unlink(), "concepts", False),
    "index row": (
        lambda p: execute(
            p / "concepts/index/cache.db",
            "UPDATE Cache SET value = x'00' WHERE rowid = (SELECT min(rowid) FROM Cache WHERE length(key) = 64)",
        ),
        "concepts",
        False,
    ),
    "index row gone": (
        lambda p: execute(
            p / "concepts/index/cache.db",
            "DELETE FROM Cache WHERE rowid = (SELECT min(rowid) FROM Cache WHERE length(key) = 64)",
        ),
        "concepts",
        False,
    ),
    "index random": (lambda p: (p / "concepts/index/cache.db").write_bytes(b"no database" * 999), "concepts", False),
    "store manifest": (lambda p: (p / "concepts/store.json").write_text("{"), "concepts", False),
    "store gone": (lambda p: shutil.rmtree(p / "concepts"), "concepts", False),
    "vectors bit": (lambda p: flip(vectors(p), 200), "vectors", False),
    "vectors cut": (lambda p: vectors(p).write_bytes(vectors(p).read_bytes()[:-9]), "vectors", False),
    "vectors gone": (lambda p: vectors(p).unlink(), "vectors", False),
    "vector of another": (_swap, "vectors", False),
    "state gone": (lambda p: execute(p / "catalog.db", "DELETE FROM state"), "vectors", False),
    "references gone": (lambda p: execute(p / "catalog.db", "DROP TABLE refs"), "counts", False),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_made_whole_from_text(tmp_path: Path, compressor: Compressor, kind: str) -> None:
    damage, part, deep_only = DAMAGE[kind]
    path = filled(tmp_path / "s", compressor)
    with load(path, compressor, read_only=True) as index:
        before, answer = texts(index), str(index.as_query_engine().query(QUESTION))
    damage(path)
    assert verify_storage(path).sound == deep_only
    check = verify_storage(path, deep=True)
    assert {finding.part for finding in check.findings} == {part}
    report = repair(path, compressor)
    assert report.sound
    assert (report.documents_lost, report.chunks_lost) == ((), 0)
    assert (report.chunks_reembedded > 0) == (part == "vectors")
    assert (report.segments_compressed > 0) == (part == "concepts")
    if kind in ("payload bit", "index row", "index row gone"):
        assert report.segments_compressed == 1
    after = sound(path)
    assert after.documents == 6
    with load(path, compressor) as index:
        assert texts(index) == before
        check_whole(index)
        assert str(index.as_query_engine().query(QUESTION)) == answer
        assert index.ingest(documents()).segments_compressed == 0
    assert repair(path, compressor).findings == 0
    assert not list(path.glob("concepts.damaged*"))


def test_damaged_text_takes_its_document_along_and_no_other(tmp_path: Path, compressor: Compressor) -> None:
    path = filled(tmp_path / "s", compressor)
    row = "(SELECT max(id) FROM nodes WHERE ref_doc_id = 'd2')"
    for change in (f"text = text || '!' WHERE id = {row}", "text = CAST(x'ff00fe' AS TEXT) WHERE ref_doc_id = 'd4'"):
        execute(path / "catalog.db", f"UPDATE nodes SET {change}")
    assert verify_storage(path).sound
    found = verify_storage(path, deep=True)
    assert {finding.part for finding in found.findings} == {"text"}
    report = repair(path, compressor)
    assert (sorted(report.documents_lost), report.sound, report.chunks_reembedded) == (["d2", "d4"], True, 0)
    sound(path)
    with load(path, compressor) as index:
        assert set(texts(index)) == {"d0", "d1", "d3", "d5"}
        again = index.ingest(documents())
        assert (again.documents_changed, again.segments_compressed) == (2, 0)
        assert texts(index) == {d.id_: d.text for d in documents()}
        check_whole(index)


def test_what_a_repair_cannot_make_it_refuses(tmp_path: Path, compressor: Compressor) -> None:
    path = filled(tmp_path / "s", compressor)
    shutil.copytree(path, tmp_path / "manifest")
    execute(tmp_path / "manifest" / "catalog.db", "UPDATE meta SET value = '{' WHERE key = 'compllm/manifest'")
    shutil.copytree(path, tmp_path / "database")
    file = tmp_path / "database" / "catalog.db"
    file.write_bytes(file.read_bytes()[:8192] + b"\xff" * (file.stat().st_size - 8192))
    for name in ("manifest", "database"):
        check = verify_storage(tmp_path / name)
        assert name in {finding.part for finding in check.findings}
        with pytest.raises(CorruptRecordError, match=f"cannot be repaired.*{name}.*ingest again"):
            repair(tmp_path / name, compressor)
    shutil.copytree(path, tmp_path / "adapters")
    flip(tmp_path / "adapters" / "compressor" / "compressor.safetensors", -1)
    assert [finding.part for finding in verify_storage(tmp_path / "adapters").findings] == ["adapters"]
    vectors(path).unlink()
    with pytest.raises(FingerprintMismatchError):
        repair(path, Compressor(toy.llm(seed=3)))
    for call in (verify_storage, compact_storage, migrate_storage, lambda p: repair(p, compressor)):
        with pytest.raises(StorageNotFoundError):
            call(tmp_path / "none")


@pytest.mark.parametrize("step", ["_repair_rows", "_repair_store", "_complete"])
def test_a_killed_repair_is_run_again(tmp_path: Path, compressor: Compressor, step: str) -> None:
    path = filled(tmp_path / "s", compressor)
    with load(path, compressor) as index:
        before = texts(index)
    vectors(path).unlink()
    (path / "concepts/store.json").unlink()
    done = run(
        "from compllm_rag.llamaindex import repair\n"
        "setattr(repair, sys.argv[2], die)\n"
        "repair.repair_storage(Path(sys.argv[1]), compressor=Compressor(toy.llm()), embedder=HashEmbedder())",
        path,
        step,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert repair(path, compressor).sound
    sound(path)
    with load(path, compressor) as index:
        assert texts(index) == before
        check_whole(index)
    assert not list(path.glob("concepts.damaged*"))


def test_compaction_reclaims_what_no_chunk_refers_to(tmp_path: Path, compressor: Compressor) -> None:
    path = filled(tmp_path / "s", compressor, 9)
    with load(path, compressor) as index:
        index.ingest(documents(9, version=1))
        index.ingest([Document(id_="secret", text="An otter told me a secret. Nobody else may ever know it.")])
        index.delete_ref_doc("secret")
        index.delete_ref_doc("d0")
        kept = texts(index)
        answer = str(index.as_query_engine().query(QUESTION))
    before = sound(path)
    assert before.dead_records == before.records - before.segments > 0
    report = compact_storage(path)
    assert report.concepts.records_dropped == before.dead_records
    assert report.bytes_after < report.bytes_before
    after = sound(path)
    assert (after.records, after.dead_records, after.dead_bytes) == (before.segments, 0, 0)
    assert len(list(path.glob("vectors-*"))) == 1
    with load(path, compressor) as index:
        assert texts(index) == kept
        assert str(index.as_query_engine().query(QUESTION)) == answer
        check_whole(index)
        assert index.ingest(documents(9)[:1]).segments_compressed > 0  # what is gone is gone
        assert compact_storage(path).concepts.records_dropped == 0
        assert index.as_query_engine().query(QUESTION).metadata["compllm"]["store"]["misses"] == 0
    assert b"otter" not in b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())


def test_an_open_index_verifies_and_compacts_itself(tmp_path: Path, compressor: Compressor) -> None:
    with load(filled(tmp_path / "s", compressor), compressor) as index:
        index.delete_ref_doc("d0")
        assert index.verify(deep=True).dead_records > 0
        with pytest.raises(StoreLockedError), index.bulk():
            index.delete_ref_doc("d1")
            index.compact()
        assert set(texts(index)) == {f"d{i}" for i in range(1, 6)}
        assert index.compact().concepts.records_dropped > 0
        assert index.verify(deep=True).dead_records == 0
        assert index.as_query_engine(missing="error").query(QUESTION).source_nodes
        assert index.ingest(documents()).documents_changed == 1
        check_whole(index)
    in_memory = ConceptIndex.create(None, compressor=compressor, embedder=HashEmbedder())
    for call in (in_memory.verify, in_memory.compact):
        with pytest.raises(ConfigurationError, match="memory"):
            call()


def test_compaction_needs_counts_and_the_lock(tmp_path: Path, compressor: Compressor) -> None:
    path = filled(tmp_path / "s", compressor)
    script = (
        "index = load(Path(sys.argv[1]))\n"
        "ensure = index.library.ensure\n"
        "def waiting(texts):\n"
        "    made = ensure(texts); index.store.flush()\n"
        "    print(os.getpid(), flush=True); sys.stdin.readline()\n"
        "    return made\n"
        "index.library.ensure = waiting\n"
        "index.ingest(documents(8))\n"
        "print('done', flush=True)\n"
    )
    with talking(script, path) as writer:
        pid = said(writer)
        # Its new concepts are on the disk, and nothing refers to them yet: they must not be taken for dead.
        assert verify_storage(path).dead_records > 0
        with pytest.raises(StoreLockedError, match=f"process {pid} "):
            compact_storage(path)
        writer.stdin.write("\n\n\n")
        writer.stdin.flush()
        while (line := said(writer)) != "done":
            assert line == pid
    assert compact_storage(path).concepts.records_dropped == 0
    with load(path, compressor) as index:
        index.accounts.references.catalog.claim()
        with pytest.raises(StoreLockedError):
            compact_storage(path)
        index.faiss.rollback()
    execute(path / "catalog.db", "DROP TABLE refs")
    with pytest.raises(StorageMismatchError, match="repair"):
        compact_storage(path)
    assert repair(path, compressor).sound
    assert compact_storage(path).concepts.records_dropped == 0


def test_newer_formats_are_refused_by_every_command(tmp_path: Path, compressor: Compressor) -> None:
    path = filled(tmp_path / "s", compressor)
    assert (migrate_storage(path).changed, migrate_storage(path).to_version) == (False, 1)
    newer = {
        "state": ("catalog.db", "UPDATE state SET format_version = 3"),
        "manifest": (
            "catalog.db",
            "UPDATE meta SET value = json_set(value, '$.format_version', 2) WHERE key = 'compllm/manifest'",
        ),
    }
    for name, (file, statement) in newer.items():
        shutil.copytree(path, tmp_path / name)
        execute(tmp_path / name / file, statement)
    shutil.copytree(path, tmp_path / "store")
    store = tmp_path / "store" / "concepts" / "store.json"
    store.write_text(store.read_text().replace('"format_version": 1', '"format_version": 2'))
    for name in (*newer, "store"):
        for call in (verify_storage, compact_storage, migrate_storage, lambda p: repair(p, compressor), load_it):
            with pytest.raises(UnsupportedFormatError):
                call(tmp_path / name)


def load_it(path: Path) -> None:
    load(path).close()


def test_a_storage_that_may_not_be_written_opens_verifies_and_answers(compressor: Compressor) -> None:
    base = Path(tempfile.mkdtemp())  # unlike tmp_path, one that another user can reach
    try:
        path = filled(base / "s", compressor)
        for file in [base, *base.rglob("*")]:
            file.chmod(0o555 if file.is_dir() else 0o444)
        done = run(
            "os.environ['HOME'] = '/nonexistent'\n"
            "if os.getuid() == 0: os.setuid(65534)\n"
            "from compllm_rag.errors import StoreReadOnlyError\n"
            "from compllm_rag.storage.compaction import compact_storage\n"
            "path = Path(sys.argv[1])\n"
            "print(verify_storage(path).sound, verify_storage(path, deep=True).sound)\n"
            "with load(path, read_only=True) as index:\n"
            "    found = index.as_query_engine().query(QUESTION)\n"
            "    print(len(found.source_nodes), found.metadata['compllm']['store']['misses'])\n"
            "for call in (compact_storage, load):\n"
            "    try: call(path)\n"
            "    except StoreReadOnlyError: print('refused')\n",
            path,
        )
        assert done.stdout == "True True\n4 0\nrefused\nrefused\n", done.stderr
    finally:
        subprocess.run(["chmod", "-R", "u+rwX", str(base)], check=True)
        shutil.rmtree(base)

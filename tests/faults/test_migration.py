"""Number 15: a storage of version 1 is migrated, its copy is kept, and a migration that is killed is run again.

There is one format so far. So the step is one of this test's own, to a format 2 that this release refuses.
"""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compllm_rag import Compressor, ConceptIndex
from compllm_rag.catalog.catalog import Catalog
from compllm_rag.cli.main import app
from compllm_rag.errors import StoreFullError, StoreLockedError, UnsupportedFormatError
from compllm_rag.storage import migration
from compllm_rag.storage.compaction import compact_storage
from compllm_rag.storage.migration import migrate_storage
from compllm_rag.storage.namespaces import delete_namespace
from compllm_rag.storage.verification import verify_storage
from tests.faults.fault_samples import filled, run, sound
from toy_embedder import HashEmbedder

V1 = Path(__file__).parents[1] / "golden" / "v1"
_STEP = """
from compllm_rag.storage import migration
def step(folder, connection):
    connection.execute("CREATE TABLE added (one INTEGER)")
    connection.execute("INSERT INTO added SELECT count(*) FROM nodes")
"""
_KILLS = {
    "before the copy": "migration._back_up = die",
    "in the copy": "migration._copy_database = die",
    "before the copy has its name": "Path.rename = die",
    "after the copy": "back_up = migration._back_up\nmigration._back_up = lambda *a: (back_up(*a), die())",
    "in the step": "first = step\ndef step(*a): first(*a); die()",
    "after the step": "run_step = migration._run\nmigration._run = lambda *a: (run_step(*a), die())",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A copy of the storage of version 1."""
    return Path(shutil.copytree(V1 / "made", tmp_path / "made"))


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that knows format 2."""
    names: dict = {}
    exec(_STEP, names)  # noqa: S102 - the very step of the processes that are killed
    monkeypatch.setattr(migration, "FORMAT_VERSION", 2)
    monkeypatch.setattr(migration, "STEPS", {1: names["step"]})


def rows(path: Path, query: str) -> list[tuple]:
    connection = sqlite3.connect(path / "catalog.db")
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def version(path: Path) -> int:
    [(text,)] = rows(path, "SELECT value FROM meta WHERE key = 'compllm/manifest'")
    return json.loads(text)["format_version"]


def check_copy(copy: Path) -> None:
    """The copy is the storage of before, and works."""
    expected = json.loads((V1 / "expected.json").read_text(encoding="utf-8"))
    sound(copy)
    with ConceptIndex.load(copy, llm=str(V1 / "llm"), embedder=HashEmbedder(), read_only=True) as index:
        assert {node.node_id: node.text for node in index.faiss.iter_nodes()} == expected["nodes"]
        for text in expected["nodes"].values():
            assert index.library.fetch(text, missing="error").misses == 0
    for file in [copy, *copy.rglob("*")]:
        assert stat.S_IMODE(file.stat().st_mode) == (0o700 if file.is_dir() else 0o600), file


def test_a_copy_is_kept_and_the_former_release_refuses_the_new_format(path: Path, two: None) -> None:
    done = migrate_storage(path)
    assert (done.changed, done.from_version, done.to_version, done.backup) == (True, 1, 2, str(path / "backup-v1"))
    assert version(path) == 2
    assert rows(path, "SELECT one FROM added") == rows(path, "SELECT count(*) FROM nodes")
    check_copy(path / "backup-v1")
    for refuses in (
        lambda: ConceptIndex.load(path, llm=str(V1 / "llm"), embedder=HashEmbedder()),
        lambda: verify_storage(path),
        lambda: compact_storage(path),
    ):
        with pytest.raises(UnsupportedFormatError):
            refuses()


def test_a_release_that_is_too_old_goes_back_by_the_copy_alone(
    path: Path, two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate_storage(path)
    monkeypatch.undo()
    with pytest.raises(UnsupportedFormatError, match=r"newer release.*got format 2.*update"):
        migrate_storage(path)
    assert version(path) == 2
    back = path.with_name("back")
    (path / "backup-v1").rename(back)
    check_copy(back)
    assert not migrate_storage(back).changed


def test_a_storage_older_than_every_step_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migration, "FORMAT_VERSION", 3)
    monkeypatch.setattr(migration, "STEPS", {2: lambda *_: None})
    with pytest.raises(UnsupportedFormatError, match="no way from the format.*format 1.*format 2 or newer"):
        migrate_storage(path)
    assert not list(path.glob("backup*"))


@pytest.mark.parametrize("when", _KILLS)
def test_a_killed_migration_is_run_again(path: Path, two: None, when: str) -> None:
    script = f"{_STEP}\n{_KILLS[when]}\nmigration.FORMAT_VERSION, migration.STEPS = 2, {{1: step}}\n"
    done = run(f"{script}migration.migrate_storage(Path(sys.argv[1]))", path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert version(path) == (2 if when == "after the step" else 1)
    if version(path) == 1:  # whichever release opens it next
        sound(path)
        assert migrate_storage(path).changed
    assert version(path) == 2
    assert len(rows(path, "SELECT one FROM added")) == 1
    assert [p.name for p in path.glob("backup*")] == ["backup-v1"]
    check_copy(path / "backup-v1")


def test_a_step_that_fails_changes_nothing(path: Path, two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    step = migration.STEPS[1]

    def failing(folder: Path, connection: sqlite3.Connection) -> None:
        step(folder, connection)
        raise RuntimeError("a fault of the step")

    monkeypatch.setattr(migration, "STEPS", {1: failing})
    with pytest.raises(RuntimeError):
        migrate_storage(path)
    assert version(path) == 1
    sound(path)


def test_no_room_for_the_copy_leaves_the_storage_as_it_was(path: Path) -> None:
    shared_memory = 2**15  # what SQLite keeps beside a database while it is open; the database itself is larger
    done = run(
        f"{_STEP}\nmigration.FORMAT_VERSION, migration.STEPS = 2, {{1: step}}\n"
        "import resource; from compllm_rag.errors import StoreFullError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({shared_memory + 1}, resource.RLIM_INFINITY))\n"
        "try: migration.migrate_storage(Path(sys.argv[1]))\n"
        "except StoreFullError: print('full')\n",
        path,
    )
    assert done.stdout == "full\n", done.stderr
    assert version(path) == 1
    sound(path)
    assert issubclass(StoreFullError, OSError)


def test_a_writer_keeps_a_migration_out(path: Path, two: None) -> None:
    with Catalog.open(path) as catalog:
        catalog.claim()
        with pytest.raises(StoreLockedError):
            migrate_storage(path)
        catalog.rollback()
    assert version(path) == 1


def test_what_a_copy_is_not_part_of(tmp_path: Path, compressor: Compressor, two: None) -> None:
    """A compaction does not count it, the command tells of it, and it goes with its namespace."""
    path = filled(tmp_path / "s", compressor)
    before = compact_storage(path).bytes_after
    made = CliRunner().invoke(app, ["migrate", str(path)])
    assert made.exit_code == 0, made.output
    assert "format 1 before, 2 now" in made.output
    assert "backup-v1" in made.output
    (copy,) = path.glob("backup*")
    assert compact_storage(copy).bytes_after == pytest.approx(before, rel=0.1)
    delete_namespace(path, "default")
    assert not path.exists() or not list(path.iterdir())

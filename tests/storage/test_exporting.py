"""A storage as one file: one state of it whoever writes, whole or not at all, and nothing strange is ever unpacked."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compllm_rag import Compressor, ConceptIndex, export_storage, import_storage
from compllm_rag.cli.main import app
from compllm_rag.errors import (
    ConfigurationError,
    CorruptRecordError,
    StorageMismatchError,
    StorageNotFoundError,
    StoreLockedError,
    UnreadableFileError,
    UnsupportedFormatError,
)
from compllm_rag.llamaindex.answer import answer
from compllm_rag.storage.namespaces import list_namespaces
from compllm_rag.storage.staging import staged
from tests.faults.fault_samples import (
    QUESTION,
    check_whole,
    create,
    documents,
    filled,
    flip,
    load,
    run,
    said,
    sound,
    talking,
    tell,
    texts,
)

_WRITER = """
from compllm_rag.storage.compaction import compact_storage
path, version = Path(sys.argv[1]), 0
with create(path) as index:
    index.ingest(documents(6, version))
    print("ready", flush=True)
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), stop.set()), daemon=True).start()
    while not stop.is_set():
        version += 1
        index.ingest(documents(6, version))  # one commit, and concepts that nothing refers to any more
        if version % 3 == 0:
            index.compact()
print("done", version, flush=True)
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, compressor: Compressor) -> Path:
    """An export of a storage with six documents."""
    folder = tmp_path_factory.mktemp("export")
    export_storage(filled(folder / "s", compressor), folder / "s.tar")
    return folder / "s.tar"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def told(index: ConceptIndex) -> dict:
    found = answer(index, QUESTION)
    return {key: found[key] for key in ("answer", "sources", "prompt_positions")}


def test_beside_an_ingest(tmp_path: Path, compressor: Compressor) -> None:
    with talking(f"import threading\n{_WRITER}", tmp_path / "s") as process:
        assert said(process) == "ready"
        for number in range(4):
            made = export_storage(tmp_path / "s", tmp_path / f"{number}.tar")
            assert made.bytes == (tmp_path / f"{number}.tar").stat().st_size
        tell(process)
        word, version = said(process).split()
        assert (word, process.wait(60)) == ("done", 0)
        assert int(version) > 0
    export_storage(tmp_path / "s", tmp_path / "4.tar")
    versions = []
    for number in range(5):
        done = import_storage(tmp_path / f"{number}.tar", tmp_path / str(number))
        assert (done.documents, done.namespaces) == (6, ("default",))
        sound(tmp_path / str(number))
        with load(tmp_path / str(number), compressor) as index:
            check_whole(index)
            found = {text.split("of version ")[1].split(".")[0] for text in texts(index).values()}
            assert len(found) == 1, found  # all documents of one commit
            versions += map(int, found)
    assert versions == sorted(versions)
    assert versions[-1] == int(version)
    with load(tmp_path / "s", compressor, read_only=True) as former, load(tmp_path / "4", compressor) as index:
        assert told(index) == told(former)
        assert told(index)["answer"]
        index.ingest(documents(7))  # it is a storage like any other
        check_whole(index)


def test_the_same_storage_gives_the_same_bytes(tmp_path: Path, export: Path) -> None:
    seen = list[tuple[str, float | None]]()
    import_storage(export, tmp_path / "s", progress=lambda *step: seen.append(step))
    assert seen[-1][0] == "checking concept records" and ("unpacking the export", 1) not in seen[:3]
    export_storage(tmp_path / "s", tmp_path / "again.tar", progress=lambda *step: seen.append(step))
    assert seen[-1] == ("writing the export", 1.0)
    assert (tmp_path / "again.tar").read_bytes() == export.read_bytes()
    assert (tmp_path / "again.tar").stat().st_mode & 0o777 == 0o600
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "s").rglob("*"))
    with tarfile.open(export) as tar:  # which any tar reads, and sha256sum proves
        sums = dict(line.split("  ")[::-1] for line in tar.extractfile("SHA256SUMS").read().decode().splitlines())
        members = {member.name: tar.extractfile(member).read() for member in tar if member.name != "SHA256SUMS"}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in members.items()} == sums
    assert not any(name.endswith((".lock", "-wal", "-shm")) for name in members)


def test_nothing_is_overwritten(tmp_path: Path, export: Path, compressor: Compressor) -> None:
    path = filled(tmp_path / "s", compressor, 2)
    (tmp_path / "there.tar").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    before = names(tmp_path)
    with pytest.raises(ConfigurationError, match="overwrites nothing.*Next step: name another file"):
        export_storage(path, tmp_path / "there.tar")
    with pytest.raises(StorageMismatchError, match="there already.*delete that namespace first"):
        import_storage(export, path)
    with pytest.raises(StorageMismatchError, match="something else lies"):
        import_storage(export, tmp_path / "folder")
    with pytest.raises(StorageMismatchError, match="something else lies"):
        import_storage(export, tmp_path / "there.tar")
    with staged(tmp_path / ".new.tar.exporting"), pytest.raises(StoreLockedError, match="making the same"):
        export_storage(path, tmp_path / "new.tar")
    assert names(tmp_path) == before
    assert (tmp_path / "there.tar").read_text() == "mine"
    sound(path)
    (tmp_path / "empty").mkdir()
    import_storage(export, tmp_path / "empty")
    sound(tmp_path / "empty")


def test_a_volume_is_refused_before_anything_is_unpacked(
    tmp_path: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == volume)
    with pytest.raises(ConfigurationError, match="(?s)volume's own folder.*Next step: name a folder in it"):
        import_storage(export, volume)
    assert names(tmp_path) == ["volume"]
    assert import_storage(export, volume / "storage").documents > 0


def test_namespaces(tmp_path: Path, compressor: Compressor) -> None:
    path = filled(tmp_path / "s", compressor, 2)
    for name, n in (("acme", 3), ("beta", 4)):
        with create(path, compressor, namespace=name) as index:
            index.ingest(documents(n))
    made = export_storage(path, tmp_path / "all.tar")
    assert made.namespaces == ("default", "acme", "beta")
    assert export_storage(path, tmp_path / "beta.tar", namespace="beta").namespaces == ("beta",)
    assert import_storage(tmp_path / "all.tar", tmp_path / "all").documents == 9
    assert [one.name for one in list_namespaces(tmp_path / "all")] == ["default", "acme", "beta"]
    for one in list_namespaces(tmp_path / "all"):
        sound(one.path)
    target = filled(tmp_path / "other", compressor, 1)
    assert import_storage(tmp_path / "all.tar", target, namespace="acme").documents == 3
    assert import_storage(tmp_path / "beta.tar", target).documents == 4
    with load(target, compressor, namespace="beta", read_only=True) as index:
        assert len(texts(index)) == 4
        check_whole(index)
    assert names(target / "namespaces") == names(path / "namespaces")
    with pytest.raises(StorageNotFoundError, match=r"no such namespace.*'beta'"):
        import_storage(tmp_path / "beta.tar", tmp_path / "new", namespace="acme")
    with pytest.raises(StorageNotFoundError):
        export_storage(path, tmp_path / "gamma.tar", namespace="gamma")
    import_storage(tmp_path / "beta.tar", tmp_path / "alone")
    with pytest.raises(StorageMismatchError, match="a folder of its own"):
        import_storage(tmp_path / "all.tar", tmp_path / "alone", namespace="default")
    assert not (tmp_path / "new").exists() and not (tmp_path / "gamma.tar").exists()


def member(name: str, data: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


HOSTILE: dict[str, tuple[tarfile.TarInfo, bytes]] = {
    "out of the folder": member("../../evil"),
    "out of the folder, later": member("0/../../../evil"),
    "from the root": member("/tmp/evil"),
    "a hidden file": member("0/.evil"),
    "a symbolic link": member("0/evil", b"", type=tarfile.SYMTYPE, linkname="/etc"),
    "a hard link": member("0/evil", b"", type=tarfile.LNKTYPE, linkname="0/catalog.db"),
    "a device": member("0/evil", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    "a pipe": member("0/evil", b"", type=tarfile.FIFOTYPE),
    "a folder": member("0/evil", b"", type=tarfile.DIRTYPE),
    "a sparse file": member("0/evil", b"", type=tarfile.GNUTYPE_SPARSE, size=2**40),
    "an extended header": member("0/evil", b"30 path=../../evil\n", type=tarfile.XHDTYPE),
    "a long name": member("0/evil", b"0/" + b"e" * 200, type=tarfile.GNUTYPE_LONGNAME),
    "more bytes than there are": member("0/evil", b"", size=2**50),
    "the same file twice": member("0/catalog.db"),
    "a file where a folder is": member("0/catalog.db/evil"),
    "a digest too few": member("0/evil"),
    "another namespace than told": member("7/evil"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_no_export_holds_is_refused(tmp_path: Path, export: Path, kind: str) -> None:
    info, data = HOSTILE[kind]
    whole = export.read_bytes()
    with tarfile.open(export) as tar:
        cut = tar.getmember("SHA256SUMS").offset
    strange = info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "bad.tar").write_bytes(whole[:cut] + strange + whole[cut:])
    with pytest.raises((UnsupportedFormatError, CorruptRecordError), match="nothing was imported"):
        import_storage(tmp_path / "x" / "bad.tar", tmp_path / "x" / "s")
    assert names(tmp_path) == ["x"]
    assert names(tmp_path / "x") == ["bad.tar"]
    assert not Path("/tmp/evil").exists()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], type[Exception], str]] = {
    "cut off": (lambda data: data[: len(data) // 2], CorruptRecordError, "in the middle|are left"),
    "cut before its digests": (lambda data: data[: data.rindex(b"SHA256SUMS")], CorruptRecordError, "in the middle"),
    "a bit of a file": (lambda data: flipped(data, data.index(b"CLLMPACK") + 99), CorruptRecordError, "SHA-256"),
    "a bit of a header": (lambda data: flipped(data, data.index(b"0/catalog.db")), UnsupportedFormatError, "header"),
    "a bit of the digests": (lambda data: flipped(data, data.rindex(b"  0/catalog")), CorruptRecordError, "digests"),
    "compressed": (gzip.compress, UnsupportedFormatError, "not compressed"),
    "empty": (lambda data: b"", CorruptRecordError, "in the middle"),
    "zeros": (lambda data: bytes(2**15), UnsupportedFormatError, "an empty archive"),
    "something else": (lambda data: b"PK" * 9999, UnsupportedFormatError, "no export"),
    "of a newer release": (
        lambda data: data.replace(b'"format_version": 1', b'"format_version": 2', 1),
        UnsupportedFormatError,
        "newer release.*update compllm-rag",
    ),
    "of another namespace": (lambda data: data.replace(b'"name": "default"', b'"name": "strange"', 1),
                             CorruptRecordError, "export.json with SHA-256"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_seen(tmp_path: Path, export: Path, kind: str) -> None:
    change, error, message = DAMAGED[kind]
    (tmp_path / "bad.tar").write_bytes(change(export.read_bytes()))
    with pytest.raises(error, match=message):
        import_storage(tmp_path / "bad.tar", tmp_path / "s")
    assert names(tmp_path) == ["bad.tar"]


def test_a_storage_that_is_unsound_in_itself_is_not_imported(tmp_path: Path, export: Path) -> None:
    """Digests that belong to it, and vectors that do not: somebody made it by hand."""
    with tarfile.open(export) as tar:
        members = {one.name: tar.extractfile(one).read() for one in tar}
    (vectors,) = [name for name in members if "/vectors-" in name]
    members[vectors] = flipped(members[vectors], 40)
    del members["SHA256SUMS"]
    members["SHA256SUMS"] = "".join(
        f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in members.items()
    ).encode()
    with tarfile.open(tmp_path / "bad.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(CorruptRecordError, match="findings, the first in vectors"):
        import_storage(tmp_path / "bad.tar", tmp_path / "s")
    assert names(tmp_path) == ["bad.tar"]


@pytest.mark.parametrize("part", ["pack", "vectors", "no pack", "no vectors"])
def test_damage_is_not_carried_into_a_backup(tmp_path: Path, compressor: Compressor, part: str) -> None:
    path = filled(tmp_path / "s", compressor, 2)
    found = next(path.glob("concepts/packs/*.pack" if "pack" in part else "vectors-*.faiss"))
    found.unlink() if part.startswith("no") else flip(found, 99)
    with pytest.raises(CorruptRecordError, match="nothing was exported.*compllm-rag repair"):
        export_storage(path, tmp_path / "s.tar")
    assert names(tmp_path) == ["s"]


_FULL = """
import resource
from compllm_rag import export_storage, import_storage
from compllm_rag.errors import StoreFullError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (20_000, 60_000):  # within the copy of a database, and within the archive
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for call in (lambda: export_storage(sys.argv[1], sys.argv[2]), lambda: import_storage(sys.argv[3], sys.argv[4])):
        try: call()
        except StoreFullError as error: print("full", "free some space" in str(error))
"""


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, export: Path, compressor: Compressor) -> None:
    path = filled(tmp_path / "s", compressor)
    size = (path / "catalog.db").stat().st_size
    script = _FULL.replace("20_000", str(size // 2)).replace("60_000", str(size + 100))
    before = names(tmp_path)
    done = run(script, path, tmp_path / "new.tar", export, tmp_path / "new")
    # An import writes no file that is larger than the largest of the storage.
    assert done.stdout.splitlines() == ["full True"] * 3, (done.stdout, done.stderr)
    shutil.rmtree(tmp_path / "new")
    assert names(tmp_path) == before


_KILLED = """
import os
from compllm_rag import export_storage, import_storage
from compllm_rag.storage import importing
os.link = importing._settle = die
for call in (lambda: export_storage(sys.argv[1], sys.argv[2]), lambda: import_storage(sys.argv[3], sys.argv[4])):
    child = os.fork()
    if not child:
        call()
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


def test_what_a_killed_one_left_is_gone_after_the_next(tmp_path: Path, export: Path, compressor: Compressor) -> None:
    path = filled(tmp_path / "s", compressor, 2)
    done = run(_KILLED, path, tmp_path / "new.tar", export, tmp_path / "new")
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * 2, done.stderr
    assert names(tmp_path) == [".new.importing", ".new.tar.exporting", "s"]
    export_storage(path, tmp_path / "new.tar")
    import_storage(export, tmp_path / "new")
    import_storage(tmp_path / "new.tar", tmp_path / "again")
    assert names(tmp_path) == ["again", "new", "new.tar", "s"]
    sound(tmp_path / "again")
    sound(tmp_path / "new")


def test_the_commands(tmp_path: Path, compressor: Compressor) -> None:
    path = filled(tmp_path / "s", compressor, 2)

    def command(*words: object, code: int = 0):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == code, (result.output, result.exception)
        return result

    made = json.loads(command("export", path, tmp_path / "s.tar", "--json").stdout)
    assert (made["namespaces"], made["bytes"]) == (["default"], (tmp_path / "s.tar").stat().st_size)
    done = command("import", tmp_path / "s.tar", tmp_path / "new")
    assert done.stdout.startswith("namespace default: 2 documents, ")
    assert "error: the export cannot be read" in command("import", tmp_path / "no.tar", tmp_path / "x", code=2).stderr
    assert "error: there is no storage here" in command("export", tmp_path / "x", tmp_path / "x.tar", code=2).stderr
    nowhere = command("export", path, tmp_path / "no" / "s.tar", code=2).stderr
    assert "error: the folder of the export is not there" in nowhere
    assert names(tmp_path) == ["new", "s", "s.tar"]
    with pytest.raises(UnreadableFileError, match="no plain file"):
        import_storage(tmp_path, tmp_path / "x")

"""A whole storage under kills, full disks, damage, several processes and hostile input: no wrong answer, ever."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from llama_index.core import Document

import toy
from compllm_rag import Compressor, ConceptIndex
from compllm_rag.errors import ConfigurationError, CorruptRecordError, StoreLockedError
from compllm_rag.llamaindex.repair import repair_storage
from compllm_rag.storage.compaction import compact_storage
from compllm_rag.storage.verification import verify_storage
from tests.faults.fault_samples import (
    QUESTION,
    check_whole,
    create,
    documents,
    execute,
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
from toy_embedder import HashEmbedder

pytestmark = pytest.mark.faults

# What a commit consists of, in its order: where a kill may fall between.
POINTS = {
    "before concepts": "ConceptIndex.commit = die",
    "between concepts and text": "ConceptIndex.commit = lambda self: (self.store.flush(), die())",
    "between vectors and rows": "append = GenerationFiles.append; "
    "GenerationFiles.append = lambda *a: (append(*a), die())",
    "between a vector file and rows": "GenerationFiles.append = lambda *a: None; save = GenerationFiles.save; "
    "GenerationFiles.save = lambda *a: (save(*a), die())",
    "after the commit": "GenerationFiles.keep_only = die",
}


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_between_the_parts_of_a_commit(tmp_path: Path, compressor: Compressor, point: str) -> None:
    path = filled(tmp_path / "s", compressor)
    done = run(
        "from compllm_rag.catalog.generations import GenerationFiles\n"
        "index = load(Path(sys.argv[1]))\n"
        f"{POINTS[point]}\n"
        "index.ingest(documents(7, version=1))",
        path,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    committed = point == "after the commit"
    assert sound(path).documents == (7 if committed else 6)
    with load(path, compressor) as index:
        expected = documents(7, version=1) if committed else documents()
        assert {d.id_: set(index.faiss.node_ids(d.id_)) for d in expected} == nodes(index, expected)
        found = index.as_query_engine().query(QUESTION)
        assert found.metadata["compllm"]["store"]["misses"] == 0
        again = index.ingest(documents(7, version=1))
        # Concepts that were flushed are right whatever became of the rest, and are not made twice.
        assert (again.segments_compressed > 0) == (point == "before concepts")
        check_whole(index)
    assert repair_storage(path).findings == 0


def nodes(index: ConceptIndex, expected: list[Document]) -> dict[str, set[str]]:
    """Ids of the nodes that documents have; they are digests of what the nodes say."""
    found: dict[str, set[str]] = {d.id_: set() for d in expected}
    for node in index.parser.get_nodes_from_documents(expected):
        found[node.ref_doc_id].add(node.node_id)
    return found


@pytest.mark.parametrize("limit", [1_000, 20_000, 45_000, 60_000, 100_000])
def test_a_full_disk_is_an_error_and_the_former_state_stays(tmp_path: Path, compressor: Compressor, limit: int) -> None:
    path = filled(tmp_path / "s", compressor, 3)
    done = run(
        "import resource\n"
        "from compllm_rag.errors import StoreFullError\n"
        "many = [Document(id_=f'm{i}', text=f'Number {i} is new. {toy.TEXT}' * (1 + i % 3)) for i in range(40)]\n"
        "index = load(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))\n"
        "try: index.ingest(many)\n"
        "except StoreFullError as error: print('full', 'Next step' in str(error))\n"
        "print(index.stats()['documents'], len(index.as_query_engine().query(QUESTION).source_nodes), flush=True)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "print(index.ingest(many).documents); index.close()",
        path,
        limit,
    )
    assert done.stdout == "full True\n3 4\n40\n", (done.stdout, done.stderr)
    assert sound(path).documents == 43


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 700 kB that can really be full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "none", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a file system is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_no_space_left_on_the_device(small_disk: Path, compressor: Compressor) -> None:
    path = filled(small_disk / "s", compressor, 3)
    done = run(
        "from compllm_rag.errors import StoreFullError\n"
        "index = load(Path(sys.argv[1]))\n"
        "n = 0\n"
        "try:\n"
        "    while True:\n"
        "        index.ingest([Document(id_=f'm{n}', text=f'Number {n} is new. {toy.TEXT}')]); n += 1\n"
        "except StoreFullError: print(n > 0, index.stats()['documents'] == n + 3)\n"
        "print(len(index.as_query_engine().query(QUESTION).source_nodes)); index.close()",
        path,
    )
    assert done.stdout == "True True\n4\n", (done.stdout, done.stderr)
    with load(path, compressor, read_only=True) as index:
        check_whole(index)


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_record_names_its_key_and_is_no_answer(tmp_path: Path, compressor: Compressor, damage: str) -> None:
    path = filled(tmp_path / "s", compressor)
    with load(path, compressor, read_only=True) as index:
        (node, *_) = index.as_retriever(similarity_top_k=1).retrieve(QUESTION)
        place = dict(index.store.iter_records())[index.library.passage(node.node.text).keys[0]]
    pack = path / "concepts" / "packs" / f"{place.pack:06d}.pack"
    flip(pack, place.offset + 7) if damage == "flipped" else os.truncate(pack, place.offset + 7)
    for missing in ("recompress", "text", "error"):
        with load(path, compressor, read_only=True) as index:
            with pytest.raises(CorruptRecordError, match="record [0-9a-f]{64} is damaged.*repair"):
                index.as_query_engine(missing=missing).query(QUESTION)
            assert index.as_query_engine(mode="text").query(QUESTION).source_nodes
    assert repair_storage(path, compressor=compressor, embedder=HashEmbedder()).sound
    with load(path, compressor, read_only=True) as index:
        assert index.as_query_engine(missing="error").query(QUESTION).source_nodes


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_log_of_vectors_is_found_and_made_whole_from_text(
    tmp_path: Path, compressor: Compressor, damage: str
) -> None:
    path = filled(tmp_path / "s", compressor)
    with load(path, compressor) as index:
        index.ingest(documents(7, version=1))
        index.delete_ref_doc("d2")
        kept = texts(index)
        before = index.as_retriever(similarity_top_k=9).retrieve(QUESTION)
    (log,) = path.glob("vectors-*.log")
    if damage == "flipped":
        flip(log, log.stat().st_size // 2)
    elif damage == "cut":
        os.truncate(log, log.stat().st_size - 1)
    else:
        log.unlink()
    with pytest.raises(CorruptRecordError, match="repair"):
        load(path, compressor, read_only=True)
    assert [finding.part for finding in verify_storage(path).findings] == ["vectors"]
    report = repair_storage(path, compressor=compressor, embedder=HashEmbedder())
    assert (report.sound, report.documents_lost, report.segments_compressed) == (True, (), 0)
    with load(path, compressor) as index:
        assert texts(index) == kept
        after = index.as_retriever(similarity_top_k=9).retrieve(QUESTION)
        assert [(n.node_id, n.score) for n in after] == [(n.node_id, n.score) for n in before]
        index.ingest(documents(8, version=2))
        check_whole(index)
    sound(path)


def test_answers_are_the_same_before_and_after_a_log_is_folded(tmp_path: Path, compressor: Compressor) -> None:
    path = filled(tmp_path / "s", compressor)
    with load(path, compressor) as index:
        for version in (1, 2):
            index.ingest(documents(8, version=version))
        index.delete_ref_doc("d1")
        assert list(path.glob("vectors-*.log"))

        def found() -> list[tuple[str, float]]:
            return [(n.node_id, n.score) for n in index.as_retriever(similarity_top_k=50).retrieve(QUESTION)]

        before = found()
        index.compact()
        assert not list(path.glob("vectors-*.log"))
        assert found() == before
    with load(path, compressor, read_only=True) as index:
        assert found() == before
    sound(path)


@pytest.mark.parametrize("read_only", [True, False])
def test_parts_of_different_storages_do_not_open(tmp_path: Path, compressor: Compressor, read_only: bool) -> None:
    path = filled(tmp_path / "s", compressor)
    small = filled(tmp_path / "small", compressor, 2)
    older = Path(shutil.copytree(path, tmp_path / "older"))
    with load(path, compressor) as index:
        index.ingest(documents(9, version=1))

    def mixed(name: str, *parts: tuple[Path, str]) -> Path:
        folder = Path(shutil.copytree(path, tmp_path / f"{name}{read_only}"))
        for source, part in parts:
            target = folder / part
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
            shutil.copytree(source / part, target) if (source / part).is_dir() else shutil.copy(source / part, target)
        return folder

    for folder in (
        mixed("concepts of a smaller one", (small, "concepts")),
        mixed("concepts of yesterday", (older, "concepts")),
        mixed("text of yesterday", (older, "catalog.db"), (small, "vectors-1.faiss")),
    ):
        with pytest.raises(CorruptRecordError, match="repair"):
            load(folder, compressor, read_only=read_only)
        assert not verify_storage(folder).sound
    folder = mixed("no concepts")
    shutil.rmtree(folder / "concepts")
    with pytest.raises((CorruptRecordError, FileNotFoundError)):
        load(folder, compressor, read_only=read_only)


def test_readers_see_one_generation_and_never_wait(tmp_path: Path, compressor: Compressor) -> None:
    """Number 9: a writer changes everything, again and again; each answer is of one state."""
    path = filled(tmp_path / "s", compressor)
    writer_script = (
        "index = load(Path(sys.argv[1]))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "for version in range(1, 13):\n"
        "    index.ingest(documents(6, version=version))\n"
        "    print(version, flush=True)\n"
        "    if version % 4 == 0:\n"
        "        from compllm_rag.storage.compaction import compact_storage\n"
        "        compact_storage(Path(sys.argv[1]))\n"
    )
    reader_script = (
        "import re\n"
        "index = load(Path(sys.argv[1]), read_only=True)\n"
        "seen, misses = set(), 0\n"
        "while not os.path.exists(sys.argv[2]):\n"
        "    nodes = index.as_retriever(similarity_top_k=99).retrieve(QUESTION)\n"
        "    versions = set(re.findall(r'of version (\\d+)', ' '.join(node.node.text for node in nodes)))\n"
        "    documents = {node.node.ref_doc_id for node in nodes}\n"
        "    if len(versions) != 1 or len(documents) != 6: print('torn', versions, documents, flush=True); break\n"
        "    if not seen: print('ready', flush=True)\n"  # imports and all: a writer is done in no time
        "    seen |= versions\n"
        "    for node in nodes: misses += index.library.fetch(node.node.text).misses\n"
        "print('seen', len(seen), flush=True)\n"
    )
    stop = tmp_path / "stop"
    with (
        talking(reader_script, path, stop) as one,
        talking(reader_script, path, stop) as two,
        talking(writer_script, path) as writer,
    ):
        for process in (one, two, writer):
            assert said(process) == "ready"
        tell(writer)
        for version in range(1, 13):
            assert said(writer) == str(version)
            sound(path)  # however much is written meanwhile
        assert writer.wait(timeout=60) == 0
        stop.touch()
        for reader in (one, two):
            word, number = said(reader).split()
            assert (word, int(number) > 1) == ("seen", True)
    sound(path)


def test_a_writer_that_stands_still_in_its_commit_keeps_nobody_from_reading(
    tmp_path: Path, compressor: Compressor
) -> None:
    path = filled(tmp_path / "s", compressor)
    script = (
        "from compllm_rag.catalog.generations import GenerationFiles\n"
        "append = GenerationFiles.append\n"
        "def stop(*a):\n"
        "    made = append(*a)\n"
        "    print(os.getpid(), flush=True); os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    return made\n"
        "GenerationFiles.append = stop\n"
        "index = load(Path(sys.argv[1]))\n"
        "index.ingest(documents(6, version=1)); index.close(); print('done', flush=True)\n"
    )
    with talking(script, path) as writer:
        pid = said(writer)
        with load(path, compressor, read_only=True) as reader, load(path, compressor) as other:
            assert texts(reader).keys() == {f"d{i}" for i in range(6)}
            assert "version 1" not in "".join(texts(reader).values())
            assert reader.as_query_engine().query(QUESTION).metadata["compllm"]["store"]["misses"] == 0
            with pytest.raises(StoreLockedError, match=f"process {pid} "):
                other.insert(Document(id_="late", text="A second writer."))
            os.kill(int(pid), signal.SIGCONT)
            assert said(writer) == "done"
            assert "version 0" not in "".join(texts(reader).values())
            other.insert(Document(id_="late", text="A second writer, in its turn."))
            assert "late" in texts(reader)
    sound(path)


def test_a_lock_of_the_dead_is_no_lock(tmp_path: Path, compressor: Compressor) -> None:
    path = filled(tmp_path / "s", compressor)
    with talking(
        "index = load(Path(sys.argv[1])); index.library.ensure(['Held, not flushed.'])\n"
        "index.faiss.catalog.claim(); print('held', flush=True); sys.stdin.read()",
        path,
    ) as writer:
        assert said(writer) == "held"
        with load(path, compressor) as index, pytest.raises(StoreLockedError, match=f"process {writer.pid} "):
            index.insert(Document(id_="x", text="Not now."))
        writer.kill()
        writer.wait(60)
        with load(path, compressor) as index:
            index.insert(Document(id_="x", text="Now."))
    sound(path)


def test_planted_pickles_are_never_loaded(tmp_path: Path, compressor: Compressor) -> None:
    path, sentinel = filled(tmp_path / "s", compressor), tmp_path / "sentinel"

    class Planted:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(sentinel),)

    plant = pickle.dumps(Planted())
    names = ["x.pkl", "vectors-9.faiss", "concepts/index/00/planted.val", "concepts/packs/000900.pack"]
    names += [f"{part}/{name}" for part in ("compressor", "reader") for name in ("pytorch_model.bin", "a.pt", "m.bin")]
    (path / "reader").mkdir()
    for name in names:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(plant)
    (path / "reader").rename(path / "readers")  # a reader folder without an adapter in it is refused, see below
    with load(path, compressor) as index:
        index.as_query_engine().query(QUESTION)
        index.ingest(documents(7))
    verify_storage(path, deep=True)
    compact_storage(path)
    execute(path / "concepts/index/cache.db", "UPDATE Cache SET mode = 4, value = ? WHERE length(key) = 64", plant)
    with load(path, compressor) as index, pytest.raises(CorruptRecordError):
        index.as_query_engine().query(QUESTION)
    execute(path / "catalog.db", "UPDATE kv SET value = ?", plant)
    execute(path / "catalog.db", "UPDATE nodes SET node = ?", plant)
    check = verify_storage(path, deep=True)
    assert {"text", "concepts"} <= {finding.part for finding in check.findings}
    with pytest.raises(Exception):
        load(path, compressor).as_query_engine().query(QUESTION)
    assert not sentinel.exists()
    pickle.loads(plant)  # where pickles are loaded, it goes off
    assert sentinel.exists()


def test_strange_ids_name_no_files(tmp_path: Path, compressor: Compressor) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ids = ["../x", "/etc/x", "a\0b", "i" * 10_000, "..", "con:", "%2e%2e/"]
    with create(tmp_path / "link" / "s", compressor) as index:
        index.ingest([Document(id_=id_, text=f"Document {n} of many.") for n, id_ in enumerate(ids)])
        assert set(texts(index)) == set(ids)
        for bad in ("\ud800", "a\udfffb"):
            with pytest.raises(ConfigurationError, match="Unicode"):
                index.ingest([Document(id_=bad, text="Half a character.")])
        assert set(texts(index)) == set(ids)
        index.delete_ref_doc("../x")
        check_whole(index)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]
    storage = tmp_path / "real" / "s"
    assert stat.S_IMODE(storage.stat().st_mode) == 0o700
    for file in storage.rglob("*"):
        private = not file.is_relative_to(storage / "compressor")  # weights, which say nothing about the text
        assert not private or stat.S_IMODE(file.stat().st_mode) in (0o600, 0o700), file
    sound(storage)


STRANGE = {
    "empty": ("", 0),
    "white": (" \n\t ", None),
    "one token": ("a", 1),
    "emoji": ("\U0001f469\u200d\U0001f680" * 30, None),
    "control": ("\x00\x01\x7f" * 20, None),
    "one long word": ("lighthouse" * 500, None),
    "right to left": ("\u202eshalom \u05e9\u05dc\u05d5\u05dd", None),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_texts_are_ingested_whole(tmp_path: Path, compressor: Compressor, kind: str) -> None:
    text, chunks = STRANGE[kind]
    with create(tmp_path / "s", compressor) as index:
        index.ingest([Document(id_="d", text=text), Document(id_="other", text=toy.TEXT)])
        found = [node.text for node in index.faiss.iter_nodes() if node.ref_doc_id == "d"]
        assert "".join(found) == text
        assert chunks is None or len(found) == chunks
        for node in index.faiss.iter_nodes():
            fetched = index.library.fetch(node.text, missing="error")
            assert fetched.concepts.shape[0] == sum(index.library.passage(node.text).n_concepts)
        check_whole(index)
        index.as_query_engine(similarity_top_k=9).query(QUESTION)
    sound(tmp_path / "s")


@pytest.mark.slow
def test_a_text_of_a_million_tokens(tmp_path: Path, compressor: Compressor) -> None:
    sentences = (f"Entry {i} of the log says that ship {i * 7919 % 99991} passed at {i % 24}. " for i in range(36_000))
    text = "".join(sentences)
    with create(tmp_path / "s", compressor) as index:
        report = index.ingest([Document(id_="log", text=text)])
        assert report.source_tokens >= 1_000_000
        assert sum(len(node.text) for node in index.faiss.iter_nodes()) == len(text)
        assert index.ingest([Document(id_="log", text=text + "The end.")]).segments_compressed <= 3
    sound(tmp_path / "s")

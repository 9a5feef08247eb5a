"""Storages that share their concepts in Redis, against a real server: one compresses, the others find."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compllm_rag import Compressor, ConceptIndex
from compllm_rag.cli.main import app
from compllm_rag.errors import ConfigurationError, StorageMismatchError, StoreUnavailableError, UnsupportedFormatError
from compllm_rag.llamaindex.repair import repair_storage
from compllm_rag.storage import stores
from compllm_rag.storage.compaction import compact_storage
from compllm_rag.storage.manifest import META_KEY, Manifest, read_manifest
from compllm_rag.storage.migration import migrate_storage
from compllm_rag.storage.namespaces import delete_namespace
from compllm_rag.storage.stats import storage_stats
from compllm_rag.storage.verification import verify_storage
from compllm_rag.store import RedisStore
from tests.faults.fault_samples import QUESTION, check_whole, create, documents, load, said, sound, talking, texts
from tests.redis_servers import RedisProcess
from toy_embedder import HashEmbedder


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is away is given up soon."""
    make = stores.RedisStore
    monkeypatch.setattr(stores, "RedisStore", lambda *a, **o: make(*a, **{"retry_s": 1.0, **o}))


def records(server: RedisProcess) -> int:
    with server.client() as client:
        return sum(1 for _ in client.scan_iter("*:record:*"))


def test_what_one_server_compressed_the_next_one_finds(
    tmp_path: Path, compressor: Compressor, redis_server: RedisProcess
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    with create(one, compressor, concept_store=redis_server.url) as index:
        assert isinstance(index.store, RedisStore)
        made = index.ingest(documents(6))
        assert made.segments_compressed == records(redis_server) > 0
        with create(two, compressor, concept_store=redis_server.url) as other:
            assert other.ingest(documents(4)).segments_compressed == 0
            found = other.as_query_engine(missing="error").query(QUESTION)
            assert found.metadata["compllm"]["store"]["misses"] == 0
            check_whole(other)
    assert not (one / "concepts").exists()
    assert sound(one).records == sound(two).records == made.segments_compressed
    assert storage_stats(two)["unique_segments"] == made.segments_compressed
    assert not migrate_storage(one).changed
    # A document deleted in one storage stays readable in the other, and goes with its last reader.
    with load(one, compressor) as index:
        for i in range(6):
            index.delete_ref_doc(f"d{i}")
    report = compact_storage(one).concepts
    assert 0 < report.records_dropped < made.segments_compressed
    with load(two, compressor, read_only=True) as other:
        check_whole(other)
        assert other.as_query_engine(missing="error").query(QUESTION).source_nodes
    with load(two, compressor) as other:
        for i in range(4):
            other.delete_ref_doc(f"d{i}")
        other.compact()
    assert records(redis_server) == 0
    sound(one), sound(two)


def test_the_storage_remembers_where_and_no_password(
    tmp_path: Path, compressor: Compressor, redis_server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    url = f"redis://:anything@127.0.0.1:{redis_server.port}/0"
    with redis_server.client() as client:
        client.config_set("requirepass", "anything")
    redis_server.password = "anything"
    with create(path, compressor, concept_store=url) as index:
        index.ingest(documents(3))
    manifest = read_manifest(path)
    assert (manifest.concept_store.url, "anything" in manifest.to_json()) == (redis_server.url, False)
    with pytest.raises(StoreUnavailableError, match="COMPLLM_REDIS_PASSWORD"):
        load(path, compressor)
    with load(path, compressor, concept_store=url) as index:
        check_whole(index)
    monkeypatch.setenv("COMPLLM_CONCEPT_STORE", url)
    sound(path)
    monkeypatch.delenv("COMPLLM_CONCEPT_STORE")
    monkeypatch.setenv("COMPLLM_REDIS_PASSWORD", "anything")
    sound(path)
    done = CliRunner().invoke(app, ["verify", str(path), "--json"])
    assert (done.exit_code, json.loads(done.stdout)["sound"]) == (0, True)


def test_a_release_that_knows_no_shared_stores_refuses_such_a_storage_and_no_other(
    tmp_path: Path, compressor: Compressor, redis_server: RedisProcess
) -> None:
    class Former(Manifest):
        concept_store: None = None

    with create(tmp_path / "shared", compressor, concept_store=redis_server.url) as index:
        kept = index.faiss.catalog.get_meta(META_KEY)
    with pytest.raises(UnsupportedFormatError):
        Former.parse(kept)
    with create(tmp_path / "own", compressor) as index:
        assert "concept_store" not in json.loads(index.faiss.catalog.get_meta(META_KEY))


def test_what_makes_no_sense_is_refused(tmp_path: Path, compressor: Compressor, redis_server: RedisProcess) -> None:
    for url in ("s3://bucket", "folder", "redis://"):
        with pytest.raises(ConfigurationError, match="redis://HOST"):
            create(tmp_path / "s", compressor, concept_store=url)
    with pytest.raises(ConfigurationError, match="storage_dir"):
        create(None, compressor, concept_store=redis_server.url)
    create(tmp_path / "own", compressor).close()
    for opening in (create, load):
        with pytest.raises(StorageMismatchError, match="its own folder"):
            opening(tmp_path / "own", compressor, concept_store=redis_server.url)


def test_a_server_killed_in_the_middle_of_an_ingest_comes_back(
    tmp_path: Path, compressor: Compressor, redis_server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compllm_rag.llamaindex.ingest._BATCH_CHARS", 900)
    path, put = tmp_path / "s", RedisStore.put
    back = threading.Timer(0.5, redis_server.start)

    def dies(self: RedisStore, pairs: object) -> int:
        if back.ident is None and records(redis_server):
            redis_server.kill()
            back.start()
        return put(self, pairs)

    monkeypatch.setattr(RedisStore, "put", dies)
    monkeypatch.setattr("compllm_rag.store.redis_server.RETRY_S", 30.0)
    with create(path, compressor, concept_store=redis_server.url) as index:
        index.store.server._retry_s = 30.0
        index.ingest(documents(8))
        back.join(60)
        check_whole(index)
    assert sound(path).documents == 8


def test_a_server_that_stays_away_undoes_the_ingest_and_nothing_else(
    tmp_path: Path, compressor: Compressor, redis_server: RedisProcess
) -> None:
    path = tmp_path / "s"
    with create(path, compressor, concept_store=redis_server.url) as index:
        index.ingest(documents(3))
        redis_server.kill()
        with pytest.raises(StoreUnavailableError, match="Next step"):
            index.ingest(documents(6, version=1))
        assert set(texts(index)) == {"d0", "d1", "d2"}
        with pytest.raises(StoreUnavailableError):
            index.as_query_engine().query(QUESTION)
        assert index.as_query_engine(mode="text").query(QUESTION).source_nodes
        for call in (lambda: verify_storage(path), lambda: delete_namespace(path, "default")):
            with pytest.raises(StoreUnavailableError):
                call()
        done = CliRunner().invoke(app, ["verify", str(path)])
        assert (done.exit_code, "Next step" in done.output, "DAMAGED" in done.output) == (2, True, False)
        redis_server.start()
        index.ingest(documents(6, version=1))
        check_whole(index)
    sound(path)


def test_a_process_killed_in_the_middle_of_an_ingest_leaves_a_sound_storage(
    tmp_path: Path, compressor: Compressor, redis_server: RedisProcess
) -> None:
    path = tmp_path / "s"
    script = (
        "from compllm_rag.store import RedisStore\n"
        "flush = RedisStore.flush\n"
        "index = create(Path(sys.argv[1]), concept_store=sys.argv[2])\n"
        "index.ingest(documents(3))\n"
        "RedisStore.flush = lambda self: (flush(self), print('flushed', flush=True), die())\n"
        "index.ingest(documents(6, version=1))"
    )
    with talking(script, path, redis_server.url) as process:
        assert said(process) == "flushed"
        process.wait(60)
    assert sound(path).documents == 3
    with create(path, compressor) as index:
        assert index.ingest(documents(6, version=1)).segments_compressed == 0  # they were put before the kill
        check_whole(index)
    sound(path)


def test_records_that_were_lost_or_damaged_are_made_again(
    tmp_path: Path, compressor: Compressor, redis_server: RedisProcess
) -> None:
    path = tmp_path / "s"
    with create(path, compressor, concept_store=redis_server.url) as index:
        index.ingest(documents(4))
        total = index.store.stats().records
        with redis_server.client() as client:
            names = sorted(client.scan_iter("*:record:*"))
            client.setrange(names[0], 40, b"\x55\x55\x55")
        assert not index.verify(deep=True).sound
        repaired = repair_storage(path, compressor=compressor, embedder=HashEmbedder())
        assert (repaired.records_dropped, repaired.segments_compressed, repaired.sound) == (1, 1, True)
        with redis_server.client() as client:
            client.flushall()
        assert index.as_query_engine().query(QUESTION).metadata["compllm"]["store"]["misses"] > 0
        assert f"{total} segments that text refers to have no record" in str(index.verify().findings)
        assert repair_storage(path, compressor=compressor, embedder=HashEmbedder()).sound
        assert index.as_query_engine(missing="error").query(QUESTION).source_nodes
    sound(path)


def test_a_deleted_namespace_gives_its_records_up(
    tmp_path: Path, compressor: Compressor, redis_server: RedisProcess
) -> None:
    for namespace in ("acme", "other"):
        with create(tmp_path / "s", compressor, concept_store=redis_server.url, namespace=namespace) as index:
            assert index.ingest(documents(2)).segments_compressed > 0  # tenants share nothing
    half = records(redis_server) // 2
    delete_namespace(tmp_path / "s", "acme")
    assert records(redis_server) == half
    with ConceptIndex.load(tmp_path / "s", namespace="other", compressor=compressor, embedder=HashEmbedder()) as index:
        check_whole(index)


def test_the_command_line_makes_such_a_storage(
    tmp_path: Path, toy_folder: Path, redis_server: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "compllm_rag.llamaindex.storage_parts.load_embedder", lambda *a, **o: (HashEmbedder(), "hash", "0" * 64)
    )
    (tmp_path / "a.txt").write_text("The lighthouse was built in 1871. " * 9)
    words = ["ingest", str(tmp_path / "a.txt"), "--storage", str(tmp_path / "s"), "--llm", str(toy_folder)]
    begun = time.monotonic()
    done = CliRunner().invoke(app, [*words, "--concept-store", "redis://127.0.0.1:1/0"])
    assert (done.exit_code, "Next step: start it" in done.output) == (2, True), done.output
    assert time.monotonic() - begun < 60
    done = CliRunner().invoke(app, [*words, "--concept-store", redis_server.url, "--json"])
    assert done.exit_code == 0, done.output
    assert records(redis_server) > 0

"""The store in Redis, against a real server: refusals, lost connections, damage, several processes, owners."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compllm_rag.errors import (
    ConfigurationError,
    CorruptRecordError,
    StorageMismatchError,
    StoreFullError,
    StoreLockedError,
    StoreReadOnlyError,
    StoreSettingsWarning,
    StoreUnavailableError,
    UnsupportedFormatError,
)
from compllm_rag.store import RedisStore, redis_upkeep
from compllm_rag.store.redis_server import PASSWORD_VARIABLE, without_password
from compllm_rag.store.verification import StoreCheck
from tests import processes
from tests.processes import said, tell
from tests.redis_servers import RedisProcess, installed
from tests.store.store_samples import HIDDEN, concepts, key, python, records, same


def opened(server: RedisProcess, **options) -> RedisStore:
    return RedisStore(server.url, **{"hidden_size": HIDDEN, "retry_s": 5.0, **options})


@pytest.fixture
def own(shared_redis: RedisProcess) -> dict[str, str]:
    """A space that no other test has."""
    return {"space": uuid.uuid4().hex}


def at(store: RedisStore, number: int) -> str:
    return store.record_names([key(number)])[0]


def all_same(store: RedisStore, numbers: range) -> bool:
    return all(same(found, number) for found, number in zip(store.get(list(map(key, numbers))), numbers, strict=True))


def test_what_was_put_survives_a_kill_of_the_server(redis_server: RedisProcess) -> None:
    with opened(redis_server) as store:
        store.put(records(range(700)))
        store.flush()
        redis_server.kill()
        redis_server.start()
        assert all_same(store, range(700))
        assert store.verify(deep=True).damage == []
    with opened(redis_server, read_only=True) as again:
        assert (again.stats().records, all_same(again, range(700))) == (700, True)
        with pytest.raises(StoreReadOnlyError, match="reading"):
            again.put(records([1]))


def test_a_connection_that_is_lost_is_made_again_in_the_middle_of_a_put(redis_server: RedisProcess) -> None:
    back = threading.Thread(target=lambda: (time.sleep(1.0), redis_server.start()), daemon=True)

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(1200):
            if number == 600:
                redis_server.kill()
                back.start()
            yield key(number), concepts(number)

    with opened(redis_server, retry_s=30.0) as store:
        assert store.put(stream()) == 1200
        back.join(60)
        assert all_same(store, range(1200))
        with redis_server.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)
        assert store.contains([key(3), key(5000)]) == [True, False]
        assert store.stats().records == 1200
        assert store.verify(deep=True).damage == []


def test_a_server_that_stays_away_is_a_typed_error_in_bounded_time(redis_server: RedisProcess) -> None:
    with opened(redis_server, retry_s=0.5) as store:
        store.put(records(range(3)))
        redis_server.kill()
        for call in (lambda: store.put(records([9])), lambda: store.get([key(1)]), store.flush, store.stats):
            begun = time.monotonic()
            with pytest.raises(StoreUnavailableError, match="Next step: start it"):
                call()
            assert time.monotonic() - begun < 10
        with pytest.raises(ConnectionError):
            opened(redis_server, retry_s=0.1)
        redis_server.start()
        assert all_same(store, range(3))


def test_writes_that_the_server_refuses_are_an_error_and_what_was_there_stays(redis_server: RedisProcess) -> None:
    with opened(redis_server) as store, redis_server.client() as client:
        store.put(records(range(50)))
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 100_000)
        with pytest.raises(StoreFullError, match="nothing was evicted.*Next step: give it more memory"):
            store.put((key(number), concepts(number)) for number in range(50, 50_000))
        kept = store.stats().records
        assert 50 <= kept < 50_000
        assert all_same(store, range(kept))
        client.config_set("maxmemory", 0)
        assert store.verify(deep=True).damage == []
        assert store.put(records(range(kept + 1))) == 1


def test_a_server_that_cannot_save_refuses_writes(tmp_path: Path) -> None:
    installed()
    with RedisProcess(tmp_path / "r", "--appendonly", "no", "--save", "3600 1") as server, opened(server) as store:
        store.put(records([1]))
        shutil.rmtree(tmp_path / "r")
        with server.client() as client:
            client.bgsave()
            while client.info("persistence")["rdb_last_bgsave_status"] == "ok":
                time.sleep(0.02)
        with pytest.raises(StoreFullError, match="MISCONF"):
            store.put(records([2]))
        assert all_same(store, range(1, 2))


def test_a_server_that_may_drop_records_is_refused_or_warned_of(redis_server: RedisProcess) -> None:
    with redis_server.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(ConfigurationError, match="allkeys-lru.*expected noeviction.*Next step: set"):
            opened(redis_server)
        client.config_set("maxmemory-policy", "volatile-lru")
        with pytest.warns(StoreSettingsWarning, match="volatile-lru"):
            opened(redis_server).close()
        client.config_set("maxmemory-policy", "noeviction")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opened(redis_server).close()
        client.config_set("appendonly", "no")
        with pytest.warns(StoreSettingsWarning, match="appendonly yes"):
            opened(redis_server).close()


DAMAGE = {
    "flipped": lambda client, name: client.setrange(name, 30, bytes([client.getrange(name, 30, 30)[0] ^ 1])),
    "cut": lambda client, name: client.set(name, client.get(name)[:-2]),
    "longer": lambda client, name: client.append(name, b"\0"),
    "empty head": lambda client, name: client.set(name, b"CLR1"),
    "of another key": lambda client, name: client.set(name, client.get(name[:-64] + key(2))),
    "a million concepts": lambda client, name: client.setrange(name, 4, (10**6).to_bytes(4, "little")),
    "a pickle": lambda client, name: client.set(name, b"\x80\x04N."),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_names_its_key_and_is_no_data(shared_redis: RedisProcess, own: dict, damage: str) -> None:
    with opened(shared_redis, **own) as store, shared_redis.client() as client:
        store.put(records(range(6)))
        DAMAGE[damage](client, at(store, 1))
        for read in (store.get, store.get_joined):
            with pytest.raises(CorruptRecordError, match=f"record {key(1)} is damaged.*repair"):
                read([key(0), key(1)])
        assert all_same(store, range(2, 6))
        check = store.verify(deep=True)
        assert [found.key for found in check.damage] == [key(1)]
        assert check.sound.records == 5
        store.discard(check)
        assert store.contains([key(1), key(2)]) == [False, True]
        assert store.put(records([1])) == 1
        assert store.verify(deep=True).damage == []
        assert all_same(store, range(6))


def test_values_that_are_no_concepts_are_found(shared_redis: RedisProcess, own: dict) -> None:
    from compllm_rag.store.redis_layout import sealed

    with opened(shared_redis, **own) as store, shared_redis.client() as client:
        store.put(records([1]))
        client.set(at(store, 1), sealed(key(1), 2, b"\x00\x7c" * 2 * HIDDEN))
        assert "NaN" in store.verify(deep=True).damage[0].what


def test_sums_and_times_to_live_are_verified(shared_redis: RedisProcess, own: dict) -> None:
    with opened(shared_redis, **own) as store, shared_redis.client() as client:
        store.put(records(range(4)))
        assert {client.ttl(name) for name in client.scan_iter(f"{store.names.start}*")} == {-1}
        client.expire(at(store, 2), 1000)
        assert "expires" in store.verify().damage[0].what
        client.persist(at(store, 2))
        client.hincrby(store.names.totals, "records", 1)
        assert "the sums say" in store.verify().damage[0].what


def test_what_others_put_meanwhile_is_no_damage_and_stays_counted(
    shared_redis: RedisProcess, own: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, number = redis_upkeep._record_pages, itertools.count(100)
    with opened(shared_redis, **own) as store, opened(shared_redis, owner="other", **own) as other:
        store.put(records(range(6)))

        def busy(looked_at: RedisStore) -> Iterator[list[str]]:
            yield from real(looked_at)
            other.put(records([next(number)]))

        monkeypatch.setattr(redis_upkeep, "_record_pages", busy)
        assert store.verify().damage == []
        with pytest.raises(StoreLockedError, match="others who wrote"):
            store.discard(StoreCheck())
        monkeypatch.setattr(redis_upkeep, "_record_pages", real)
        assert store.verify(deep=True).damage == []
        with shared_redis.client() as client:
            client.hincrby(store.names.totals, "records", 3)
        turns = iter([busy, busy, real])
        monkeypatch.setattr(redis_upkeep, "_record_pages", lambda looked_at: next(turns)(looked_at))
        store.discard(StoreCheck())
        monkeypatch.setattr(redis_upkeep, "_record_pages", real)
        assert store.verify(deep=True).damage == []


def test_nothing_is_stale(redis_server: RedisProcess) -> None:
    with opened(redis_server) as one, opened(redis_server, owner="other") as two:
        one.put(records(range(5)))
        assert all_same(two, range(5))
        two.compact(lambda keys: [False] * len(keys))  # found by reading alone: they are not its own to drop
        assert all_same(one, range(5))
        one.compact(lambda keys: [k != key(3) for k in keys])
        assert two.get([key(3)]) == [None]
        assert two.put([(key(3), torch.ones(1, HIDDEN))]) == 1
        assert torch.equal(one.get([key(3)])[0], torch.ones(1, HIDDEN).half())
        with redis_server.client() as client:
            client.flushall()
        assert (one.get([key(1)]), one.contains([key(1)]), one.stats().records) == ([None], [False], 0)
        assert one.put(records(range(2))) == 2
        assert all_same(two, range(2))
    with opened(redis_server) as again:
        assert again.verify(deep=True).damage == []


def test_a_record_goes_with_its_last_owner(shared_redis: RedisProcess, own: dict) -> None:
    with opened(shared_redis, owner="a", **own) as a, opened(shared_redis, owner="b", **own) as b:
        a.put(records(range(600)))
        assert b.contains([key(number) for number in range(300)]) == [True] * 300  # as an ingest does
        b.put(records(range(600, 610)))
        dropped = a.compact(lambda keys: [False] * len(keys))
        assert (dropped.records_dropped, dropped.records) == (300, 310)
        assert dropped.bytes_before > dropped.bytes_after == b.stats().payload_bytes
        assert all_same(b, range(300))
        assert b.contains([key(number) for number in range(300, 600)]) == [False] * 300
        assert a.compact(lambda keys: [False] * len(keys)).records_dropped == 0
        assert b.verify(deep=True).damage == []
        freed = b.release()
        assert freed == dropped.bytes_after
        assert (b.stats().records, b.stats().concepts, b.stats().payload_bytes) == (0, 0, 0)
        with shared_redis.client() as client:
            assert client.smembers(b.names.owners) == {b"a"}


def test_spaces_know_nothing_of_each_other(shared_redis: RedisProcess, own: dict) -> None:
    with opened(shared_redis, **own) as one, opened(shared_redis, space=own["space"] + "2") as other:
        one.put(records(range(3)))
        assert other.get([key(1)]) == [None]
        other.release()
        assert (one.stats().records, other.stats().records) == (3, 0)


def test_another_width_encoding_or_version_is_refused(shared_redis: RedisProcess, own: dict) -> None:
    with opened(shared_redis, **own) as store, shared_redis.client() as client:
        store.put(records([1]))
        with pytest.raises(StorageMismatchError, match="hidden_size"):
            opened(shared_redis, hidden_size=HIDDEN * 2, **own)
        with pytest.raises(StorageMismatchError, match="encoding.*int8.*fp16"):
            opened(shared_redis, encoding="int8", **own)
        client.set(store.names.store, '{"format_version": 2}')
        with pytest.raises(UnsupportedFormatError, match="got 2, expected 1"):
            opened(shared_redis, **own)


def test_passwords_are_heeded_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed()
    secret = "s3cret/@:%"
    with RedisProcess(tmp_path / "r", "--requirepass", secret) as server:
        server.password = secret
        for options in ({}, {"read_only": True}):
            with pytest.raises(StoreUnavailableError, match=PASSWORD_VARIABLE) as none:
                opened(server, **options)
        with pytest.raises(StoreUnavailableError, match="does not let") as wrong:
            RedisStore(f"redis://:{secret[:3]}wrong@127.0.0.1:{server.port}/0", hidden_size=HIDDEN)
        shown = "".join(traceback.format_exception(none.value) + traceback.format_exception(wrong.value))
        quoted = "s3cret%2F%40%3A%25"
        with RedisStore(f"redis://:{quoted}@127.0.0.1:{server.port}/0", hidden_size=HIDDEN) as store:
            store.put(records([1]))
            shown += f"{store!r} {store.url} {store.server!r} {vars(store)} {vars(store.server)}"
            server.kill()
            with pytest.raises(StoreUnavailableError) as gone:
                store.server._retry_s = 0.1
                store.get([key(1)])
            shown += "".join(traceback.format_exception(gone.value))
            server.start()
        monkeypatch.setenv(PASSWORD_VARIABLE, secret)
        with opened(server) as store:
            assert all_same(store, range(1, 2))
        server.client().acl_setuser(
            "reader", enabled=True, passwords=["+x"], keys=["*"], categories=["+@read", "+@connection"],
            commands=["+info", "+config|get"],
        )  # fmt: skip
        reader = RedisStore(f"redis://reader:x@127.0.0.1:{server.port}/0", hidden_size=HIDDEN)
        with reader, pytest.raises(StoreReadOnlyError, match="EVALSHA"):
            assert all_same(reader, range(1, 2))
            reader.put(records([2]))
        assert secret not in shown and quoted not in shown and secret[:3] + "wrong" not in shown


def test_a_replica_is_read_and_not_written(redis_server: RedisProcess) -> None:
    with opened(redis_server) as store, redis_server.client() as client:
        store.put(records(range(3)))
        client.replicaof("127.0.0.1", "1")
        assert all_same(store, range(3))
        with pytest.raises(StoreReadOnlyError, match="primary"):
            store.put(records([9]))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "redis",
        "redis://",
        "http://h/0",
        "redis://h/x",
        "redis://h:99999/0",
        "redis://h/0?password=x",
        "redis://h/0#a",
    ],
)
def test_addresses_that_are_none_are_refused_without_showing_them(url: str) -> None:
    with pytest.raises(ConfigurationError, match="Redis server") as error:
        without_password(url)
    assert "password=x" not in str(error.value)


def test_addresses_are_kept_without_passwords() -> None:
    assert without_password("redis://h") == "redis://h:6379/0"
    assert without_password("rediss://u%40:p%2F@[::1]:7000/3") == "rediss://u%40@[::1]:7000/3"
    assert without_password("redis://:p@h/2") == "redis://h:6379/2"


def test_two_processes_share_it(redis_server: RedisProcess) -> None:
    script = (
        "from compllm_rag.store import RedisStore\n"
        "store = RedisStore(sys.argv[1], hidden_size=HIDDEN, owner=sys.argv[2])\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "new = sum(store.put(records([n])) for n in range(int(sys.argv[3]), int(sys.argv[3]) + 60))\n"
        "print(new, flush=True)\n"
        "sys.stdin.readline()\n"
        "print(all(same(store.get([key(n)])[0], n) for n in range(90)), flush=True)\n"
    )
    with (
        processes.started(python(script, redis_server.url, "one", 0)) as one,
        processes.started(python(script, redis_server.url, "two", 30)) as two,
    ):
        for process in (one, two):
            assert said(process) == "ready"
        for process in (one, two):
            tell(process)
        assert int(said(one)) + int(said(two)) == 90  # each record was new to one of them
        for process in (one, two):
            tell(process)
        assert (said(one), said(two)) == ("True", "True")
    with opened(redis_server, owner="one") as store:
        assert store.verify(deep=True).damage == []
        assert store.stats().records == 90
        assert store.compact(lambda keys: [False] * len(keys)).records_dropped == 30


def test_a_closed_store_says_so(shared_redis: RedisProcess, own: dict) -> None:
    store = opened(shared_redis, **own)
    store.close()
    store.close()
    for call in (lambda: store.put([]), lambda: store.get([]), store.flush, store.stats):
        with pytest.raises(ConfigurationError, match="closed"):
            call()

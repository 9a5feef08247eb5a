"""Looking for damage in a store in Redis, taking damaged records away, and giving up those that are dead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from operator import methodcaller
from typing import TYPE_CHECKING, Any

from compllm_rag.errors import CorruptRecordError, StoreLockedError
from compllm_rag.store.base import is_key
from compllm_rag.store.compaction import CompactReport
from compllm_rag.store.index_rows import Totals
from compllm_rag.store.redis_layout import GIVE_UP, HEAD_BYTES, head_of
from compllm_rag.store.verification import Damage, StoreCheck

if TYPE_CHECKING:
    from compllm_rag.store.reading import Progress
    from compllm_rag.store.redis import RedisStore

_PAGE = 256
_LOOKS = 5  # others write meanwhile


def check_space(store: RedisStore, *, deep: bool, progress: Progress | None) -> StoreCheck:
    """Check every record of a store and whether they add up; see `RedisStore.verify`."""
    for _ in range(_LOOKS):
        before, made = store.totals(), _check(store, deep, progress)
        if still := store.totals() == before:
            break
    # Where somebody wrote during every look, it cannot be told whether records and sums agree.
    if still and not made.damage and made.sound != before:
        made.damage.append(Damage(f"Redis: the sums say {before}, the records {made.sound}"))
    return made


def _check(store: RedisStore, deep: bool, progress: Progress | None) -> StoreCheck:
    made, total, seen = StoreCheck(), max(store.totals().records, 1), 0
    for keys in _record_pages(store):
        for key, value, wrong in _looked_at(store, keys, deep):
            trouble = wrong or (store.wrong(key, value) if deep else None)
            if trouble is not None:
                made.damage.append(Damage(f"record {key[:80]}: {trouble}", key if is_key(key) else None))
                continue
            n_concepts, nbytes = head_of(key, value)
            sums = (made.sound.records + 1, made.sound.concepts + n_concepts, made.sound.payload_bytes + nbytes)
            made.sound = Totals(*sums)
        seen += len(keys)
        if progress:
            progress("checking concept records", min(seen / total, 1.0))
    made.pack_bytes = made.sound.payload_bytes
    return made


def _looked_at(store: RedisStore, keys: Sequence[str], deep: bool) -> Iterator[tuple[str, bytes, str | None]]:
    """Each record with its bytes, or its head alone, and what is wrong at first sight."""
    names = store.record_names(keys)

    def look(client: Any) -> list[Any]:
        with client.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.get(name) if deep else pipeline.getrange(name, 0, HEAD_BYTES - 1)
                pipeline.strlen(name)
                pipeline.pttl(name)
            return list(pipeline.execute())

    answers = store.server.call(look)
    for place, key in enumerate(keys):
        value, length, left_ms = answers[3 * place : 3 * place + 3]
        if not length:
            continue  # deleted since the names were listed
        yield key, value, _at_first_sight(key, value, length, left_ms)


def _at_first_sight(key: str, value: bytes, length: int, left_ms: int) -> str | None:
    if not is_key(key):
        return "a name that is no record key"
    if left_ms >= 0:
        return f"it expires in {left_ms} ms, which nobody here asked for"
    try:
        _, nbytes = head_of(key, value)
    except CorruptRecordError as error:
        return str(error.got)
    return None if nbytes + HEAD_BYTES == length else f"{length - HEAD_BYTES} bytes of payload instead of {nbytes}"


def discard_damaged(store: RedisStore, check: StoreCheck) -> None:
    """Delete damaged records for all owners, and set the sums to those of the records that are there then.

    Raises:
        StoreLockedError: Others wrote all the time, so that the sums could not be set; the records are gone.
    """
    from redis.exceptions import WatchError

    names = store.record_names([damage.key for damage in check.damage if damage.key is not None])

    def delete(client: Any) -> None:
        with client.pipeline(transaction=True) as pipeline:
            for name in names:
                pipeline.unlink(name)
            pipeline.execute()

    def settle(client: Any) -> bool:
        with client.pipeline(transaction=True) as pipeline:
            pipeline.watch(store.names.totals)  # whoever puts or gives up a record changes it
            found = _check(store, False, None).sound
            pipeline.multi()
            pipeline.hset(store.names.totals, mapping=asdict(found))
            try:
                pipeline.execute()
            except WatchError:
                return False
        return True

    if names:
        store.server.call(delete)
    if not any(store.server.call(settle) for _ in range(_LOOKS)):
        raise StoreLockedError(
            "the sums of the concept store could not be set",
            got=f"others who wrote during each of {_LOOKS} looks at it",
            next_step="repair once more while nobody ingests",
        )


def give_up_dead(
    store: RedisStore, live: Callable[[Sequence[str]], Sequence[bool]] | None, progress: Progress | None
) -> CompactReport:
    """Give up the records of an owner that nothing of its refers to; see `RedisStore.compact`."""
    before, dropped, seen = store.totals(), 0, 0
    total = max(store.server.call(lambda client: client.scard(store.names.owned)), 1)
    for keys in [] if live is None else _owned_pages(store):
        dead = [key for key, alive in zip(keys, live(keys), strict=True) if not alive] if live else []
        if dead:
            names = [store.names.totals, store.names.owners, store.names.owned, *store.record_names(dead)]
            given: list[str | bytes | int] = [
                store.names.owned_start,
                store.names.owner,
                HEAD_BYTES,
                *map(bytes.fromhex, dead),
            ]
            dropped += store.server.run(GIVE_UP, names, given)[0]
        seen += len(keys)
        if progress:
            progress("dropping concept records", min(seen / total, 1.0))
    after = store.totals()
    return CompactReport(after.records, dropped, 0, 0, before.payload_bytes, after.payload_bytes)


def _owned_pages(store: RedisStore) -> Iterator[list[str]]:
    """Keys of an owner's records; a page may name one that was named before."""
    cursor = 0
    while True:
        cursor, found = store.server.call(methodcaller("sscan", store.names.owned, cursor, count=_PAGE))
        yield [digest.hex() for digest in found if len(digest) == 32]
        if not cursor:
            return


def _record_pages(store: RedisStore) -> Iterator[list[str]]:
    """Keys of all records of the space, each once."""
    cursor, start, seen = 0, store.names.record_start, set[bytes]()
    while True:
        # The braces of a name mean themselves in a pattern of Redis; brackets, stars and question marks are not in it.
        cursor, names = store.server.call(methodcaller("scan", cursor, match=f"{start}*", count=8 * _PAGE))
        fresh = [name for name in dict.fromkeys(names) if name not in seen]
        seen.update(fresh)
        keys = [name.decode(errors="backslashreplace").removeprefix(start) for name in fresh]
        for first in range(0, len(keys), _PAGE):
            yield keys[first : first + _PAGE]
        if not cursor:
            return

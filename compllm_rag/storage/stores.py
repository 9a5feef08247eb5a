"""The concept store of a storage, opened in one place."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import overload

from compllm_rag.errors import ConfigurationError, StorageMismatchError
from compllm_rag.storage.manifest import Manifest, SharedStore
from compllm_rag.store import ConceptStore, DiskStore, DurableStore, MemoryStore, RedisStore
from compllm_rag.store.redis_server import SCHEMES, without_password

_URL = re.compile(r"([A-Za-z][\w+.-]*)://")
STORE_VARIABLE = "COMPLLM_CONCEPT_STORE"


@overload
def open_store(manifest: Manifest, where: None) -> MemoryStore: ...
@overload
def open_store(
    manifest: Manifest, where: str | Path, *, read_only: bool = False, counted: bool = True, url: str | None = None
) -> DurableStore: ...
def open_store(
    manifest: Manifest,
    where: str | Path | None,
    *,
    read_only: bool = False,
    counted: bool = True,
    url: str | None = None,
) -> ConceptStore:
    """Open the store that a storage keeps its concepts in, or make it.

    Args:
        manifest: Of the storage; says how wide concepts are and how they are written, and which store it shares.
        where: The store's folder, or `redis://HOST:PORT/NUMBER`; None keeps concepts in memory.
        read_only: Write nothing; see `DiskStore`.
        counted: Refuse an index that holds more or fewer records than were written; see `DiskStore`.
        url: Where the server of a shared store is now; None takes the environment variable `COMPLLM_CONCEPT_STORE`,
            else what the manifest says.

    Raises:
        ConfigurationError: A URL of no known store.
        StorageMismatchError: A URL is given, and the storage keeps its concepts in its own folder; or see `DiskStore`.
        CorruptRecordError, UnsupportedFormatError: See `DiskStore`.
        StoreUnavailableError, MissingExtraError: See `RedisStore`.
    """
    shared = manifest.concept_store
    if shared is None and url is not None:
        raise StorageMismatchError(
            "this storage keeps its concepts in its own folder",
            got=_shown(url),
            expected="no concept_store",
            next_step="leave it out, or ingest into a new storage with it",
        )
    if shared is not None:
        now = url or os.environ.get(STORE_VARIABLE) or shared.url
        return _shared(manifest, now, owner=shared.owner, read_only=read_only)
    if where is None:
        return MemoryStore(manifest.width, encoding=manifest.encoding)
    if isinstance(where, str) and _URL.match(where):
        return _shared(manifest, where, owner="default", read_only=read_only)
    return DiskStore(
        where,
        hidden_size=manifest.width,
        read_only=read_only,
        encoding=manifest.encoding,
        counted=counted,
    )


def shared_store(url: str | None, folder: Path | None) -> SharedStore | None:
    """What the manifest of a new storage says of the store that it shares.

    Args:
        url: What was asked for; None for a store of its own.
        folder: The storage; None in memory.

    Raises:
        ConfigurationError: A URL of no known store, or the storage lies in memory.
    """
    if url is None:
        return None
    kept = _checked(url)
    if folder is None:
        raise ConfigurationError(
            "an index in memory keeps its concepts there as well",
            got=f"concept_store={kept}",
            next_step="give it a storage_dir, or leave concept_store out",
        )
    return SharedStore(url=kept, owner=secrets.token_hex(8))


def _shared(manifest: Manifest, url: str, *, owner: str, read_only: bool) -> RedisStore:
    _checked(url)
    # Part of every key already; apart, they can be counted and deleted apart.
    space = f"{manifest.ingest.namespace} / {manifest.fingerprint} / {manifest.encoding}"
    return RedisStore(
        url, hidden_size=manifest.width, space=space, owner=owner, read_only=read_only, encoding=manifest.encoding
    )


def _checked(url: str) -> str:
    scheme = _URL.match(url)
    if scheme is None or scheme[1] not in SCHEMES:
        raise ConfigurationError(
            "this kind of concept store is not known",
            got=f"{scheme[1]}://" if scheme else "no address of a server",
            expected="redis://HOST:PORT/NUMBER or rediss://",
            next_step="name such a server, or leave it out to keep concepts in the storage folder",
        )
    return without_password(url)


def _shown(url: str) -> str:
    """A URL without what may be a password."""
    try:
        return without_password(url)
    except ConfigurationError:
        return "an address of a server"

"""What a store says about itself, and the folder it lies in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from compllm_rag.errors import (
    CorruptRecordError,
    StorageMismatchError,
    StorageNotFoundError,
    StoreReadOnlyError,
    UnsupportedFormatError,
)
from compllm_rag.store.codec import Encoding
from compllm_rag.store.encodings import FP16, encoding_named, encoding_tagged
from compllm_rag.store.faults import translated_errors
from compllm_rag.store.packs import STORE_VERSION, sync_folder

MANIFEST_NAME = "store.json"
_MOST_BYTES = 2**16
_PARTS = {"packs", "index", "writer.lock", f"{MANIFEST_NAME}.tmp"}  # what a creation cut short leaves behind


class StoreManifest(BaseModel):
    """Format of one disk store; written once, when it is created.

    Attributes:
        kind: Says what the file is.
        format_version: Version of manifest, packs and index rows.
        hidden_size: Width of every concept.
        encoding: Tag of the encoding of the payloads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["compllm-rag concept store"] = "compllm-rag concept store"
    format_version: Literal[1] = STORE_VERSION
    hidden_size: int
    encoding: str = FP16.tag

    @property
    def codec(self) -> Encoding:
        """The encoding itself.

        Raises:
            UnsupportedFormatError: This release has no such encoding.
        """
        return encoding_tagged(self.encoding)

    @classmethod
    def load(cls, folder: Path, *, hidden_size: int, encoding: str | None = None) -> Self:
        """Read the manifest of a store and compare it with what is asked for.

        Raises:
            StorageNotFoundError: There is none.
            UnsupportedFormatError: It has another format version or encoding.
            CorruptRecordError: It cannot be parsed.
            StorageMismatchError: It has another hidden_size, or an encoding other than the one asked for.
            ConfigurationError: There is no encoding of that name.
        """
        path = folder / MANIFEST_NAME
        try:
            with translated_errors(path, writing=False), path.open("rb") as file:
                text = file.read(_MOST_BYTES)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StorageNotFoundError(
                "no concept store lies here", got=folder, next_step="check the path, or ingest into it first"
            ) from error
        manifest = cls._parse(text, path)
        own = manifest.codec
        if manifest.hidden_size != hidden_size:
            raise StorageMismatchError(
                "the concept store was made for a target LLM of another width",
                got=f"hidden_size {manifest.hidden_size} in {path}",
                expected=f"hidden_size {hidden_size}",
                next_step="use the LLM it was made with, or ingest into another folder",
            )
        if encoding is not None and encoding_named(encoding) is not own:
            raise StorageMismatchError(
                "the concept store was made with another encoding",
                got=f"{own.name} in {path}",
                expected=encoding,
                next_step="leave the encoding out to use the store's own, or ingest into another folder",
            )
        return manifest

    @classmethod
    def _parse(cls, text: bytes, path: Path) -> Self:
        try:
            fields = json.loads(text)
            version = fields.get("format_version") if isinstance(fields, dict) else None
            if isinstance(version, int) and version != STORE_VERSION:
                raise UnsupportedFormatError(
                    "the concept store has a format this release does not read",
                    got=f"version {version} in {path}",
                    expected=f"version {STORE_VERSION}",
                    next_step="upgrade compllm-rag",
                )
            return cls.model_validate(fields)
        except UnsupportedFormatError:
            raise  # a ValueError, too
        except (ValueError, RecursionError, ValidationError) as error:
            raise CorruptRecordError(
                "the manifest of the concept store is damaged",
                got=f"{type(error).__name__} in {path}",
                next_step="restore the folder from a copy, or delete it and ingest again",
            ) from error

    def save(self, folder: Path) -> None:
        """Write the manifest so that it is there wholly or not at all."""
        path, draft = folder / MANIFEST_NAME, folder / f"{MANIFEST_NAME}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        with translated_errors(path, writing=True):
            with os.fdopen(os.open(draft, flags, 0o600), "wb") as file:
                file.write(self.model_dump_json(indent=2).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
            sync_folder(folder)


def prepare_folder(folder: Path) -> None:
    """Make the folder of a store, or prove that this one can be written and holds nothing else.

    A folder that becomes a store is closed to other users: concepts carry the access rights of their text.

    Raises:
        StorageMismatchError: Something else lies there.
        StoreReadOnlyError: It cannot be written.
    """
    with translated_errors(folder, writing=True):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700)
            sync_folder(folder.parent)
            return
        except FileExistsError:
            pass
        if not folder.is_dir() or not ((folder / MANIFEST_NAME).exists() or set(os.listdir(folder)) <= _PARTS):
            raise StorageMismatchError(
                "something else lies where the concept store should be",
                got=folder,
                expected="a concept store, or an empty folder",
                next_step="name another folder",
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise StoreReadOnlyError(
                "the concept store cannot be written",
                got=folder,
                next_step="open it with read_only=True, or give this user the right to write there",
            )
        if not (folder / MANIFEST_NAME).exists():
            folder.chmod(0o700)

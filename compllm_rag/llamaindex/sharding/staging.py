"""The folder that a driver and its workers share while a corpus is encoded.

```
<staging>/staging.json        marks the folder, written first
<staging>/lock                who drives
<staging>/job.json            what workers need to know
<staging>/compressor, reader  the adapters of the storage
<staging>/parts/KEY.jsonl     documents of a part, as they are to be ingested
<staging>/shards/KEY/         what a worker made of it; see `shards.py`
<staging>/attempts/KEY        a byte for each time that a worker began with it in this run
```

A key is a digest of the documents of a part and of everything that decides what becomes of them. So a shard that is
there is right, whoever made it and when, and a part is never encoded twice.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama_index.core.schema import Document
from pydantic import BaseModel

from compllm_rag.catalog.generations import sync_folder
from compllm_rag.errors import ConfigurationError, CorruptRecordError, StorageNotFoundError, StoreLockedError
from compllm_rag.fingerprint import tagged_digest
from compllm_rag.llamaindex.readers.found import FileDocument
from compllm_rag.storage.adapter_files import COMPRESSOR, READER
from compllm_rag.storage.manifest import Manifest
from compllm_rag.storage.staging import remove
from compllm_rag.store.faults import Subject, translated_errors
from compllm_rag.store.lock import WriterLock

_MARK, _LOCK, _JOB, _PARTS, _SHARDS = "staging.json", "lock", "job.json", "parts", "shards"
_ATTEMPTS = "attempts"
_FORMAT = {"format": "compllm-rag/staging", "version": 1}
_SUBJECT = Subject("the staging folder", "the staging folder", "free some space, then run the same command again")


class Job(BaseModel):
    """What workers need to know.

    Attributes:
        manifest: Of the storage, as JSON.
        llm: Where the target LLM lies for workers.
        embedder: The same for the embedder.
        dtype: Of the LLM; None takes the default.
        device: Torch device of both.
        threads: Of torch, for each worker on a CPU.
    """

    manifest: str
    llm: str
    embedder: str
    dtype: str | None = None
    device: str = "cpu"
    threads: int = 1

    @property
    def storage(self) -> Manifest:
        """Manifest of the storage."""
        return Manifest.parse(self.manifest)


class Staging:
    """A staging folder; workers open it by its path alone.

    Args:
        folder: Its path, the same on every machine.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts, self.shards = folder / _PARTS, folder / _SHARDS

    @contextmanager
    def driven(self) -> Iterator[None]:
        """Make the folder, or take up one that an earlier run left; nobody else drives it meanwhile.

        Raises:
            ConfigurationError: Something else lies there.
            StoreLockedError: Another process drives it.
            StoreReadOnlyError, StoreFullError: It cannot be written.
        """
        with translated_errors(self.folder, writing=True, subject=_SUBJECT):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not (self.folder / _MARK).exists():
                if any(path.name != _LOCK for path in self.folder.iterdir()):
                    raise _not_ours(self.folder)
                _write(self.folder / _MARK, json.dumps(_FORMAT))
            elif _read_json(self.folder / _MARK) != _FORMAT:
                raise _not_ours(self.folder)
        try:
            lock = WriterLock(self.folder / _LOCK)
        except StoreLockedError as error:
            raise StoreLockedError(
                "another process ingests by way of this staging folder", got=error.got, next_step="wait for it"
            ) from error
        try:
            with translated_errors(self.folder, writing=True, subject=_SUBJECT):
                self.parts.mkdir(mode=0o700, exist_ok=True)
                self.shards.mkdir(mode=0o700, exist_ok=True)
                remove(self.folder / _ATTEMPTS)
                (self.folder / _ATTEMPTS).mkdir(mode=0o700)
                for left in self.shards.glob(".*"):  # of workers that were killed
                    remove(left)
            yield
        finally:
            lock.release()

    def put_job(self, job: Job, storage: Path) -> None:
        """Tell workers what to do, and give them the adapters of the storage."""
        with translated_errors(self.folder, writing=True, subject=_SUBJECT):
            for name in (COMPRESSOR, READER):
                remove(self.folder / name)
                if (storage / name).is_dir():
                    shutil.copytree(storage / name, self.folder / name)
            _write(self.folder / _JOB, job.model_dump_json())

    def job(self) -> Job:
        """What workers are to do.

        Raises:
            StorageNotFoundError: This machine does not see the folder.
        """
        try:
            return Job.model_validate_json((self.folder / _JOB).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise StorageNotFoundError(
                "a worker does not find the staging folder",
                got=f"no {self.folder / _JOB} on {os.uname().nodename}",
                expected="a folder that all machines share under the same path",
                next_step="name one by --staging",
            ) from error

    def put_part(self, documents: Iterable[Document], identity: str) -> str:
        """Write the documents of a part, unless they are there.

        Args:
            documents: The documents.
            identity: Of everything else that decides what becomes of them.

        Returns:
            The key of the part.
        """
        lines = "".join(f"{json.dumps(_row(document))}\n" for document in documents)
        key = tagged_digest("compllm-rag/part", identity=identity, documents=lines)
        path = self._part_file(key)
        if not path.exists():
            with translated_errors(path, writing=True, subject=_SUBJECT):
                _write(path, lines)
        return key

    def part(self, key: str) -> list[Document]:
        """The documents of a part.

        Raises:
            CorruptRecordError: They cannot be read.
        """
        path = self._part_file(key)
        try:
            with path.open(encoding="utf-8") as lines:
                return [_document(json.loads(line)) for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptRecordError(
                "a part of the corpus cannot be read from the staging folder",
                got=f"{path}: {error}",
                next_step="remove that file, then run the same command again",
            ) from error

    def _part_file(self, key: str) -> Path:
        return self.parts / f"{key}.jsonl"

    def has_shard(self, key: str) -> bool:
        """Whether a part is encoded."""
        return (self.shards / key).is_dir()

    @contextmanager
    def making_shard(self, key: str) -> Iterator[Path]:
        """An empty folder that becomes the shard of a part at the end of the block, unless another was faster."""
        draft = self.shards / f".{key[:16]}-{os.getpid()}-{secrets.token_hex(4)}"
        with translated_errors(self.shards, writing=True, subject=_SUBJECT):
            draft.mkdir(mode=0o700)
            try:
                yield draft
                sync_folder(draft)
                try:
                    draft.rename(self.shards / key)
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise  # else what is there is the same
                sync_folder(self.shards)
            finally:
                shutil.rmtree(draft, ignore_errors=True)

    def begin(self, key: str) -> int:
        """Note that a worker begins with a part; tells how often that was in this run.

        A part that ends the process of every worker it is given to leaves no other trace.
        """
        path = self.folder / _ATTEMPTS / key
        with translated_errors(path, writing=True, subject=_SUBJECT), path.open("ab") as file:
            file.write(b".")
            file.flush()
            return file.tell()

    def remove(self) -> None:
        """Remove the folder: all that was in it is committed, or there was nothing to do."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _row(document: Document) -> dict[str, Any]:
    file = document if isinstance(document, FileDocument) else None
    return {
        "document": document.to_dict(),
        "file": file.file if file else None,
        "within": file.within if file else None,
    }


def _document(row: dict[str, Any]) -> Document:
    if row["file"] is None:
        return Document.from_dict(row["document"])
    made = FileDocument.from_dict(row["document"])
    made._file, made._within = row["file"], row["within"]
    return made


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with draft.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _not_ours(folder: Path) -> ConfigurationError:
    return ConfigurationError(
        "the staging folder holds something else",
        got=folder,
        expected="a new or an empty folder, or one that an interrupted run left",
        next_step="name another one by --staging",
    )

"""The files that hold the vectors of a catalog: `vectors-<n>.faiss`, and `vectors-<n>.log` with what changed since.

A commit that changes little appends to the log (see `vector_log`); one that would make the log longer than a share of
the vector file writes the next vector file, without what was removed. So an upload costs what it brings, and every
vector is written a few times in all. Whatever a commit writes is on the disk before the catalog names it, and is
checked against the SHA-256 that the catalog keeps before it is used. The files of the former state stay for readers
that are still at it. Removed vectors leave the disk with the next vector file but one, or with a compaction.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from compllm_rag.catalog import vector_log
from compllm_rag.catalog.faults import damaged, translated_errors
from compllm_rag.catalog.flat_vectors import FlatVectors

LEAST_LOG = 2**20
LOG_SHARE = 0.25  # of the vector file; what a restart reads and a search asks apart from the rest
_OURS = re.compile(r"vectors-([0-9]+)\.(faiss|log)(\.tmp)?")


@dataclass(frozen=True, slots=True)
class VectorGeneration:
    """What the catalog keeps of its vectors.

    Args:
        number: Counts commits that changed vectors; 0 is the empty index, which has no file.
        dim: Dimensions of every vector.
        ntotal: How many there are.
        file: Name of their file; empty at 0.
        sha256: Digest of the file; empty at 0.
        in_file: How many vectors are in the file, where there is a log; else `ntotal`.
        log_bytes: Bytes of the log that belong to it; 0 without a log.
        log_sha256: What closes the last record of the log; empty without a log.
    """

    number: int
    dim: int
    ntotal: int = 0
    file: str = ""
    sha256: str = ""
    in_file: int | None = None
    log_bytes: int = 0
    log_sha256: str = ""

    @property
    def base(self) -> int:
        """The number that the file had when it was written; 0 when it is none of ours."""
        found = _OURS.fullmatch(self.file)
        return int(found[1]) if found and self.file == _name(int(found[1])) else 0

    @property
    def parts(self) -> tuple[tuple[str, int | None, str], ...]:
        """Its files, for who copies them: name, bytes that belong to it (None: all), SHA-256 of these (or nothing)."""
        file = ((self.file, None, self.sha256),) if self.file else ()
        # The digest of a log is that of its last record alone, which whoever loads it checks.
        return (*file, (_log_name(self.base), self.log_bytes, "")) if self.log_bytes else file


class GenerationFiles:
    """Writes and reads generations.

    Args:
        folder: Where they lie; None keeps them in memory, for a catalog without a folder.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[str, bytes] = {}

    def save(self, number: int, vectors: FlatVectors) -> VectorGeneration:
        """Write one generation as a vector file; on return it is durable, and nothing refers to it yet.

        Raises:
            StoreFullError: No space; nothing else was touched.
        """
        name, data = _name(number), vectors.to_bytes()
        made = VectorGeneration(number, vectors.dim, len(vectors), name, hashlib.sha256(data).hexdigest())
        if self._folder is None:
            self._memory[name] = data.tobytes()
            return made
        path = self._folder / name
        draft = path.with_name(name + ".tmp")
        with translated_errors(path, writing=True):
            draft.unlink(missing_ok=True)
            try:
                handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                with open(handle, "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                # A log of this name is what a commit left that was killed: none belongs to a file that is new.
                path.with_name(_log_name(number)).unlink(missing_ok=True)
                os.replace(draft, path)
            except OSError:
                draft.unlink(missing_ok=True)  # give the space back
                raise
            sync_folder(self._folder)
        return made

    def append(self, former: VectorGeneration, vectors: FlatVectors, since: FlatVectors) -> VectorGeneration | None:
        """Write what changed behind the log; on return it is durable, and nothing refers to it yet.

        Args:
            former: The generation in force.
            vectors: What became of it.
            since: What it was.

        Returns:
            The next generation; None, and nothing done, where a vector file is to be written in place of a long log.

        Raises:
            StoreFullError: No space; nothing that is committed was touched.
        """
        if not former.file or vectors.cleared:
            return None
        changes = vectors.changes(since)
        n_file = former.ntotal if former.in_file is None else former.in_file
        size = vector_log.nbytes(former.dim, len(changes[0]), len(changes[1]))
        if former.log_bytes + size > max(LEAST_LOG, LOG_SHARE * FlatVectors.most_bytes(former.dim, n_file)):
            return None
        data, digest = vector_log.record(former.log_sha256 or former.sha256, *changes)
        self._append(_log_name(former.base), former.log_bytes, data)
        return replace(
            former,
            number=former.number + 1,
            ntotal=len(vectors),
            in_file=n_file,
            log_bytes=former.log_bytes + len(data),
            log_sha256=digest,
        )

    def _append(self, name: str, end: int, data: bytes) -> None:
        if self._folder is None:
            self._memory[name] = self._memory.get(name, b"")[:end] + data
            return
        path = self._folder / name
        with translated_errors(path, writing=True):
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(file, "r+b", buffering=0) as stream:
                if os.fstat(file).st_size < end:
                    raise damaged("a vector log is too short", got=path, expected=f"at least {end} bytes")
                stream.truncate(end)  # what is behind belongs to no commit
                stream.seek(end)
                try:
                    left = memoryview(data)
                    while left:
                        left = left[stream.write(left) :]
                    os.fsync(file)
                except OSError:
                    with suppress(OSError):
                        stream.truncate(end)  # give the space back
                    raise
            if not end:
                sync_folder(self._folder)

    def load(self, generation: VectorGeneration) -> FlatVectors:
        """Read one generation.

        Raises:
            FileNotFoundError: A file is gone; a writer may have gone on by two generations.
            CorruptRecordError: A file is not the one the catalog names.
        """
        if generation.number == 0:
            return FlatVectors(generation.dim)
        base = generation.base
        if not base or (base != generation.number and not generation.log_bytes):
            raise damaged("the catalog names a strange vector file", got=repr(generation.file)[:80])
        n_file = generation.ntotal if generation.in_file is None else generation.in_file
        limit = FlatVectors.most_bytes(generation.dim, n_file)
        data, source = self._read(generation.file, 0, None, limit), self._source(generation.file)
        if hashlib.sha256(data).hexdigest() != generation.sha256:
            raise damaged(
                "a vector file fails its checksum",
                got=f"{len(data)} bytes in {source}",
                expected=f"SHA-256 {generation.sha256}",
            )
        vectors = FlatVectors.from_bytes(data, generation.dim, source)
        return self._follow(vectors, generation, 0, generation.sha256)

    def follow(self, held: VectorGeneration, vectors: FlatVectors, generation: VectorGeneration) -> FlatVectors | None:
        """A later generation of one that is held, from what was appended to the log since; None where that is not all.

        Raises:
            FileNotFoundError, CorruptRecordError: See `load`.
        """
        if (held.file, held.sha256) != (generation.file, generation.sha256) or held.number >= generation.number:
            return None
        if not held.file or held.log_bytes >= generation.log_bytes:
            return None
        return self._follow(vectors.copy(), generation, held.log_bytes, held.log_sha256 or held.sha256)

    def _follow(self, vectors: FlatVectors, generation: VectorGeneration, start: int, digest: str) -> FlatVectors:
        if generation.log_bytes == start:
            return vectors
        name = _log_name(generation.base)
        data, source = self._read(name, start, generation.log_bytes - start, None), self._source(name)
        for removed, added, rows in vector_log.records(data, digest, generation.log_sha256, generation.dim, source):
            vectors.remove(removed)
            vectors.add(added, rows)
        if len(vectors) != generation.ntotal:
            raise damaged("a vector log is damaged", got=f"{len(vectors)} vectors", expected=f"{generation.ntotal}")
        return vectors.copy()

    def keep_only(self, *bases: int) -> None:
        """Remove the files of all other numbers, and what an interrupted commit left."""
        kept = {name for number in bases for name in (_name(number), _log_name(number))}
        if self._folder is None:
            for name in self._memory.keys() - kept:
                del self._memory[name]
            return
        with os.scandir(self._folder) as entries:
            strays = [entry.path for entry in entries if _OURS.fullmatch(entry.name) and entry.name not in kept]
        for stray in strays:
            Path(stray).unlink(missing_ok=True)

    def highest(self) -> int:
        """The highest number that a file has; 0 when there is none."""
        names = os.listdir(self._folder) if self._folder else list(self._memory)
        return max((int(found[1]) for name in names if (found := _OURS.fullmatch(name))), default=0)

    def _source(self, name: str) -> str:
        return str(self._folder / name) if self._folder else "memory"

    def _read(self, name: str, start: int, length: int | None, limit: int | None) -> bytes:
        """Bytes of a file from `start`: all up to its end, which must not be over `limit`, or `length` of them."""
        if self._folder is None:
            data = self._memory[name]
            return data[start:] if length is None else data[start : start + length]
        path, flags = self._folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        with translated_errors(path, writing=False), open(os.open(path, flags), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if limit is not None and size > limit:
                raise damaged("a vector file is too large", got=f"{size} bytes in {path}", expected=f"<= {limit}")
            if length is not None and size < start + length:
                raise damaged(
                    "a vector log is too short", got=f"{size} bytes in {path}", expected=f"{start + length} at least"
                )
            stream.seek(start)
            return stream.read() if length is None else stream.read(length)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _name(number: int) -> str:
    return f"vectors-{number}.faiss"


def _log_name(number: int) -> str:
    return f"vectors-{number}.log"

"""The files that hold the vectors of a catalog, one a generation: `vectors-<generation>.faiss`.

A file is complete and on the disk before the catalog names it, and it is checked against the SHA-256 that the
catalog keeps before FAISS parses it. The file of the former generation stays for readers that are still at it, so
deleted vectors leave the disk with the next commit that changes vectors again.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from compllm_rag.catalog.faults import damaged, translated_errors
from compllm_rag.catalog.flat_vectors import FlatVectors

_OURS = re.compile(r"vectors-[0-9]+\.faiss(\.tmp)?")


@dataclass(frozen=True, slots=True)
class VectorGeneration:
    """What the catalog keeps of its vectors.

    Args:
        number: Counts commits that changed vectors; 0 is the empty index, which has no file.
        dim: Dimensions of every vector.
        ntotal: How many there are.
        file: Name of their file; empty at 0.
        sha256: Digest of the file; empty at 0.
    """

    number: int
    dim: int
    ntotal: int = 0
    file: str = ""
    sha256: str = ""

    @property
    def parts(self) -> tuple[tuple[str, int | None, str], ...]:
        """Its files, for who copies them: name, bytes that belong to it (None: all), SHA-256 of these (or nothing)."""
        return ((self.file, None, self.sha256),) if self.file else ()


class GenerationFiles:
    """Writes and reads generations.

    Args:
        folder: Where they lie; None keeps the bytes of the latest one in memory, for a catalog without a folder.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[str, bytes] = {}

    def save(self, number: int, vectors: FlatVectors) -> VectorGeneration:
        """Write one generation; on return it is durable, and nothing refers to it yet.

        Raises:
            StoreFullError: No space; nothing else was touched.
        """
        name, data = f"vectors-{number}.faiss", vectors.to_bytes()
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
                os.replace(draft, path)
            except OSError:
                draft.unlink(missing_ok=True)  # give the space back
                raise
            sync_folder(self._folder)
        return made

    def load(self, generation: VectorGeneration) -> FlatVectors:
        """Read one generation.

        Raises:
            FileNotFoundError: The file is gone; a writer may have gone on by two generations.
            CorruptRecordError: The file is not the one the catalog names.
        """
        if generation.number == 0:
            return FlatVectors(generation.dim)
        if generation.file != f"vectors-{generation.number}.faiss":
            raise damaged("the catalog names a strange vector file", got=repr(generation.file)[:80])
        source = str(self._folder / generation.file) if self._folder else "memory"
        data = self._read(generation, source)
        if hashlib.sha256(data).hexdigest() != generation.sha256:
            raise damaged(
                "a vector file fails its checksum",
                got=f"{len(data)} bytes in {source}",
                expected=f"SHA-256 {generation.sha256}",
            )
        return FlatVectors.from_bytes(data, generation.dim, source)

    def keep_only(self, *numbers: int) -> None:
        """Remove the files of all other generations, and what an interrupted commit left."""
        kept = {f"vectors-{number}.faiss" for number in numbers}
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
        return max((int(re.sub(r"\D", "", name)) for name in names if _OURS.fullmatch(name)), default=0)

    def _read(self, generation: VectorGeneration, source: str) -> bytes:
        if self._folder is None:
            return self._memory[generation.file]
        limit = FlatVectors.most_bytes(generation.dim, generation.ntotal)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        with translated_errors(Path(source), writing=False), open(os.open(source, flags), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > limit:
                raise damaged("a vector file is too large", got=f"{size} bytes in {source}", expected=f"<= {limit}")
            return stream.read()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""The file that a storage is exported to: a plain tar archive that any `tar` reads, and that is read strictly here.

```
export.json            what it is, and which namespaces it holds
0/catalog.db           the first namespace: a storage of its own, without locks and journals
0/concepts/packs/...
1/...                  the next one
SHA256SUMS             digest of every file above, as `sha256sum -c` takes it; the last file, so that a cut is seen
```

Files stand in order of name and carry neither times nor owners, so that the same storage gives the same bytes. Nothing
is compressed: concepts are floating-point numbers, of which little can be saved.

Reading follows no header to another: each file is one header of 512 bytes and its bytes. Links, devices, folders,
sparse files, long and extended names, and paths that an export never has are refused, and so is whatever claims more
bytes than the archive holds. So nothing is written outside of the folder named, and nothing grows in unpacking.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Final, Literal

from pydantic import ValidationError

from compllm_rag.config import Frozen
from compllm_rag.errors import CorruptRecordError, UnsupportedFormatError

HEADER, SUMS = "export.json", "SHA256SUMS"
VERSION: Final = 1
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 2**20
_NAME = re.compile(r"[0-9]{1,6}(/[A-Za-z0-9_][A-Za-z0-9._-]*){1,4}")
_MOST_FILES = 1_000_000
_MOST_NAME = 100  # what a header holds without another one in front of it
_MOST_BYTES = {HEADER: 2**24, SUMS: 2**28}
_SUM = re.compile(r"([0-9a-f]{64})  (\S+)")


class HeldNamespace(Frozen):
    """A namespace in an archive.

    Attributes:
        name: Its name, which is part of the key of every concept in it.
        own: Whether it lay in the storage's folder itself, not in a sub-folder.
    """

    name: str
    own: bool


class ExportHeader(Frozen):
    """What an archive says of itself.

    Attributes:
        kind: Says what the file is.
        format_version: Of the archive; storages in it have formats of their own.
        release: Of this package, that made it.
        namespaces: What it holds; the files of the first lie in `0/`, and so on.
    """

    kind: Literal["compllm-rag storage export"] = "compllm-rag storage export"
    format_version: Literal[1] = VERSION
    release: str
    namespaces: tuple[HeldNamespace, ...]

    @classmethod
    def parse(cls, data: bytes) -> ExportHeader:
        """Read a header.

        Raises:
            UnsupportedFormatError: It is none, or of a newer release.
        """
        try:
            fields = json.loads(data)
            version = fields.get("format_version") if isinstance(fields, dict) else None
            if isinstance(version, int) and version > VERSION:
                raise UnsupportedFormatError(
                    "the export was made by a newer release",
                    got=f"format {version}",
                    expected=f"format {VERSION}",
                    next_step="update compllm-rag",
                )
            made = cls.model_validate_json(data)
        except UnsupportedFormatError:
            raise
        except (ValueError, RecursionError, ValidationError) as error:
            raise no_export(f"a header that cannot be read ({type(error).__name__})") from error
        names = [held.name for held in made.namespaces]
        if not names or len({*names}) < len(names) or sum(held.own for held in made.namespaces) > 1:
            raise no_export("a header whose namespaces contradict each other")
        return made


@dataclass(frozen=True)
class ArchivedFile:
    """A file in an archive.

    Attributes:
        name: Its path in it.
        size: Its bytes.
    """

    name: str
    size: int


class ArchiveWriter:
    """Writes files into an archive one after the other, and at the end their digests.

    Args:
        stream: Where to.

    Attributes:
        digests: SHA-256 of each file by its path.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digests: dict[str, str] = {}

    def add(self, name: str, size: int, chunks: Iterator[bytes]) -> str:
        """Write one file; gives its SHA-256.

        Raises:
            CorruptRecordError: It has fewer or more bytes than it should.
        """
        if not (name in (HEADER, SUMS) or _NAME.fullmatch(name)) or len(name) > _MOST_NAME:
            raise CorruptRecordError(
                "a file of the storage has a name that no export can have",
                got=ascii(name)[:200],
                expected="letters, digits, dots and dashes, 100 of them with its folders",
                next_step="move it out of the storage",
            )
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o600
        self._stream.write(info.tobuf(tarfile.GNU_FORMAT))
        digest, written = hashlib.sha256(), 0
        for chunk in chunks:
            digest.update(chunk)
            self._stream.write(chunk)
            written += len(chunk)
        if written != size:
            raise CorruptRecordError(
                "a file of the storage changed in a way that no release of ours does",
                got=f"{written} bytes of {name}",
                expected=size,
                next_step="run `compllm-rag verify`",
            )
        self._stream.write(bytes(-size % _BLOCK))
        self.digests[name] = digest.hexdigest()
        return self.digests[name]

    def finish(self) -> None:
        """Write the digests and the end of the archive."""
        data = "".join(f"{digest}  {name}\n" for name, digest in self.digests.items()).encode()
        self.add(SUMS, len(data), iter([data]))
        self._stream.write(bytes(2 * _BLOCK))


class ArchiveReader:
    """Reads an archive from begin to end; each file is read, or passed over, before the next.

    Args:
        stream: Of a plain file.
        size: Its bytes.

    Attributes:
        at: How many bytes were read or passed over.
    """

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size = stream, size
        self._left = 0  # of the file at hand, what fills its last block included
        self.at = 0

    @property
    def share(self) -> float:
        """How much of it was read, from 0 to 1."""
        return self.at / max(self._size, 1)

    def files(self) -> Iterator[ArchivedFile]:
        """The files, in order.

        Raises:
            CorruptRecordError: The archive is cut off or damaged.
            UnsupportedFormatError: It is no export, or holds what no export does.
        """
        met = set[str]()
        while True:
            self._pass_over()
            found = self._header()
            if found is None:
                return
            if found.name in met or len(met) >= _MOST_FILES:
                raise no_export(f"{found.name} twice" if found.name in met else f"more than {_MOST_FILES} files")
            met.add(found.name)
            if found.size > min(self._size - self.at, _MOST_BYTES.get(found.name, self._size)):
                raise damaged_export(f"{found.name} of {found.size} bytes, where {self._size - self.at} are left")
            self._left = found.size + -found.size % _BLOCK
            yield found

    def chunks(self, file: ArchivedFile) -> Iterator[bytes]:
        """The bytes of the file at hand.

        Raises:
            CorruptRecordError: The archive is cut off.
        """
        left = file.size
        while left:
            chunk = self._read(min(left, _CHUNK))
            left -= len(chunk)
            self._left -= len(chunk)
            yield chunk

    def bytes_of(self, file: ArchivedFile) -> bytes:
        """All bytes of a file that is short."""
        return b"".join(self.chunks(file))

    def _header(self) -> ArchivedFile | None:
        block = self._read(_BLOCK)
        if not any(block):
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError, ValueError) as error:
            raise no_export("no header of a tar archive") from error
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.size < 0 or info.linkname:
            raise no_export(f"{_KINDS.get(info.type, 'no plain file')}: {ascii(info.name)[:120]}")
        if not (info.name in (HEADER, SUMS) or _NAME.fullmatch(info.name)):
            raise no_export(f"a path that no export has: {ascii(info.name)[:120]}")
        return ArchivedFile(info.name, info.size)

    def _pass_over(self) -> None:
        if self._left:
            self._stream.seek(self._left, 1)
            self.at += self._left
            self._left = 0

    def _read(self, n: int) -> bytes:
        data = self._stream.read(n)
        if len(data) < n:
            raise damaged_export(f"an end after {self.at + len(data)} bytes, in the middle")
        self.at += n
        return data


_KINDS = {
    tarfile.LNKTYPE: "a link",
    tarfile.SYMTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.DIRTYPE: "a folder",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.GNUTYPE_LONGNAME: "a long name",
    tarfile.GNUTYPE_LONGLINK: "a long name",
    tarfile.XHDTYPE: "an extended header",
    tarfile.XGLTYPE: "an extended header",
}


def check_sums(data: bytes, found: Mapping[str, str | None]) -> None:
    """Compare digests with those that an archive names.

    Args:
        data: The last file of the archive.
        found: Digest of each other file by its path; None where it was passed over.

    Raises:
        CorruptRecordError: They are not the same.
    """
    lines = [_SUM.fullmatch(line) for line in data.decode("ascii", "replace").splitlines()]
    told = {match[2]: match[1] for match in lines if match}
    if None in lines or told.keys() != found.keys():
        raise damaged_export("a list of digests that is not the one of its files")
    for name, digest in found.items():
        if digest is not None and told[name] != digest:
            raise damaged_export(f"{name} with SHA-256 {digest}", told[name])


def damaged_export(got: str, expected: object = None) -> CorruptRecordError:
    """The error for an archive that is not what was written."""
    return CorruptRecordError(
        "the export is damaged; nothing was imported",
        got=got,
        expected=expected,
        next_step="copy it again from where it was made, or take another one",
    )


def no_export(got: str) -> UnsupportedFormatError:
    """The error for a file that no export ever was."""
    return UnsupportedFormatError(
        "this is no export of a storage; nothing was imported",
        got=got,
        expected="a file that `compllm-rag export` made, not compressed",
        next_step="name another file, or unpack it first (unzstd, gunzip)",
    )

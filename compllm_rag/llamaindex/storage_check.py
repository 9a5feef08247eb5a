"""What a look for damage in a storage found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

_SHOWN = 100  # a lost pack damages a million records in one way


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        part: `database`, `manifest`, `text`, `vectors`, `counts`, `concepts` or `adapters`.
        what: In words.
        key: The concept record, where it is one.
    """

    part: str
    what: str
    key: str | None = None


@dataclass
class StorageCheck:
    """What a storage holds and what is wrong with it.

    Attributes:
        deep: Whether every payload and every row was read.
        format_version: Version of the storage's format; None when it cannot be told.
        documents: Documents accounted for.
        chunks: Rows of text.
        segments: Different segments that chunks refer to.
        records: Sound concept records.
        dead_records: Records nothing refers to; None when that is not known.
        pack_bytes: Bytes of all packs.
        dead_bytes: Bytes of packs that no record uses.
        findings: The first hundred things that are wrong.
        n_findings: How many there are.
        seconds: Wall time.
        segments_awaiting: Segments of uploads that are still to be compressed.
    """

    deep: bool
    format_version: int | None = None
    documents: int = 0
    chunks: int = 0
    segments: int = 0
    records: int = 0
    dead_records: int | None = None
    pack_bytes: int = 0
    dead_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    n_findings: int = 0
    seconds: float = 0.0
    segments_awaiting: int = 0

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.n_findings

    def add(self, part: str, what: str, key: str | None = None) -> None:
        """Note something that is wrong."""
        self.n_findings += 1
        if len(self.findings) < _SHOWN:
            self.findings.append(Finding(part, what, key))

    def fields(self) -> dict[str, Any]:
        """Plain values, as `verify --json` prints them."""
        return {"sound": self.sound, **asdict(self)}

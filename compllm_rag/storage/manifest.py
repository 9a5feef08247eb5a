"""What a storage was made with, kept in its catalog and checked whenever it is opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from compllm_rag.catalog.database import connected, has_tables
from compllm_rag.compression.rate_policies.asked import check_heeded
from compllm_rag.config import FORMAT_VERSION, Frozen, IngestConfig, RateOptions, checked
from compllm_rag.errors import (
    EmbedderMismatchError,
    FingerprintMismatchError,
    StorageMismatchError,
    StorageNotFoundError,
    UnsupportedFormatError,
)
from compllm_rag.store.encodings import deep_encoding

if TYPE_CHECKING:
    from compllm_rag.compression.spec import ConceptSpec
    from compllm_rag.models.llm import TargetLLM

META_KEY = "compllm/manifest"
CATALOG, CONCEPTS = "catalog.db", "concepts"


class SharedStore(Frozen):
    """A concept store that a storage shares with others, outside of its folder.

    Attributes:
        url: Of its server, without a password.
        owner: The name of this storage there.
    """

    url: str
    owner: str


class Manifest(Frozen):
    """Identity of a storage."""

    format_version: Literal[1] = 1
    fingerprint: str
    llm: str
    llm_identity: str
    embedder: str
    embedder_identity: str
    dimension: int
    hidden_size: int
    entry_layer: int = 0
    depth: int | None = None
    ingest: IngestConfig
    concept_store: SharedStore | None = None

    @classmethod
    def of(
        cls,
        spec: ConceptSpec,
        llm: TargetLLM,
        embedder: str,
        embedder_identity: str,
        dimension: int,
        ingest: IngestConfig,
        concept_store: SharedStore | None = None,
    ) -> Manifest:
        """The manifest of a storage made from these parts."""
        return cls(
            fingerprint=spec.fingerprint,
            llm=llm.source,
            llm_identity=llm.identity,
            embedder=embedder,
            embedder_identity=embedder_identity,
            dimension=dimension,
            hidden_size=spec.hidden_size,
            entry_layer=spec.config.entry_layer,
            depth=spec.depth,
            ingest=ingest,
            concept_store=concept_store,
        )

    def to_json(self) -> str:
        """As the catalog keeps it; releases that know no shared stores read all others, and refuse those."""
        return self.model_dump_json(exclude={"concept_store"} if self.concept_store is None else None)

    @classmethod
    def parse(cls, text: str | None) -> Manifest:
        """Read a manifest.

        Raises:
            StorageNotFoundError: There is none: the making of the storage was interrupted.
            UnsupportedFormatError: It is damaged, or of a newer format.
        """
        if text is None:
            raise StorageNotFoundError(
                "there is no storage here: its making was interrupted",
                next_step="run the same ingest again, which takes it up",
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UnsupportedFormatError(
                "storage has no manifest this release reads",
                got=f"{error.error_count()} faults, first {error.errors()[0]['msg']}",
                expected=f"format {FORMAT_VERSION}",
                next_step="update compllm-rag, or ingest again into a new storage",
            ) from error

    @property
    def width(self) -> int:
        """Columns of a record in the concept store; a deep concept has one more, its place in the text."""
        return self.hidden_size + (self.entry_layer > 0)

    @property
    def encoding(self) -> str:
        """How the concept store writes records: the encoding asked for, or its kin for deep concepts."""
        return deep_encoding(self.ingest.encoding) if self.entry_layer else self.ingest.encoding

    def prefill_cost(self, rate: float) -> float | None:
        """What one token of a passage costs at prefill, text = 1; see `ConceptSpec.prefill_cost`.

        None for a storage of before, which does not say how many layers its LLM has, unless its concepts pass them all.
        """
        if not self.entry_layer:
            return 1 / rate
        return None if self.depth is None else (self.depth - self.entry_layer) / (self.depth * rate)

    def check_compressor(self, fingerprint: str, llm: str) -> None:
        """Refuse a compressor (or its LLM, reader, tokenizer) other than the storage's.

        Raises:
            FingerprintMismatchError: With both fingerprints.
        """
        if fingerprint != self.fingerprint:
            raise FingerprintMismatchError(
                "storage was made by another compressor",
                got=f"{llm} with fingerprint {fingerprint[:16]}",
                expected=f"{self.llm} with fingerprint {self.fingerprint[:16]}",
                next_step="leave the LLM out to use the storage's own, or ingest into a new storage",
            )

    def check_embedder(self, embedder: str, identity: str, dimension: int) -> None:
        """Refuse an embedder other than the storage's.

        Raises:
            EmbedderMismatchError: With both names and dimensions.
        """
        if (identity, dimension) != (self.embedder_identity, self.dimension):
            raise EmbedderMismatchError(
                "storage was made by another embedder",
                got=f"{embedder} ({dimension} dimensions)",
                expected=f"{self.embedder} ({self.dimension} dimensions)",
                next_step="leave the embedder out to use the storage's own, or ingest into a new storage",
            )

    def check_ingest(self, **asked: object) -> None:
        """Refuse settings other than the storage's; None means the storage's own.

        Options of rate policies are `RateOptions`, or a dictionary of those that are asked for.

        Raises:
            StorageMismatchError: With both values.
            ConfigurationError: Options that the storage's rate does not heed.
        """
        options: Any = asked.get("rate_options")
        limit: Any = asked.get("guard_limit")
        check_heeded(options, limit, self.ingest.rate, self.ingest.guard)
        pairs = [(name, value, getattr(self.ingest, name)) for name, value in asked.items()]
        if isinstance(options, Mapping):
            named, own = checked(RateOptions, **options), self.ingest.rate_options
            pairs = [pair for pair in pairs if pair[0] != "rate_options"]
            pairs += [(f"rate option {name}", getattr(named, name), getattr(own, name)) for name in options]
        for name, value, own in pairs:
            if name == "rate" and value == "auto" and isinstance(own, str):
                continue  # whatever was taken for it when the storage was made
            if value is not None and value != own:
                raise StorageMismatchError(
                    f"storage was made with another {name.replace('_', ' ')}",
                    got=value,
                    expected=own,
                    next_step="leave it out, or ingest into a new storage",
                )


def has_manifest(folder: Path) -> bool:
    """Whether a storage lies here whose making came to its end; the manifest is the last thing written.

    Raises:
        CorruptRecordError, UnreadableFileError: The catalog is damaged, or may not be read.
    """
    return (folder / CATALOG).is_file() and _manifest_text(folder) is not None


def read_manifest(folder: Path) -> Manifest:
    """What a storage was made with.

    Raises:
        StorageNotFoundError: There is no storage here.
        UnsupportedFormatError, CorruptRecordError: The storage is damaged or too new.
    """
    require_storage(folder)
    return Manifest.parse(_manifest_text(folder))


def _manifest_text(folder: Path) -> str | None:
    with connected(folder / CATALOG, writing=False) as connection:
        try:
            if not has_tables(connection):
                return None
            row = connection.execute("SELECT value FROM meta WHERE key = ?", (META_KEY,)).fetchone()
        finally:
            connection.close()
    return str(row[0]) if row else None


def require_storage(folder: Path) -> None:
    """Refuse a folder that holds no storage.

    Raises:
        StorageNotFoundError: There is no catalog.
    """
    if not (folder / CATALOG).is_file():
        raise StorageNotFoundError(
            "there is no storage here",
            got=folder,
            expected="a folder made by `compllm-rag ingest` or ConceptIndex.from_documents",
            next_step=f"run `compllm-rag ingest PATH --storage {folder}` first",
        )


def refuse_newer(text: str | None) -> None:
    """Tell a manifest of a newer release from a damaged one.

    Raises:
        UnsupportedFormatError: It is newer.
    """
    try:
        version = dict(json.loads(text or "{}")).get("format_version")
    except (ValueError, TypeError):
        return
    if isinstance(version, int) and version > Manifest.model_fields["format_version"].default:
        raise UnsupportedFormatError(
            "storage was written by a newer release",
            got=f"format {version}",
            expected=f"format {Manifest.model_fields['format_version'].default} or older",
            next_step="update compllm-rag",
        )

"""What is measured of a storage and kept in it: achieved rates chunk by chunk, and what compressing it took.

The processes that ingest are gone when somebody asks; these numbers lie in the catalog and commit with the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from compllm_rag.catalog.kv import KeyValues
from compllm_rag.metrics import RateSpread, Work, counter, gauge, quality_families, spread_families

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_COLLECTION = "compllm/metrics"
_RATES, _WORK = "rates", "work"
_GAUGES = {
    "documents": "Documents.",
    "chunks": "Chunks.",
    "segments": "Segments of all chunks.",
    "unique_segments": "Different segments whose concepts are stored.",
    "source_tokens": "Tokens of all chunks.",
    "concepts": "Concepts of all chunks.",
    "concept_bytes": "Bytes of stored concepts.",
}


class Measures:
    """Numbers that outlive the process.

    Args:
        values: Where they lie.
    """

    def __init__(self, values: KeyValues) -> None:
        self._kv = values

    def change(self, rates: Iterable[float], sign: int) -> None:
        """Count the achieved rates of chunks that come (1) or go (-1)."""
        changed = list(rates)
        if changed:
            spread = self.rates()
            spread.change(changed, sign)
            bins = {str(at): n for at, n in spread.bins.items()}
            self._kv.put(_RATES, {"bins": bins}, collection=_COLLECTION)

    def rates(self) -> RateSpread:
        """Of all chunks; of too few in a storage made before they were counted."""
        row = self._kv.get(_RATES, collection=_COLLECTION) or {}
        return RateSpread({int(at): int(n) for at, n in dict(row.get("bins", {})).items()})

    def clear(self) -> None:
        """Start counting rates from nothing."""
        self._kv.delete(_RATES, collection=_COLLECTION)

    def add(self, work: Work) -> None:
        """Add to what compressing this storage took."""
        self._kv.put(_WORK, asdict(self.work().plus(work)), collection=_COLLECTION)

    def work(self) -> Work:
        """What compressing it took, in all processes."""
        return Work(**(self._kv.get(_WORK, collection=_COLLECTION) or {}))

    def fields(self, chunks: int, awaiting: int) -> dict[str, Any]:
        """Plain values; rates are None where not all chunks were counted.

        Args:
            chunks: How many there are.
            awaiting: How many of them still await their concepts.
        """
        rates = self.rates()
        spread = rates if rates.chunks == chunks else RateSpread()
        return {**spread.fields(), **self.work().fields(), "chunks_awaiting": awaiting}


def storage_families(stats: Mapping[str, Any]) -> list[Metric]:
    """The statistics of a storage for Prometheus."""
    kept = stats["metrics"]
    compressed, seconds = kept["segments_compressed"], kept["compress_seconds"]
    return [
        *(gauge(f"storage_{name}", text, stats[name]) for name, text in _GAUGES.items()),
        gauge("storage_chunks_awaiting", "Chunks that still await their concepts.", kept["chunks_awaiting"]),
        counter("storage_segments_compressed_total", "Segments ever compressed for this storage.", compressed),
        counter("storage_compress_seconds_total", "Seconds that took.", seconds),
        *spread_families(kept, "storage_"),
        *quality_families(kept, "storage_"),
    ]

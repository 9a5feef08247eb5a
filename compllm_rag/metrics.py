"""What a running process measures as it compresses, stores and reads: counters that threads share, and their account.

A few additions under one lock per batch or passage; nothing is kept per event.
"""

from __future__ import annotations

import bisect
import copy
import itertools
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client.core import Metric

logger = logging.getLogger(__name__)

PREFIX = "compllm_"
# Upper bounds of the histogram of compress times, in seconds per segment.
BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
QUANTILES = (0.1, 0.5, 0.9)
_BINS = 100  # bins of the achieved rate per unit
_SEGMENT = 20  # tokens
_QUIET_S = 60.0  # between two warnings: a slow machine is slow all the time


class RateSpread:
    """Achieved rates of chunks, counted in bins of a hundredth: exact to that, and chunks can be taken away again.

    Args:
        bins: Chunks by rate in hundredths.
    """

    def __init__(self, bins: Mapping[int, int] | None = None) -> None:
        self.bins = dict(bins or {})

    def change(self, rates: Iterable[float], sign: int = 1) -> None:
        """Add (1) or take away (-1) chunks."""
        for rate in rates:
            at = round(rate * _BINS)
            left = self.bins.get(at, 0) + sign
            if left:
                self.bins[at] = left
            else:
                self.bins.pop(at, None)

    @property
    def chunks(self) -> int:
        """How many there are."""
        return sum(self.bins.values())

    def fields(self) -> dict[str, float | None]:
        """Mean and quantiles; None when there are no chunks."""
        names = [f"achieved_rate_p{round(q * 100)}" for q in QUANTILES]
        total = self.chunks
        if total <= 0:
            return dict.fromkeys(["achieved_rate_mean", *names])
        mean = sum(at * n for at, n in self.bins.items()) / total / _BINS
        return {"achieved_rate_mean": mean, **{n: self._quantile(q) for n, q in zip(names, QUANTILES, strict=True)}}

    def _quantile(self, q: float) -> float:
        wanted, seen = q * (self.chunks - 1), 0
        for at in sorted(self.bins):
            seen += self.bins[at]
            if seen > wanted:
                return at / _BINS
        return max(self.bins) / _BINS


@dataclass(frozen=True)
class Work:
    """What compression did; sums, so that those of several processes add up.

    Attributes:
        segments: Segments compressed.
        seconds: What that took.
        samples: Segments read back from the store right after, and compared.
        loss: Sum over samples of the distance between what the store gave back and what the compressor made: RMS of
            the difference over the RMS of the concepts.
        anchored: Samples whose concepts start from anchors.
        cosine: Sum over those of the mean cosine between a concept and its anchor's embedding.
    """

    segments: int = 0
    seconds: float = 0.0
    samples: int = 0
    loss: float = 0.0
    anchored: int = 0
    cosine: float = 0.0

    def plus(self, other: Work, sign: int = 1) -> Work:
        """Field by field."""
        return Work(**{name: value + sign * getattr(other, name) for name, value in asdict(self).items()})

    def fields(self) -> dict[str, float | int | None]:
        """Plain values, with means in place of sums."""
        return {
            "segments_compressed": self.segments,
            "compress_seconds": self.seconds,
            "compress_s_per_segment": self.seconds / self.segments if self.segments else None,
            "reconstruction_samples": self.samples,
            "reconstruction_loss": self.loss / self.samples if self.samples else None,
            "anchor_cosine": self.cosine / self.anchored if self.anchored else None,
        }


@dataclass
class _Counts:
    hits: int = 0
    misses: int = 0
    reused: int = 0
    slow: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))


@dataclass
class Traffic:
    """Bytes of payloads that a store read and wrote; the store counts, under its own lock."""

    bytes_read: int = 0
    bytes_written: int = 0


class Metrics:
    """Counters of one library. Safe to share between threads.

    Args:
        compress_limit_s: Seconds per segment beyond which a batch is reported as a warning of the logger
            `compllm_rag.metrics`, at most once a minute; None never warns.
        sample_every: One of so many compressed segments is read back and compared, and the first of each batch.
        traffic: Of the store.
    """

    def __init__(
        self, *, compress_limit_s: float | None = 1.0, sample_every: int = 512, traffic: Traffic | None = None
    ) -> None:
        self.compress_limit_s, self.sample_every = compress_limit_s, sample_every
        self.traffic = traffic or Traffic()
        self._guard = threading.Lock()
        self._counts, self._work, self._rates = _Counts(), Work(), RateSpread()
        self._warned = -_QUIET_S

    def fetched(self, hits: int, misses: int) -> None:
        """Segments of a passage that a query found in the store, and did not."""
        with self._guard:
            self._counts.hits += hits
            self._counts.misses += misses

    def ensured(self, segments: int, compressed: int, rates: Iterable[float]) -> None:
        """Passages of an ingest: their segments, how many of those had to be compressed, and achieved rates."""
        with self._guard:
            self._counts.reused += segments - compressed
            self._rates.change(rates)

    def compressed(self, segments: int, seconds: float, tokens: int = 0) -> None:
        """A batch of segments was compressed; each is counted with the mean of its batch.

        Args:
            segments: How many, or how many longer units.
            seconds: What it took.
            tokens: Their tokens; twenty of them, CompLLM's longest segment, may take as long as the limit says.
        """
        if not segments:
            return
        each, limit, now = seconds / segments, self.compress_limit_s, time.monotonic()
        if limit is not None:
            limit *= max(1.0, tokens / segments / _SEGMENT)
        with self._guard:
            self._work = replace(
                self._work, segments=self._work.segments + segments, seconds=self._work.seconds + seconds
            )
            self._counts.buckets[bisect.bisect_left(BUCKETS_S, each)] += segments
            slow = limit is not None and each > limit
            self._counts.slow += segments if slow else 0
            warn = slow and now - self._warned >= _QUIET_S
            self._warned = now if warn else self._warned
        if warn:
            logger.warning(
                "compressing takes %.3g s per segment (%d segments in %.3g s), more than the limit of %.3g s",
                each, segments, seconds, limit,
            )  # fmt: skip

    def sampled(self, loss: float, cosine: float | None) -> None:
        """A segment was read back from the store; see `Work`."""
        with self._guard:
            anchored, similar = (1, cosine) if cosine is not None else (0, 0.0)
            self._work = self._work.plus(Work(samples=1, loss=loss, anchored=anchored, cosine=similar))

    @property
    def work(self) -> Work:
        """What compression did so far."""
        with self._guard:
            return self._work

    def snapshot(self) -> dict[str, Any]:
        """All of it as plain values, of one moment."""
        with self._guard:
            counts, rates = self._counts, RateSpread(self._rates.bins)
            asked = counts.hits + counts.misses
            return {
                "hits": counts.hits,
                "misses": counts.misses,
                "hit_share": counts.hits / asked if asked else None,
                "segments_reused": counts.reused,
                "bytes_read": self.traffic.bytes_read,
                "bytes_written": self.traffic.bytes_written,
                **self._work.fields(),
                "segments_beyond_limit": counts.slow,
                "chunks": rates.chunks,
                **rates.fields(),
            }

    def families(self) -> list[Metric]:
        """All of it for Prometheus."""
        from prometheus_client.core import HistogramMetricFamily

        found = self.snapshot()
        with self._guard:
            buckets, seconds = list(self._counts.buckets), self._work.seconds
        seen = zip([*map(str, BUCKETS_S), "+Inf"], itertools.accumulate(buckets), strict=True)
        text = "Seconds to compress a segment, mean of its batch."
        return [
            counter("fetch_hits_total", "Segments that queries found in the store.", found["hits"]),
            counter("fetch_misses_total", "Segments that queries did not find in the store.", found["misses"]),
            counter("ingest_segments_reused_total", "Segments that needed no compression.", found["segments_reused"]),
            counter("store_read_bytes_total", "Bytes of concepts read.", found["bytes_read"]),
            counter("store_written_bytes_total", "Bytes of concepts written.", found["bytes_written"]),
            counter(
                "compress_slow_segments_total",
                "Segments that took longer than the limit.",
                found["segments_beyond_limit"],
            ),
            counter(
                "reconstruction_samples_total", "Segments read back and compared.", found["reconstruction_samples"]
            ),
            HistogramMetricFamily(f"{PREFIX}compress_segment_seconds", text, buckets=list(seen), sum_value=seconds),
            *spread_families(found),
            *quality_families(found),
        ]

    def to_prometheus(self, labels: Mapping[str, str] | None = None) -> str:
        """Prometheus text format 0.0.4; `labels` go to every sample."""
        return exposition(self.families(), labels)


def counter(name: str, text: str, value: float) -> Metric:
    """A family of one counter; its name, without `PREFIX`, ends in `_total`."""
    from prometheus_client.core import CounterMetricFamily

    return CounterMetricFamily(PREFIX + name, text, value)


def gauge(name: str, text: str, value: float | None) -> Metric:
    """A family of one gauge; None: there is nothing to tell yet."""
    from prometheus_client.core import GaugeMetricFamily

    return GaugeMetricFamily(PREFIX + name, text, value)


def exposition(families: Iterable[Metric], labels: Mapping[str, str] | None = None) -> str:
    """Write families out in Prometheus' text format 0.0.4; those without a sample are left out.

    No registry is shared: each call collects from its own families, so several indexes of a process never clash.

    Args:
        families: Each name once.
        labels: Added to every sample.
    """
    from prometheus_client import generate_latest
    from prometheus_client.registry import Collector

    class Labelled(Collector):
        def collect(self) -> Iterable[Metric]:
            return labelled(families, labels or {})

    return generate_latest(Labelled()).decode()


def labelled(families: Iterable[Metric], labels: Mapping[str, str]) -> Iterator[Metric]:
    """Families with labels added to every sample; those without a sample are left out."""
    for family in families:
        made = copy.copy(family)
        made.samples = [s._replace(labels={**labels, **s.labels}) for s in family.samples]
        if made.samples:
            yield made


def spread_families(found: Mapping[str, Any], prefix: str = "") -> list[Metric]:
    """Achieved rates of chunks, of a snapshot or a storage."""
    from prometheus_client.core import GaugeMetricFamily

    text = "Source tokens per concept, over chunks"
    spread = GaugeMetricFamily(f"{PREFIX}{prefix}achieved_rate", f"{text}: quantiles.", labels=["quantile"])
    for q in QUANTILES:
        if (value := found[f"achieved_rate_p{round(q * 100)}"]) is not None:
            spread.add_metric([str(q)], value)
    return [gauge(f"{prefix}achieved_rate_mean", f"{text}: mean.", found["achieved_rate_mean"]), spread]


def quality_families(found: Mapping[str, Any], prefix: str = "") -> list[Metric]:
    """Sampled reconstruction, of a snapshot or a storage."""
    loss, cosine = found["reconstruction_loss"], found["anchor_cosine"]
    return [
        gauge(f"{prefix}reconstruction_loss", "What storing loses of concepts, relative to their RMS.", loss),
        gauge(f"{prefix}anchor_cosine", "Mean cosine between concepts and their anchors.", cosine),
    ]

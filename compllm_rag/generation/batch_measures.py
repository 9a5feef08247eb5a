"""What batched decoding counts, for Prometheus; several schedulers may share it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram

from compllm_rag.metrics import PREFIX

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class BatchMeasures:
    """Counters of decoding; safe to share between threads. A collector of `prometheus_client`.

    Attributes:
        rows: Answers that are being decoded now.
        reading: Prompts that are being read now, or are next.
        waiting: Prompts that wait for a place.
        step_rows: Rows of each step of the LLM.
        wait_s: Seconds that each prompt waited until it was begun with.
        refused: Prompts that found no place.
    """

    def __init__(self) -> None:
        name = f"{PREFIX}batch_"
        self.rows = Gauge(f"{name}rows", "Answers that are being decoded together.", registry=None)
        self.reading = Gauge(f"{name}reading", "Prompts that are being read, or are next.", registry=None)
        self.waiting = Gauge(f"{name}waiting", "Prompts that wait for a place in the batch.", registry=None)
        self.step_rows = Histogram(
            f"{name}step_rows", "Answers that shared a decoding step.", buckets=_ROWS, registry=None
        )
        self.wait_s = Histogram(
            f"{name}wait_seconds", "Until a prompt was begun with.", buckets=_SECONDS, registry=None
        )
        self.refused = Counter(f"{name}refused", "Prompts that found no place in the queue.", registry=None)

    def collect(self) -> Iterable[Metric]:
        """All families, each once."""
        for measure in (self.rows, self.reading, self.waiting, self.step_rows, self.wait_s, self.refused):
            yield from measure.collect()

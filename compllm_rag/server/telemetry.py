"""What the server counts, for Prometheus, with what its indexes count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from compllm_rag.catalog.measures import storage_families
from compllm_rag.generation.batch_measures import BatchMeasures
from compllm_rag.metrics import PREFIX, labelled
from compllm_rag.server.answer_schemas import Answer

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from compllm_rag.llamaindex.index import ConceptIndex
    from compllm_rag.server.work import Workers

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Telemetry:
    """Counters of one server.

    Args:
        generations: Threads that make answers.
        sessions: Tells how many conversations there are.
        indexes: Tells which indexes are open.
        batches: What is counted of answers that are decoded together.
    """

    def __init__(
        self,
        generations: Workers,
        sessions: Callable[[], int],
        indexes: Callable[[], Sequence[ConceptIndex]],
        batches: BatchMeasures,
    ) -> None:
        own = CollectorRegistry()
        name = f"{PREFIX}server_"
        self._requests = Counter(
            f"{name}requests", "Requests that were answered.", ["method", "route", "status"], registry=own
        )
        self._seconds = Histogram(
            f"{name}request_seconds", "From request to the end of its response.", ["route"],
            buckets=_SECONDS, registry=own,
        )  # fmt: skip
        self._refused = Counter(f"{name}refused", "Requests that were refused, by code.", ["code"], registry=own)
        self._tokens = Counter(f"{name}tokens", "Tokens of answers.", registry=own)
        self._ttft = Histogram(
            f"{name}ttft_seconds", "From passages to the first token.", ["mode"], buckets=_SECONDS, registry=own
        )
        self._cancelled = Counter(f"{name}cancelled", "Answers that nobody waited for any more.", registry=own)
        self._accepted = Counter(f"{name}documents_accepted", "Documents brought in.", registry=own)
        for what, text, value in (
            ("generations_running", "Answers that are being made.", lambda: generations.running),
            ("generations_waiting", "Answers that wait for their turn.", lambda: generations.waiting),
            ("sessions", "Conversations that are remembered.", sessions),
        ):
            Gauge(name + what, text, registry=own).set_function(value)
        own.register(_Indexes(indexes))
        own.register(batches)
        self._registry = own

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """A response has come to its end."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def refused(self, code: str) -> None:
        """A request was refused."""
        self._refused.labels(code).inc()

    def generated(self, answer: Answer) -> None:
        """An answer was made."""
        self._tokens.inc(answer.new_tokens)
        self._ttft.labels(answer.mode).observe(answer.ttft_s)

    def cancelled(self) -> None:
        """Somebody went away before the end."""
        self._cancelled.inc()

    def accepted(self, documents: int) -> None:
        """Documents were brought in."""
        self._accepted.inc(documents)

    def text(self) -> str:
        """All of it in Prometheus' text format 0.0.4."""
        return generate_latest(self._registry).decode()


class _Indexes:
    """Families of all indexes, each family once, told apart by the label `namespace`."""

    def __init__(self, indexes: Callable[[], Sequence[ConceptIndex]]) -> None:
        self._indexes = indexes

    def describe(self) -> Iterable[Metric]:
        return []  # nothing has to be known before it is asked for

    def collect(self) -> Iterable[Metric]:
        found: dict[str, Metric] = {}
        for index in self._indexes():
            families = index.metrics.families() + storage_families(index.stats())
            for family in labelled(families, {"namespace": index.config.namespace}):
                if family.name in found:
                    found[family.name].samples += family.samples
                else:
                    found[family.name] = family
        return list(found.values())

"""Metrics of open indexes in a registry of prometheus_client, beside those of the application."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from compllm_rag.catalog.measures import storage_families
from compllm_rag.errors import ConfigurationError
from compllm_rag.metrics import Metrics, labelled

if TYPE_CHECKING:
    from compllm_rag.llamaindex.index import ConceptIndex


class ConceptCollector(Collector):
    """What open indexes did and hold; `prometheus_client.REGISTRY.register(ConceptCollector({"wiki": index}))`.

    One collector serves all indexes of a registry. Every sample has the labels `index`, the name given here, and
    `namespace`. Values are read when they are asked for; reading them loads no model.

    Args:
        indexes: Open ones, by a name of your own; an index is taken out before it is closed.
    """

    def __init__(self, indexes: Mapping[str, ConceptIndex] | None = None) -> None:
        self._indexes, self._lock = dict(indexes or {}), threading.Lock()

    def add(self, name: str, index: ConceptIndex) -> None:
        """Tell of one more index.

        Raises:
            ConfigurationError: Another has this name.
        """
        with self._lock:
            if name in self._indexes:
                raise ConfigurationError(
                    "two indexes have one name",
                    got=name,
                    expected=f"none of {', '.join(self._indexes)}",
                    next_step="choose another, or `remove` the former one",
                )
            self._indexes[name] = index

    def remove(self, name: str) -> None:
        """Tell of an index no more; one that is not there is no error."""
        with self._lock:
            self._indexes.pop(name, None)

    def collect(self) -> Iterable[Metric]:
        """All families, each once, with the samples of every index."""
        with self._lock:
            indexes = list(self._indexes.items())
        found: dict[str, Metric] = {}
        for name, index in indexes:
            families = index.metrics.families() + storage_families(index.stats())
            for family in labelled(families, {"index": name, "namespace": index.config.namespace}):
                if family.name in found:
                    found[family.name].samples += family.samples
                else:
                    found[family.name] = family
        return found.values()

    def describe(self) -> Iterable[Metric]:
        """Names by which a registry sees that a second collector would clash, also while there is no index."""
        return Metrics().families()

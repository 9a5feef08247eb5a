"""Metrics in a registry of the application's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from llama_index.core import Document
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import toy
from compllm_rag import Compressor, ConceptCollector, ConceptIndex
from compllm_rag.errors import ConfigurationError
from toy_embedder import HashEmbedder


@pytest.fixture
def indexes(compressor: Compressor) -> Iterator[dict[str, ConceptIndex]]:
    made = {
        name: ConceptIndex.from_documents(
            [Document(id_="rock", text=toy.TEXT)], compressor=compressor, embedder=HashEmbedder(), namespace=name
        )
        for name in ("one", "two")
    }
    yield made
    for index in made.values():
        index.close()


def values(registry: CollectorRegistry) -> dict[str, dict[str, float]]:
    """Values by name and index, as a scrape gives them."""
    out: dict[str, dict[str, float]] = {}
    seen: list[str] = []
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        seen.append(family.name)
        for sample in family.samples:
            out.setdefault(sample.name, {})[sample.labels.get("index", "")] = sample.value
    assert len(seen) == len(set(seen)), "each family once"
    return out


def test_indexes_stand_beside_what_the_application_counts(indexes: dict[str, ConceptIndex]) -> None:
    registry = CollectorRegistry(auto_describe=True)
    Counter("requests", "Of the application.", registry=registry).inc()
    collector = ConceptCollector({"a": indexes["one"]})
    registry.register(collector)
    first = values(registry)
    assert first["requests_total"] == {"": 1.0}
    [chunks] = [name for name in first if name.endswith("storage_chunks")]
    assert first[chunks] == {"a": indexes["one"].stats()["chunks"]}
    collector.add("b", indexes["two"])
    indexes["two"].delete_ref_doc("rock")
    assert values(registry)[chunks] == {"a": indexes["one"].stats()["chunks"], "b": 0.0}
    collector.remove("a")
    collector.remove("never there")
    assert values(registry)[chunks] == {"b": 0.0}
    text = generate_latest(registry).decode()
    assert 'index="b",namespace="two"' in text
    registry.unregister(collector)
    assert chunks not in values(registry)


def test_clashes_are_said(indexes: dict[str, ConceptIndex]) -> None:
    registry = CollectorRegistry(auto_describe=True)
    registry.register(ConceptCollector())
    with pytest.raises(ValueError, match="[Dd]uplicate"):
        registry.register(ConceptCollector())
    collector = ConceptCollector(indexes)
    with pytest.raises(ConfigurationError, match="one name"):
        collector.add("one", indexes["two"])


def test_the_same_values_as_the_text(indexes: dict[str, ConceptIndex]) -> None:
    registry = CollectorRegistry()
    registry.register(ConceptCollector(indexes))
    registered = {name: by_index["one"] for name, by_index in values(registry).items() if "one" in by_index}
    alone = {
        sample.name: sample.value
        for family in text_string_to_metric_families(indexes["one"].to_prometheus())
        for sample in family.samples
    }
    assert registered == alone

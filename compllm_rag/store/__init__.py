"""Where concepts live between ingestion and query: one protocol, a durable store and one in memory."""

from __future__ import annotations

from compllm_rag.store.base import ConceptStore, StoreStats
from compllm_rag.store.compaction import CompactReport
from compllm_rag.store.disk import DiskStore
from compllm_rag.store.memory import MemoryStore
from compllm_rag.store.packs import Location
from compllm_rag.store.verification import StoreCheck

__all__ = ["CompactReport", "ConceptStore", "DiskStore", "Location", "MemoryStore", "StoreCheck", "StoreStats"]

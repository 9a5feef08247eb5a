"""Where concepts live between ingestion and query: one protocol, and stores on disk, in Redis and in memory."""

from __future__ import annotations

from compllm_rag.store.base import ConceptStore, StoreStats
from compllm_rag.store.compaction import CompactReport
from compllm_rag.store.disk import DiskStore
from compllm_rag.store.durable import DurableStore
from compllm_rag.store.memory import MemoryStore
from compllm_rag.store.packs import Location
from compllm_rag.store.redis import RedisStore
from compllm_rag.store.verification import StoreCheck

__all__ = [
    "CompactReport",
    "ConceptStore",
    "DiskStore",
    "DurableStore",
    "Location",
    "MemoryStore",
    "RedisStore",
    "StoreCheck",
    "StoreStats",
]

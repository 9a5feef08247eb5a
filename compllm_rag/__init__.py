"""Retrieval-augmented generation that never pays twice for the same passage.

The public names load on first use, so that `import compllm_rag` stays cheap (no torch, no LlamaIndex).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from compllm_rag.compression.compressor import Compressor as Compressor
    from compllm_rag.compression.loading import load_compressor_for as load_compressor_for
    from compllm_rag.config import CompressorConfig as CompressorConfig
    from compllm_rag.config import GenerationConfig as GenerationConfig
    from compllm_rag.config import IngestConfig as IngestConfig
    from compllm_rag.generation.batching import BatchingGenerator as BatchingGenerator
    from compllm_rag.generation.local import LocalGenerator as LocalGenerator
    from compllm_rag.generation.reuse import PrefixCache as PrefixCache
    from compllm_rag.generation.scheduler import Scheduler as Scheduler
    from compllm_rag.generation.vllm.generator import VLLMGenerator as VLLMGenerator
    from compllm_rag.generation.vllm.settings import VLLMSettings as VLLMSettings
    from compllm_rag.library import ConceptLibrary as ConceptLibrary
    from compllm_rag.llamaindex.collector import ConceptCollector as ConceptCollector
    from compllm_rag.llamaindex.documents import load_documents as load_documents
    from compllm_rag.llamaindex.embedding import load_embedder as load_embedder
    from compllm_rag.llamaindex.importing import import_index as import_index
    from compllm_rag.llamaindex.index import ConceptIndex as ConceptIndex
    from compllm_rag.llamaindex.llm import ConceptLLM as ConceptLLM
    from compllm_rag.llamaindex.node_parser import ConceptNodeParser as ConceptNodeParser
    from compllm_rag.llamaindex.repair import repair_storage as repair_storage
    from compllm_rag.llamaindex.synthesizer import ConceptSynthesizer as ConceptSynthesizer
    from compllm_rag.llamaindex.transform import ConceptTransform as ConceptTransform
    from compllm_rag.llamaindex.uploads import UploadQueue as UploadQueue
    from compllm_rag.llamaindex.vector_store import FaissTextVectorStore as FaissTextVectorStore
    from compllm_rag.metrics import Metrics as Metrics
    from compllm_rag.models.llm import TargetLLM as TargetLLM
    from compllm_rag.reading.budgeted import BudgetedReadPolicy as BudgetedReadPolicy
    from compllm_rag.reading.choice import FixedReadPolicy as FixedReadPolicy
    from compllm_rag.storage.compaction import compact_storage as compact_storage
    from compllm_rag.storage.exporting import export_storage as export_storage
    from compllm_rag.storage.importing import import_storage as import_storage
    from compllm_rag.storage.migration import migrate_storage as migrate_storage
    from compllm_rag.storage.namespaces import delete_namespace as delete_namespace
    from compllm_rag.storage.namespaces import list_namespaces as list_namespaces
    from compllm_rag.storage.verification import verify_storage as verify_storage
    from compllm_rag.store import DiskStore as DiskStore
    from compllm_rag.store import MemoryStore as MemoryStore
    from compllm_rag.store import RedisStore as RedisStore

_HOME = {
    "BatchingGenerator": "generation.batching",
    "BudgetedReadPolicy": "reading.budgeted",
    "Compressor": "compression.compressor",
    "CompressorConfig": "config",
    "ConceptCollector": "llamaindex.collector",
    "ConceptIndex": "llamaindex.index",
    "ConceptLLM": "llamaindex.llm",
    "ConceptLibrary": "library",
    "ConceptNodeParser": "llamaindex.node_parser",
    "ConceptSynthesizer": "llamaindex.synthesizer",
    "ConceptTransform": "llamaindex.transform",
    "DiskStore": "store",
    "FaissTextVectorStore": "llamaindex.vector_store",
    "FixedReadPolicy": "reading.choice",
    "GenerationConfig": "config",
    "IngestConfig": "config",
    "LocalGenerator": "generation.local",
    "MemoryStore": "store",
    "RedisStore": "store",
    "Metrics": "metrics",
    "PrefixCache": "generation.reuse",
    "Scheduler": "generation.scheduler",
    "TargetLLM": "models.llm",
    "UploadQueue": "llamaindex.uploads",
    "VLLMGenerator": "generation.vllm.generator",
    "VLLMSettings": "generation.vllm.settings",
    "compact_storage": "storage.compaction",
    "delete_namespace": "storage.namespaces",
    "export_storage": "storage.exporting",
    "import_index": "llamaindex.importing",
    "import_storage": "storage.importing",
    "list_namespaces": "storage.namespaces",
    "load_compressor_for": "compression.loading",
    "load_documents": "llamaindex.documents",
    "load_embedder": "llamaindex.embedding",
    "migrate_storage": "storage.migration",
    "repair_storage": "llamaindex.repair",
    "verify_storage": "storage.verification",
}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> object:
    """Load a public name from its module (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(
            f"module 'compllm_rag' has no attribute {name!r}; public names: {', '.join(sorted(_HOME))}"
        )
    value = getattr(importlib.import_module(f"compllm_rag.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

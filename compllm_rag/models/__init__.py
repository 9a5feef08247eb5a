"""A name becomes a frozen LLM: where its files come from, the LLM itself, adapters, and plain text."""

from compllm_rag.models.cache import default_cache_dir
from compllm_rag.models.sources import ModelFiles, ModelInfo, list_models, resolve_model

__all__ = ["ModelFiles", "ModelInfo", "default_cache_dir", "list_models", "resolve_model"]

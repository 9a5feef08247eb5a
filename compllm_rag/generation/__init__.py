"""Turning laid-out prompts into answers: one protocol, and the local transformers backend."""

from compllm_rag.generation.base import Generation, GenerationBackend, TokenStream

__all__ = ["Generation", "GenerationBackend", "TokenStream"]

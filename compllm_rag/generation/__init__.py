"""Prompt plans become answers: one protocol, and the generator that runs the LLM in this process."""

from compllm_rag.generation.base import Generation, Generator, TokenStream

__all__ = ["Generation", "Generator", "TokenStream"]

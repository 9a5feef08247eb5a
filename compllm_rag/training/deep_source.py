"""The compressor of deep concepts that something is learned beside: a selector, losses by rate, relevance."""

from __future__ import annotations

from typing import Any

from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.loading import load_compressor_for
from compllm_rag.errors import ConfigurationError


def deep_source(llm: str, init: str, reader: str, *, refusal: str, instead: str = "", **options: Any) -> DeepCompressor:
    """Load it.

    Args:
        llm: Its target LLM.
        init: Folder of the compressor; `auto` takes the shipped one, or an untrained one.
        reader: Folder of the reader it was made with, "auto" for the shipped one, "none" for the LLM as it is.
        refusal: What is wrong with one that is not deep, in words.
        instead: What may be done in place of naming another.
        **options: See `load_compressor_for`.

    Raises:
        ConfigurationError: It is none of deep concepts.
        FingerprintMismatchError, UnknownModelError: See `load_compressor_for`.
    """
    made = load_compressor_for(llm, reader=None if reader == "none" else reader, compressor=init, **options)
    if not isinstance(made, DeepCompressor):
        raise ConfigurationError(
            refusal,
            got=f"{init}, concepts at the input embeddings",
            expected="a compressor of deep concepts",
            next_step="name another with --from" + (f", or {instead}" if instead else ""),
        )
    return made

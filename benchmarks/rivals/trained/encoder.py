"""The retrieval embedder as an encoder: the vector of a chunk, and the states of its word pieces."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from compllm_rag.models import resolve_model
from compllm_rag.models.quiet import quiet_transformers

# Chunks whose states are remembered: 256 word pieces of 384 numbers are 0.4 MB each.
_REMEMBERED = 256


class TokenEncoder:
    """A sentence-transformers model, frozen.

    Args:
        spec: Alias, local folder, or `org/name@revision`.
        tokenizer: The target LLM's, whose tokens are turned back into text.
    """

    def __init__(self, spec: str, tokenizer: Any) -> None:
        from sentence_transformers import SentenceTransformer

        with quiet_transformers():
            self._model: Any = SentenceTransformer(str(resolve_model(spec).path), device="cpu")
        self._tokenizer = tokenizer
        self.states = functools.lru_cache(_REMEMBERED)(self._states)
        self.vector = functools.lru_cache(_REMEMBERED)(self._vector)

    @property
    def width(self) -> int:
        """Of states and of vectors."""
        return len(self.vector((0,)))

    def _states(self, ids: tuple[int, ...]) -> torch.Tensor:
        """States (n_pieces, width) of a chunk's word pieces, special ones included, in float32 on the CPU.

        What is longer than the embedder reads is cut off.
        """
        return self._encoded(ids, "token_embeddings")

    def _vector(self, ids: tuple[int, ...]) -> torch.Tensor:
        """The vector (width,) by which a chunk is retrieved."""
        return self._encoded(ids, "sentence_embedding")

    def _encoded(self, ids: Sequence[int], what: str) -> torch.Tensor:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        with torch.no_grad():
            [made] = self._model.encode([text], output_value=what, convert_to_tensor=True, show_progress_bar=False)
        states: torch.Tensor = made.float().cpu()
        return states

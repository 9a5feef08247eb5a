"""Generation that ends when nobody waits for it, for components that know no cancellation."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from compllm_rag.config import GenerationConfig
from compllm_rag.generation.base import Generation, Generator, TokenStream
from compllm_rag.prompt import PromptPlan
from compllm_rag.server.work import Cancelled


class AbandonableGenerator:
    """A generator for one request: what it makes ends at the next token once the client has gone away.

    Args:
        inner: What runs the LLM.
        cancel: Of the request's ticket.
    """

    def __init__(self, inner: Generator, cancel: threading.Event) -> None:
        self._inner, self._cancel = inner, cancel

    @property
    def name(self) -> str:
        """How the LLM is named."""
        return self._inner.name

    @property
    def tokenizer(self) -> Any:
        """The LLM's tokenizer."""
        return self._inner.tokenizer

    @property
    def config(self) -> GenerationConfig:
        """Used where a call gives none."""
        return self._inner.config

    @property
    def window(self) -> int:
        """Positions a prompt and its answer may take together."""
        return self._inner.window

    def stream(
        self, plan: PromptPlan, config: GenerationConfig | None = None, cancel: threading.Event | None = None
    ) -> TokenStream:
        """Answer one prompt, piece by piece, until the client goes away; `cancel` is of no meaning here."""
        return self._inner.stream(plan, config, self._cancel)

    def generate(self, plans: Sequence[PromptPlan], config: GenerationConfig | None = None) -> list[Generation]:
        """Answer several prompts, one after the other.

        Raises:
            Cancelled: The client has gone away.
        """
        return [self._whole(plan, config) for plan in plans]

    def _whole(self, plan: PromptPlan, config: GenerationConfig | None) -> Generation:
        stream = self.stream(plan, config)
        for _ in stream:
            pass
        if self._cancel.is_set():
            raise Cancelled
        return stream.result

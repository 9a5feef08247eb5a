"""The protocol between an answering component and whatever runs the target LLM."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from compllm_rag.config import GenerationConfig
    from compllm_rag.prompt import PromptPlan

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Generation:
    """One answer and what it cost.

    Attributes:
        text: The answer, stop texts removed.
        token_ids: Generated tokens, the stop token left out.
        finish_reason: A stop token or text, the length limit, or a cancellation.
        prompt_positions: Positions of the prompt.
        layout_s: Seconds from the plan to laid-out embeddings.
        prefill_s: Seconds from the embeddings to the first token.
        decode_s: Seconds from the first token to the last.
        reused_positions: Those of the prompt's positions that had been read before, as the beginning of another prompt.
        queue_s: Seconds the prompt waited for other answers before its layout began.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_positions: int
    layout_s: float
    prefill_s: float
    decode_s: float
    reused_positions: int = 0
    queue_s: float = 0.0


class TokenStream(Protocol):
    """An answer that is being made: iterate for pieces of text, then read `result`."""

    def __iter__(self) -> Iterator[str]:
        """Pieces of text; joined they are `result.text`."""
        ...

    @property
    def result(self) -> Generation:
        """What it came to; complete once the iteration has ended (also when it was closed early)."""
        ...


class Generator(Protocol):
    """Runs the target LLM on prompt plans: what every answering component takes."""

    @property
    def name(self) -> str:
        """How the LLM is named."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The LLM's tokenizer; prompts are laid out with it."""
        ...

    @property
    def config(self) -> GenerationConfig:
        """Used where a call gives none."""
        ...

    @property
    def window(self) -> int:
        """Positions a prompt and its answer may take together."""
        ...

    def stream(
        self, plan: PromptPlan, config: GenerationConfig | None = None, cancel: threading.Event | None = None
    ) -> TokenStream:
        """Answer one prompt, piece by piece; setting `cancel` ends it at the next token."""
        ...

    def generate(self, plans: Sequence[PromptPlan], config: GenerationConfig | None = None) -> list[Generation]:
        """Answer several prompts as one batch."""
        ...


def narrows(generator: Generator) -> bool:
    """Whether it heeds `PromptPlan.narrowing`: one that does says so by an attribute `narrows`."""
    return bool(getattr(generator, "narrows", False))

"""Generation in this process for many who ask at the same time: their answers are decoded together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Self

from compllm_rag.config import GenerationConfig
from compllm_rag.generation.base import FinishReason, Generation
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.generation.requests import Request, Times
from compllm_rag.generation.reuse import PrefixCache
from compllm_rag.generation.scheduler import Scheduler
from compllm_rag.models.halves import Halves
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import PromptPlan


class BatchingGenerator(LocalGenerator):
    """A `LocalGenerator` whose answers share decoding steps with those of others who ask meanwhile.

    Answers are what `LocalGenerator` gives. Prompts are read one after the other, each by itself, and in parts while
    other answers go on; each answer may be decoded in its own way. Prompts with deep concepts and prompts without share
    no steps. LLMs whose layers do not take steps of several rows are decoded one by one, in turns, with a warning.

    The KV cache of an answer is not kept in `prefixes`, that of its prompt is.

    Args:
        llm: The target LLM.
        config: Used where a call gives none.
        halves: The LLM in two halves, to read deep concepts with; `halves` of their compressor or library.
        prefixes: See `LocalGenerator`. They are this generator's own, whoever shares its scheduler.
        scheduler: Decides what goes on next; generators of one LLM share one. None makes one.
    """

    def __init__(
        self,
        llm: TargetLLM,
        config: GenerationConfig | None = None,
        *,
        halves: Halves | None = None,
        prefixes: PrefixCache | None = None,
        scheduler: Scheduler | None = None,
    ) -> None:
        super().__init__(llm, config, halves=halves, prefixes=prefixes)
        self.scheduler = scheduler or Scheduler()

    @classmethod
    def over(cls, generator: LocalGenerator, scheduler: Scheduler | None = None) -> Self:
        """The same LLM, halves, settings and prefixes as those of another generator."""
        return cls(
            generator.llm,
            generator.config,
            halves=generator.halves,
            prefixes=generator.prefixes,
            scheduler=scheduler,
        )

    def stream(  # type: ignore[override]
        self, plan: PromptPlan, config: GenerationConfig | None = None, cancel: threading.Event | None = None
    ) -> BatchedStream:
        """Answer one prompt, piece by piece; it is queued when the first piece is asked for.

        Args:
            plan: The prompt.
            config: Limits; None takes the generator's.
            cancel: Ends the answer at the next token when set.

        Raises:
            PromptTooLongError: Prompt and answer do not fit the window.
        """
        return self._stream(plan, config or self.config, cancel, wait=False)

    def generate(self, plans: Sequence[PromptPlan], config: GenerationConfig | None = None) -> list[Generation]:
        """Answer several prompts, beside those of others; they wait for their turn however many there are.

        Returns:
            One answer per prompt, each with its own times.

        Raises:
            PromptTooLongError: A prompt and its answer do not fit the window.
            DeviceMemoryError: A prompt does not fit the memory, even with nothing beside it.
            OverloadedError: The scheduler was closed.
        """
        config = config or self.config
        streams = [self._stream(plan, config, None, wait=True) for plan in plans]
        try:
            for stream in streams:
                stream.begin()
            for stream in streams:
                for _ in stream:
                    pass
        finally:
            for stream in streams:
                stream.abandon()
        return [stream.result for stream in streams]

    def _stream(
        self, plan: PromptPlan, config: GenerationConfig, cancel: threading.Event | None, *, wait: bool
    ) -> BatchedStream:
        self._check(plan, config)

        def request() -> Request:
            return Request(self.llm, plan, config, lambda: self.lay_out([plan]), lambda: self._room_for([plan]), cancel)

        return BatchedStream(request, plan.positions, lambda made: self.scheduler.submit(made, wait=wait))


class BatchedStream:
    """An answer of `BatchingGenerator` that is being made; iterate once.

    Once it is queued it is made whether or not its pieces are taken, until it is closed.

    Args:
        request: Makes the request.
        positions: Of the prompt.
        submit: Queues it.
    """

    def __init__(self, request: Callable[[], Request], positions: int, submit: Callable[[Request], None]) -> None:
        self._make, self._positions, self._submit = request, positions, submit
        self._request: Request | None = None
        self._over = False
        self._ids: list[int] = []
        self._text = ""
        self._reason: FinishReason = "cancelled"

    def begin(self) -> None:
        """Queue the prompt now.

        Raises:
            OverloadedError: There is no place.
        """
        if self._request is None:
            request = self._make()
            self._submit(request)
            self._request = request

    def abandon(self) -> None:
        """Nobody takes more of it; harmless where it has ended."""
        if self._request is not None:
            self._request.abandon()

    def __iter__(self) -> Iterator[str]:
        """Pieces of text, none of them empty; there are none the second time.

        Raises:
            OverloadedError: There is no place in the queue.
            DeviceMemoryError: There is no memory for it.
        """
        self.begin()
        if self._request is None or self._over:
            return
        pieces = self._request.pieces
        reason: FinishReason | None = None
        try:
            while reason is None:
                made = pieces.get()
                if isinstance(made, Exception):
                    raise made
                if self._request.cancelled and self._request.closed is None:
                    break
                self._ids += made.tokens
                self._text += made.text
                if made.text:
                    yield made.text
                reason = made.reason
            self._reason = reason or "cancelled"
        finally:
            self._over = True
            self._request.abandon()

    @property
    def result(self) -> Generation:
        """The answer as far as it was taken; `finish_reason` is "cancelled" until the iteration has come to its end."""
        times = self._request.times if self._request is not None else Times()
        return Generation(
            self._text,
            list(self._ids),
            self._reason,
            self._positions,
            _between(times.begun, times.laid_out),
            _between(times.laid_out, times.first),
            _between(times.first, times.last),
            self._request.reused if self._request is not None else 0,
            _between(times.asked, times.begun),
        )


def _between(begun: float, ended: float) -> float:
    """Seconds; 0.0 where one of them has not come."""
    return max(0.0, ended - begun) if begun and ended else 0.0

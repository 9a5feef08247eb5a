"""A prompt on its way through the scheduler, and its answer on the way back to whoever asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import NamedTuple

import torch

from compllm_rag.config import GenerationConfig
from compllm_rag.generation.base import FinishReason
from compllm_rag.generation.forward import Forward
from compllm_rag.generation.reuse import reused_of
from compllm_rag.generation.rows import Row, Steps
from compllm_rag.generation.sampling import Choice
from compllm_rag.generation.structured import SchemaConstraint
from compllm_rag.generation.text import Detokenizer
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import PromptPlan


class Made(NamedTuple):
    """A piece of an answer.

    Attributes:
        tokens: Those that are new, none where the answer has ended.
        text: What is certain now, often empty.
        reason: Why the answer has ended; None while it has not.
    """

    tokens: tuple[int, ...]
    text: str
    reason: FinishReason | None = None


@dataclass
class Times:
    """Moments in the life of a request, in seconds of `time.perf_counter`; 0.0 while they have not come."""

    asked: float = 0.0
    begun: float = 0.0
    laid_out: float = 0.0
    first: float = 0.0
    last: float = 0.0


class Request:
    """A prompt that is to be answered. The scheduler's thread alone makes the answer; another thread takes it.

    Args:
        llm: The target LLM.
        plan: The prompt.
        config: How it is to be decoded.
        lay_out: Makes the prompt ready to be read; called in the scheduler's thread.
        room: Turns refusals of the allocator into an error that says what to do.
        cancel: Ends the answer at the next token when set.

    Attributes:
        pieces: What was made, an error in place of what cannot be made.
        times: What happened when.
        reused: Positions that were not read again.
        alone: Whether nothing else may be in work meanwhile: there was no memory for it beside others.
        parts: The prompt while it is being read.
        row: The prompt when it was read, and `steps`, what goes on with it.
        token: The newest of its answer.
        closed: What is said in place of the rest of an answer that is ended for all.
    """

    def __init__(
        self,
        llm: TargetLLM,
        plan: PromptPlan,
        config: GenerationConfig,
        lay_out: Callable[[], Forward],
        room: Callable[[], AbstractContextManager[None]],
        cancel: threading.Event | None = None,
    ) -> None:
        self.plan, self.config, self.room = plan, config, room
        self.pieces: SimpleQueue[Made | Exception] = SimpleQueue()
        self.times, self.reused, self.alone, self.token = Times(), 0, False, -1
        self.parts: Iterator[torch.Tensor | None] | None = None
        self.forward: Forward | None = None
        self.row: Row | None = None
        self.steps: Steps | None = None
        self._llm, self._lay_out, self._cancel = llm, lay_out, cancel
        self.closed: Exception | None = None
        self._abandoned, self._stop = False, llm.stop_ids()
        self._text, self._choose, self._made = Detokenizer(llm.tokenizer, config.stop), self._choice(), 0

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants more of the answer."""
        return self._abandoned or (self._cancel is not None and self._cancel.is_set())

    @property
    def device(self) -> torch.device:
        """Of the LLM."""
        return self._llm.device

    @property
    def decoded(self) -> Row:
        """The prompt as it is gone on with.

        Raises:
            RuntimeError: It has not been read.
        """
        if self.row is None:
            raise RuntimeError("a prompt is decoded before it was read")
        return self.row

    def abandon(self) -> None:
        """Nobody takes the answer any more; from whatever thread."""
        self._abandoned = True

    def close(self, error: Exception) -> None:
        """No more of the answer is made, and whoever takes it is told so."""
        if not self.cancelled:
            self.closed = error
        self._abandoned = True

    def begin(self, most: int | None) -> None:
        """Lay the prompt out, to be read in parts of at most so many slots."""
        self.times.begun = self.times.begun or time.perf_counter()
        self.forward = self._lay_out()
        self.times.laid_out = time.perf_counter()
        self.parts = self.forward.prefill_parts(most=most)

    def again(self) -> None:
        """Forget what was begun: it will be begun anew, with nothing beside it."""
        self.alone, self.parts, self.forward = True, None, None

    def read(self, steps: Callable[[Forward], Steps]) -> bool:
        """Read one more part of the prompt; whether the answer goes on, or there is more to read.

        Args:
            steps: Tells what goes on with prompts of a kind.
        """
        if self.parts is None or self.forward is None:
            raise RuntimeError("a prompt is read before it was laid out")
        logits = next(self.parts)
        if logits is None:
            return True
        # First the row: should there be no memory for it, the prompt is read again, and has to say nothing twice.
        goes_on_by = steps(self.forward)
        row = goes_on_by.take(self.forward, self.config.max_new_tokens)
        self.parts, self.forward, self.reused = None, None, reused_of(self.forward)
        if not self.add(logits):
            return False
        self.steps, self.row = goes_on_by, row
        return True

    def add(self, logits: torch.Tensor) -> bool:
        """Choose the next token and hand it on; whether the answer goes on.

        Args:
            logits: (1, vocab_size).
        """
        [self.token] = self._choose(logits)
        now = time.perf_counter()
        self.times.first, self.times.last = self.times.first or now, now
        if self.cancelled:
            return self.end("cancelled")
        if self.token in self._stop:
            return self.end("stop")
        self._made += 1
        text = self._text.push(self.token)
        ended: FinishReason | None = "stop" if self._text.stopped else None
        if ended is None and self._made >= self.config.max_new_tokens:
            ended = "length"
        if ended is None:
            self.pieces.put(Made((self.token,), text))
            return True
        self.pieces.put(Made((self.token,), text + self._text.finish(), ended))
        return False

    def end(self, reason: FinishReason) -> bool:
        """The answer ends without a further token; False."""
        if self.closed is not None and reason == "cancelled":
            self.fail(self.closed)
            return False
        self.pieces.put(Made((), self._text.finish(), reason))
        return False

    def fail(self, error: Exception) -> None:
        """There will be no more of the answer."""
        self.pieces.put(error)

    def _choice(self) -> Choice:
        constraint = None
        if self.config.json_schema is not None:
            constraint = SchemaConstraint(self._llm, self.config.json_schema, 1)
        return Choice(self.config, 1, constraint)

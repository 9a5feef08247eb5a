"""Generation in this process with transformers: prefill from embeddings, KV cache, decoding.

`generate()` of transformers is not used: with a prefilled cache it needs the full embeddings again and answers
wrongly without a word when given only the rest, and it offers no hook between prefill and the first token.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch

from compllm_rag.config import GenerationConfig, Narrowing
from compllm_rag.errors import ConfigurationError, DeviceMemoryError, PromptTooLongError
from compllm_rag.generation.base import FinishReason, Generation
from compllm_rag.generation.forward import Forward, WholeForward, as_rows
from compllm_rag.generation.halves import SplitForward, split_rows
from compllm_rag.generation.narrowed import NarrowedForward
from compllm_rag.generation.reuse import PrefixCache, ReusingForward, reused_of
from compllm_rag.generation.sampling import Choice
from compllm_rag.generation.structured import SchemaConstraint
from compllm_rag.generation.text import Detokenizer
from compllm_rag.handles import ProcessBound
from compllm_rag.models.device_memory import memory_trouble, release_unused, room_for
from compllm_rag.models.halves import Halves
from compllm_rag.models.llm import TargetLLM
from compllm_rag.models.narrowing import NarrowedHalves
from compllm_rag.prompt import PromptInputs, PromptPlan, lay_out

logger = logging.getLogger(__name__)


class LocalGenerator(ProcessBound):
    """Runs the target LLM in this process.

    Args:
        llm: The target LLM.
        config: Used where a call gives none.
        halves: The LLM in two halves, to read deep concepts with; `halves` of their compressor or library.
        prefixes: Keeps KV caches, so that a prompt is read from where it differs from one that was read before; None
            reads each from its start. An attribute of the same name may be set anew at any time. Prompts of a batch
            neither find nor leave anything there.
    """

    narrows = True  # see `generation.base.narrows`
    _opened_by = "make one there, over an LLM of that process"

    def __init__(
        self,
        llm: TargetLLM,
        config: GenerationConfig | None = None,
        *,
        halves: Halves | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.llm, self._config, self._halves = llm, config or GenerationConfig(), halves
        self.prefixes = prefixes
        self._parts: NarrowedHalves | None = None
        self._lock = threading.Lock()

    @functools.cached_property
    def halves(self) -> Halves | None:
        """The LLM in two halves; merged at the first prompt with deep concepts: who only ingests has no need of it.

        Where there is no memory for that they stay as they are, LoRA live.
        """
        if self._halves is None:
            return None
        try:
            return self._halves.merged()
        except (RuntimeError, MemoryError) as error:
            if memory_trouble(error) is None:
                raise
        release_unused(self.llm.device)
        logger.warning("no memory to merge the LoRA that reads concepts: questions are answered more slowly")
        return self._halves

    def prepare_narrowing(self, narrowing: Narrowing) -> None:
        """Have the LLM in the parts that narrowed prompts run through.

        Raises:
            ConfigurationError: There are no halves, or no such layer between them.
            UnsupportedModelError: See `NarrowedHalves`.
        """
        self._narrowed(narrowing)

    def _narrowed(self, narrowing: Narrowing) -> NarrowedHalves:
        """The LLM in its parts; the trees of the last one are kept."""
        with self._lock:
            if self._parts is None or self._parts.narrowing != narrowing:
                if self.halves is None:
                    raise ConfigurationError(
                        "this generator cannot read deep concepts",
                        got="a narrowed plan",
                        expected="a generator with the LLM's halves",
                        next_step="pass `halves` of the compressor or of the library",
                    )
                self._parts = NarrowedHalves(self.halves, narrowing)
            return self._parts

    @property
    def name(self) -> str:
        """How the LLM is named."""
        return self.llm.source

    @property
    def tokenizer(self) -> Any:
        """The LLM's tokenizer."""
        return self.llm.tokenizer

    @property
    def config(self) -> GenerationConfig:
        """Used where a call gives none."""
        return self._config

    @property
    def window(self) -> int:
        """Positions a prompt and its answer may take together."""
        return self.llm.window

    def stream(
        self, plan: PromptPlan, config: GenerationConfig | None = None, cancel: threading.Event | None = None
    ) -> LocalStream:
        """Answer one prompt, piece by piece.

        Args:
            plan: The prompt.
            config: Limits; None takes the generator's.
            cancel: Ends the answer at the next token when set.

        Raises:
            PromptTooLongError: Prompt and answer do not fit the window.
        """
        config = config or self.config
        self._check(plan, config)
        return LocalStream(self, plan, config, cancel)

    def generate(self, plans: Sequence[PromptPlan], config: GenerationConfig | None = None) -> list[Generation]:
        """Answer several prompts as one left-padded batch.

        Returns:
            One answer per prompt; `layout_s`, `prefill_s` and `decode_s` are those of the whole batch.

        Raises:
            PromptTooLongError: A prompt and its answer do not fit the window.
            DeviceMemoryError: Not even a single prompt fits the memory; a batch is halved before that.
        """
        config = config or self.config
        for plan in plans:
            self._check(plan, config)
        if not plans:
            return []
        kinds = [kind_of(plan) for plan in plans]
        if len(set(kinds)) > 1:  # text is read by the LLM as it is, deep concepts by its halves
            answers = {
                i: made
                for kind in dict.fromkeys(kinds)
                for chosen in [[i for i, own in enumerate(kinds) if own == kind]]
                for i, made in zip(chosen, self.generate([plans[i] for i in chosen], config), strict=True)
            }
            return [answers[i] for i in range(len(plans))]
        if len(plans) == 1:
            return self._generate(plans, config)
        with suppress(DeviceMemoryError):
            return self._generate(plans, config)
        half = len(plans) // 2
        return self.generate(plans[:half], config) + self.generate(plans[half:], config)

    def _generate(self, plans: Sequence[PromptPlan], config: GenerationConfig) -> list[Generation]:
        begun = time.perf_counter()
        forward = self.lay_out(plans)
        laid_out = time.perf_counter()
        texts = [Detokenizer(self.llm.tokenizer, config.stop) for _ in plans]
        ids: list[list[int]] = [[] for _ in plans]
        reasons: list[FinishReason | None] = [None for _ in plans]
        stop, first = self.llm.stop_ids(), laid_out
        for step, tokens in enumerate(self._tokens(forward, plans, config)):
            first = time.perf_counter() if step == 0 else first
            for row, token in enumerate(tokens):
                if reasons[row] is not None:
                    continue
                if token in stop:
                    reasons[row] = "stop"
                    continue
                ids[row].append(token)
                texts[row].push(token)
                reasons[row] = "stop" if texts[row].stopped else None
            if all(reasons):
                break
        ended = time.perf_counter()
        for text in texts:
            text.finish()
        return [
            Generation(
                t.text,
                i,
                r or "length",
                p.positions,
                laid_out - begun,
                first - laid_out,
                ended - first,
                reused_of(forward),
            )
            for t, i, r, p in zip(texts, ids, reasons, plans, strict=True)
        ]

    def _check(self, plan: PromptPlan, config: GenerationConfig) -> None:
        if plan.deep and self.halves is None:
            raise ConfigurationError(
                "this generator cannot read deep concepts",
                got="a plan with deep concepts",
                expected="a generator with the LLM's halves",
                next_step="pass `halves` of the compressor or of the library",
            )
        if plan.deep and plan.narrowing is not None:
            self._narrowed(plan.narrowing)  # whatever is wrong with it is said now
        if plan.extent + config.max_new_tokens > self.window:
            raise PromptTooLongError(
                "prompt does not fit the window of the LLM",
                got=f"{plan.extent} positions and {config.max_new_tokens} new tokens",
                expected=f"at most {self.window} together",
                next_step="retrieve fewer chunks, raise the compression rate, or shorten the question",
            )

    def lay_out(self, plans: Sequence[PromptPlan]) -> Forward:
        """Prompts of one kind (`kind_of`) as a batch that is ready to be read.

        Text alone is read by the LLM as it is, without anything that was trained for concepts. A narrowed prompt is
        read from its start: which concepts are read from layer T on depends on all of it.

        Raises:
            DeviceMemoryError: There is no memory for them.
        """
        with self._room_for(plans):
            made: WholeForward | SplitForward
            deep, narrowing = kind_of(plans[0])
            if deep and self.halves is not None:
                if narrowing is not None:
                    asking = [plan.asking for plan in plans]
                    return NarrowedForward(self._narrowed(narrowing), split_rows(plans), asking)
                made = SplitForward(self.halves, split_rows(plans))
            else:
                made = WholeForward(self.llm, lay_out(plans, self.llm))
            return made if self.prefixes is None or len(plans) > 1 else ReusingForward(made, plans[0], self.prefixes)

    def prefill(self, inputs: PromptInputs) -> tuple[torch.Tensor, Any]:
        """One forward of the LLM as it is over prompts that were laid out.

        Returns:
            Logits (batch, vocab_size) of the first new token, and the KV cache.
        """
        forward = WholeForward(self.llm, inputs)
        return forward.prefill(), forward.cache

    def begin(self, forward: Forward) -> torch.Tensor:
        """Read prompts; logits (batch, vocab_size) of the first new token of each."""
        return forward.prefill()

    def _tokens(self, forward: Forward, plans: Sequence[PromptPlan], config: GenerationConfig) -> Iterator[list[int]]:
        """Tokens of the whole batch, step by step; the caller decides when to stop.

        Raises:
            DeviceMemoryError: There is no memory for the next step.
        """
        limit, constraint = config.max_new_tokens, None
        if config.json_schema is not None:
            constraint = SchemaConstraint(self.llm, config.json_schema, len(plans))
        choose = Choice(config, len(plans), constraint)
        with self._room_for(plans):
            logits = self.begin(forward)  # (batch, vocab_size)
            for step in range(limit):
                tokens = choose(logits)
                yield tokens
                if step + 1 < limit:
                    logits = forward.extend(as_rows(tokens, self.llm.device))[:, -1]

    def _room_for(self, plans: Sequence[PromptPlan]) -> AbstractContextManager[None]:
        next_step = (
            "retrieve fewer chunks, raise the compression rate, end what else uses this device, or take another one"
        )
        positions = max(plan.positions for plan in plans)
        return room_for(f"answer a prompt of {positions} positions", self.llm.device, next_step)


def kind_of(plan: PromptPlan) -> tuple[bool, Narrowing | None]:
    """What prompts of one batch have in common: whether there are deep concepts, and how they are narrowed."""
    return plan.deep, plan.narrowing if plan.deep else None


class LocalStream:
    """An answer of `LocalGenerator` that is being made; iterate once."""

    def __init__(
        self, generator: LocalGenerator, plan: PromptPlan, config: GenerationConfig, cancel: threading.Event | None
    ) -> None:
        self._generator, self._plan, self._config, self._cancel = generator, plan, config, cancel
        self._text = Detokenizer(generator.llm.tokenizer, config.stop)
        self._ids: list[int] = []
        self._reason: FinishReason = "cancelled"
        self._layout_s = self._prefill_s = self._decode_s = 0.0
        self._reused = 0

    def __iter__(self) -> Iterator[str]:
        """Pieces of text, none of them empty."""
        begun = time.perf_counter()
        forward = self._generator.lay_out([self._plan])
        laid_out = time.perf_counter()
        self._layout_s = laid_out - begun
        stop, first = self._generator.llm.stop_ids(), 0.0
        reason: FinishReason = "length"
        for [token] in self._generator._tokens(forward, [self._plan], self._config):
            now = time.perf_counter()
            if not first:
                first, self._prefill_s, self._reused = now, now - laid_out, reused_of(forward)
            self._decode_s = now - first
            if self._cancel is not None and self._cancel.is_set():
                reason = "cancelled"
                break
            if token in stop:
                reason = "stop"
                break
            self._ids.append(token)
            if piece := self._text.push(token):
                yield piece
            if self._text.stopped:
                reason = "stop"
                break
        if piece := self._text.finish():
            yield piece
        self._reason = reason

    @property
    def result(self) -> Generation:
        """The answer so far; `finish_reason` is "cancelled" until the iteration has come to its end."""
        return Generation(
            self._text.text,
            list(self._ids),
            self._reason,
            self._plan.positions,
            self._layout_s,
            self._prefill_s,
            self._decode_s,
            self._reused,
        )

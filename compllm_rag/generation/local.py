"""Generation in this process with transformers: prefill from embeddings, KV cache, greedy decoding.

`generate()` of transformers is not used: with a prefilled cache it needs the full embeddings again and answers
wrongly without a word when given only the rest, and it offers no hook between prefill and the first token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch

from compllm_rag.config import GenerationConfig
from compllm_rag.errors import DeviceMemoryError, PromptTooLongError
from compllm_rag.generation.base import FinishReason, Generation
from compllm_rag.generation.text import Detokenizer
from compllm_rag.models.device_memory import room_for
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import PromptInputs, PromptPlan, lay_out


class LocalGenerator:
    """Runs the target LLM in this process.

    Args:
        llm: The target LLM.
        config: Used where a call gives none.
    """

    def __init__(self, llm: TargetLLM, config: GenerationConfig | None = None) -> None:
        self.llm, self._config = llm, config or GenerationConfig()

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
        if len(plans) == 1:
            return self._generate(plans, config)
        with suppress(DeviceMemoryError):
            return self._generate(plans, config)
        half = len(plans) // 2
        return self.generate(plans[:half], config) + self.generate(plans[half:], config)

    def _generate(self, plans: Sequence[PromptPlan], config: GenerationConfig) -> list[Generation]:
        begun = time.perf_counter()
        inputs = self._lay_out(plans)
        laid_out = time.perf_counter()
        texts = [Detokenizer(self.llm.tokenizer, config.stop) for _ in plans]
        ids: list[list[int]] = [[] for _ in plans]
        reasons: list[FinishReason | None] = [None for _ in plans]
        stop, first = self.llm.stop_ids(), laid_out
        for step, tokens in enumerate(self._tokens(inputs, config.max_new_tokens)):
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
            Generation(t.text, i, r or "length", p.positions, laid_out - begun, first - laid_out, ended - first)
            for t, i, r, p in zip(texts, ids, reasons, plans, strict=True)
        ]

    def _check(self, plan: PromptPlan, config: GenerationConfig) -> None:
        if plan.positions + config.max_new_tokens > self.window:
            raise PromptTooLongError(
                "prompt does not fit the window of the LLM",
                got=f"{plan.positions} positions and {config.max_new_tokens} new tokens",
                expected=f"at most {self.window} together",
                next_step="retrieve fewer chunks, raise the compression rate, or shorten the question",
            )

    @torch.inference_mode()
    def prefill(self, inputs: PromptInputs) -> tuple[torch.Tensor, Any]:
        """One forward over the prompt.

        Returns:
            Logits (batch, vocab_size) of the first new token, and the KV cache.
        """
        from transformers import DynamicCache

        out = self.llm.model(
            inputs_embeds=inputs.inputs_embeds,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            past_key_values=DynamicCache(config=self.llm.model.config),
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1], out.past_key_values

    def _tokens(self, inputs: PromptInputs, limit: int) -> Iterator[list[int]]:
        """Greedy tokens of the whole batch, step by step; the caller decides when to stop.

        Raises:
            DeviceMemoryError: There is no memory for the next step.
        """
        with self._room_for(inputs.inputs_embeds.shape[1]):
            yield from self._steps(inputs, limit)

    def _room_for(self, positions: int) -> AbstractContextManager[None]:
        next_step = (
            "retrieve fewer chunks, raise the compression rate, end what else uses this device, or take another one"
        )
        return room_for(f"answer a prompt of {positions} positions", self.llm.device, next_step)

    def _lay_out(self, plans: Sequence[PromptPlan]) -> PromptInputs:
        with self._room_for(max(plan.positions for plan in plans)):
            return lay_out(plans, self.llm)

    def _steps(self, inputs: PromptInputs, limit: int) -> Iterator[list[int]]:
        """See `_tokens`.

        Inference mode is entered for each step and left before each yield: it belongs to the thread, and a generator
        that is held open must not leave it switched on for its caller.
        """
        logits, cache = self.prefill(inputs)
        mask, positions = inputs.attention_mask, None
        if inputs.position_ids is not None:
            positions = inputs.position_ids[:, -1:] + 1
        for step in range(limit):
            tokens = logits.argmax(-1)
            yield tokens.tolist()
            if step + 1 == limit:
                return
            if mask is not None and positions is not None:
                mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
                positions = positions + (1 if step else 0)
            with torch.inference_mode():
                logits = self.llm.model(
                    input_ids=tokens[:, None],
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]


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

    def __iter__(self) -> Iterator[str]:
        """Pieces of text, none of them empty."""
        begun = time.perf_counter()
        inputs = self._generator._lay_out([self._plan])
        laid_out = time.perf_counter()
        self._layout_s = laid_out - begun
        stop, first = self._generator.llm.stop_ids(), 0.0
        reason: FinishReason = "length"
        for [token] in self._generator._tokens(inputs, self._config.max_new_tokens):
            now = time.perf_counter()
            if not first:
                first, self._prefill_s = now, now - laid_out
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
        )

"""The generator protocol over vLLM's engine in this process: no HTTP, no bound on what a prompt may weigh.

For long contexts: 64,000 concepts of a 2,560 wide LLM are 447 MB as a request, and a pointer here. vLLM has to be
installed beside this package, with versions that suit both.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from compllm_rag.config import GenerationConfig
from compllm_rag.errors import GeneratorMismatchError, PromptTooLongError
from compllm_rag.generation.base import FinishReason, Generation
from compllm_rag.generation.text import Detokenizer
from compllm_rag.generation.vllm.deep_rows import RowLayout, deep_rows
from compllm_rag.generation.vllm.matching import own_logprobs, probe, refuse_another
from compllm_rag.generation.vllm.responses import reason_of
from compllm_rag.generation.vllm.wire import is_text, refuse_deep, sampling_fields
from compllm_rag.handles import ProcessBound
from compllm_rag.models.halves import Halves
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import PromptPlan, TextSpan, embed_spans


class VLLMEngineGenerator(ProcessBound):
    """Runs prompts on a `vllm.LLM` of this process: text, and concepts at the input embeddings.

    The engine belongs to one thread at a time: a stream keeps it until its iteration ends.

    Args:
        engine: `vllm.LLM(MODEL, enable_prompt_embeds=True)`, of the same LLM, reader merged (`models export`).
        llm: The target LLM as the storage has it, with its reader; only its tokenizer and embeddings are used, but for
            the check.
        config: Used where a call gives none.
        tolerance: See `VLLMSettings`.
        halves: `halves` of the compressor or of the library, for an engine of a checkpoint that
            `write_deep_checkpoint` wrote, which reads deep concepts (see `deep_rows`). It reads text by the reading
            half, too.

    Raises:
        GeneratorMismatchError: The engine runs another LLM, or was made without `enable_prompt_embeds`.
    """

    _opened_by = "make one there, over an engine of that process"

    def __init__(
        self,
        engine: Any,
        llm: TargetLLM,
        config: GenerationConfig | None = None,
        *,
        tolerance: float = 0.1,
        halves: Halves | None = None,
    ) -> None:
        self.engine, self.llm, self._config = engine, llm, config or GenerationConfig()
        self.stop_ids = sorted(llm.stop_ids())
        self._turn, self._names = threading.Lock(), itertools.count()
        settings = engine.llm_engine.model_config
        self._window = min(llm.window, int(settings.max_model_len))
        self._layout = RowLayout.served(settings.hf_config)
        width = self._layout.hidden_size if self._layout else settings.get_hidden_size()
        if self._layout and (halves is None or halves.layer != self._layout.entry_layer):
            raise GeneratorMismatchError(
                "this engine reads deep concepts of another entry layer",
                got=f"entry layer {self._layout.entry_layer} in the engine, "
                + (f"{halves.layer} here" if halves else "no halves here"),
                expected="the same",
                next_step="pass `halves` of the compressor that the checkpoint was written for",
            )
        if not settings.enable_prompt_embeds or width != llm.hidden_size:
            raise GeneratorMismatchError(
                "this engine does not read concepts",
                got=f"enable_prompt_embeds={settings.enable_prompt_embeds}, width {width}",
                expected=f"enable_prompt_embeds=True, width {llm.hidden_size}",
                next_step="make it by vllm.LLM(MODEL, enable_prompt_embeds=True), with the LLM of the storage",
            )
        ids = probe(llm)
        [found] = engine.generate(
            [{"prompt_token_ids": ids}], self._sampling(max_tokens=1, prompt_logprobs=0), use_tqdm=False
        )
        theirs = [float(at[token].logprob) for at, token in zip(found.prompt_logprobs[1:], ids[1:], strict=True)]
        refuse_another(theirs, own_logprobs(llm, halves if self._layout else None), llm, tolerance)

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
        return self._window

    def stream(
        self, plan: PromptPlan, config: GenerationConfig | None = None, cancel: threading.Event | None = None
    ) -> EngineStream:
        """Answer one prompt, piece by piece; setting `cancel` ends it at the next token.

        Raises:
            ConfigurationError: Deep concepts, or a setting that vLLM understands otherwise.
            PromptTooLongError: Prompt and answer do not fit the window.
        """
        config = config or self.config
        self._check(plan, config)
        return EngineStream(self, [plan], config, cancel)

    def generate(self, plans: Sequence[PromptPlan], config: GenerationConfig | None = None) -> list[Generation]:
        """Answer several prompts, which the engine batches.

        Raises:
            ConfigurationError, PromptTooLongError: See `stream`.
        """
        config = config or self.config
        for plan in plans:
            self._check(plan, config)
        batch = EngineStream(self, plans, config, None)
        for _ in batch:
            pass
        return batch.results

    def run(
        self, plans: Sequence[PromptPlan], config: GenerationConfig
    ) -> Iterator[tuple[int, list[int], str | None, int]]:
        """Run prompts to their ends; closing the iterator ends those that are not there yet.

        Yields:
            Which prompt, its new tokens, why it ended (None: it has not), and positions that had been read before.
        """
        engine, config_fields = self.engine.llm_engine, sampling_fields(config, self.stop_ids)
        with self._turn:
            rows = {f"compllm-{next(self._names)}": row for row in range(len(plans))}
            made: dict[str, int] = {}
            try:
                for name, row in rows.items():
                    # The engine's own name for it; what is aborted is known by that.
                    own = engine.add_request(name, self._prompt(plans[row]), self._sampling(**config_fields))
                    made[name] = made[own] = row
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        [answer] = output.outputs
                        ids, reason = list(answer.token_ids), answer.finish_reason
                        yield made[output.request_id], ids, reason, int(output.num_cached_tokens or 0)
            finally:
                engine.abort_request([name for name in rows if name in made])
                while engine.has_unfinished_requests():  # what is on its way of them is not the next one's
                    engine.step()

    def _prompt(self, plan: PromptPlan) -> dict[str, Any]:
        if is_text(plan):
            return {"prompt_token_ids": [i for span in plan.spans if isinstance(span, TextSpan) for i in span.ids]}
        if self._layout:
            return {"prompt_embeds": deep_rows(plan, self.llm, self._layout)}
        return {"prompt_embeds": embed_spans(plan.spans, self.llm.embedding, self.llm.device).cpu()}

    def _sampling(self, **fields: Any) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        if "structured_outputs" in fields:
            fields["structured_outputs"] = StructuredOutputsParams(**fields["structured_outputs"])
        kind = RequestOutputKind.FINAL_ONLY if "prompt_logprobs" in fields else RequestOutputKind.DELTA
        return SamplingParams(**{"temperature": 0.0, "detokenize": False, "output_kind": kind, **fields})

    def _check(self, plan: PromptPlan, config: GenerationConfig) -> None:
        if self._layout is None:
            refuse_deep(plan)
        sampling_fields(config, self.stop_ids)
        if plan.positions + config.max_new_tokens > self.window:  # gaps are closed here
            raise PromptTooLongError(
                "prompt does not fit the window of the LLM",
                got=f"{plan.positions} positions and {config.max_new_tokens} new tokens",
                expected=f"at most {self.window} together",
                next_step="retrieve fewer chunks, raise the compression rate, or make the engine with a larger "
                "max_model_len",
            )


class EngineStream:
    """Answers of `VLLMEngineGenerator` that are being made; iterate once, for the pieces of the first."""

    def __init__(
        self,
        generator: VLLMEngineGenerator,
        plans: Sequence[PromptPlan],
        config: GenerationConfig,
        cancel: threading.Event | None,
    ) -> None:
        self._generator, self._plans, self._config, self._cancel = generator, plans, config, cancel
        self._texts = [Detokenizer(generator.tokenizer, config.stop) for _ in plans]
        self._ids: list[list[int]] = [[] for _ in plans]
        self._reasons: list[FinishReason | None] = [None for _ in plans]
        self._begun = self._first = self._last = 0.0
        self._cached = [0 for _ in plans]

    def __iter__(self) -> Iterator[str]:
        """Pieces of the first answer's text, none of them empty."""
        self._begun = time.perf_counter()
        for row, tokens, told, cached in self._generator.run(self._plans, self._config):
            self._last = time.perf_counter()
            self._first, self._cached[row] = self._first or self._last, max(cached, self._cached[row])
            for token in tokens:
                piece = self._take(row, token)
                if piece and row == 0:
                    yield piece
            if self._reasons[row] is None and told is not None:
                self._reasons[row] = reason_of(told)
            if all(self._reasons):
                break
        for row, text in enumerate(self._texts):
            piece = text.finish()
            if piece and row == 0:
                yield piece

    def _take(self, row: int, token: int) -> str:
        if self._reasons[row] is not None:
            return ""
        if self._cancel is not None and self._cancel.is_set():
            self._reasons[row] = "cancelled"
        elif token in self._generator.stop_ids:
            self._reasons[row] = "stop"
        else:
            self._ids[row].append(token)
            piece = self._texts[row].push(token)
            self._reasons[row] = "stop" if self._texts[row].stopped else None
            return piece
        return ""

    @property
    def result(self) -> Generation:
        """The first answer so far; `finish_reason` is "cancelled" until the iteration has come to its end."""
        return self.results[0]

    @property
    def results(self) -> list[Generation]:
        """All of them; times are those of the whole batch."""
        return [
            Generation(
                text.text,
                list(ids),
                reason or "cancelled",
                plan.positions,
                0.0,
                max(0.0, self._first - self._begun),
                self._last - self._first,
                cached,
            )
            for text, ids, reason, plan, cached in zip(
                self._texts, self._ids, self._reasons, self._plans, self._cached, strict=True
            )
        ]

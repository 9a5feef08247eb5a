"""The generator protocol over a running `vllm serve`."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from compllm_rag.config import GenerationConfig
from compllm_rag.errors import ConfigurationError, GeneratorRefusedError, PromptTooLongError
from compllm_rag.generation.base import FinishReason, Generation
from compllm_rag.generation.text import Detokenizer
from compllm_rag.generation.vllm.checks import ServerChecks
from compllm_rag.generation.vllm.client import Running, VLLMClient
from compllm_rag.generation.vllm.deep_rows import RowLayout
from compllm_rag.generation.vllm.responses import reason_of, too_large
from compllm_rag.generation.vllm.settings import VLLMSettings
from compllm_rag.generation.vllm.wire import is_text, payload_bytes, prompt_fields, refuse_deep, sampling_fields
from compllm_rag.handles import ProcessBound
from compllm_rag.models.halves import Halves
from compllm_rag.models.llm import TargetLLM, decoder_of
from compllm_rag.prompt import PromptPlan


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


class VLLMGenerator(ProcessBound):
    """Runs prompts on a vLLM server: text and concepts at the input embeddings, or, with `halves`, deep concepts.

    Greedy answers are those of `LocalGenerator`, as far as the server computes alike; what is drawn at random is drawn
    by the server, so that a seed gives other answers there. Nothing is asked of the server before the first prompt;
    then it is checked that it runs this LLM (`matching`), and again once it may have been started anew (`checks`).

    Args:
        url: Of the server, such as `http://127.0.0.1:8001`.
        llm: The target LLM as the storage has it, with its reader; only its tokenizer and embeddings are used, but for
            the check.
        config: Used where a call gives none.
        settings: How the server is asked; None takes the API key from the environment (`COMPLLM_VLLM_API_KEY`).
        halves: `halves` of the compressor or of the library, for a server of what `models export --deep` wrote. It
            reads deep concepts in another way than `LocalGenerator` (see `deep_rows`), and all else by the reading
            half.

    Raises:
        ConfigurationError: The address is none.
        MissingExtraError: The extra `vllm` is not installed.
    """

    _opened_by = "make one there, with the same address"

    def __init__(
        self,
        url: str,
        llm: TargetLLM,
        config: GenerationConfig | None = None,
        *,
        settings: VLLMSettings | None = None,
        halves: Halves | None = None,
    ) -> None:
        if not _is_address(url):
            raise ConfigurationError(
                "this is no address of a server", got=url, expected="http://HOST:PORT", next_step="begin with http://"
            )
        self.llm, self._config = llm, config or GenerationConfig()
        self.client = VLLMClient(url, settings or VLLMSettings.from_environment())
        self._halves = halves
        self._layout = None if halves is None else RowLayout.of(decoder_of(llm.model).config, halves.layer)
        self.stop_ids = sorted(llm.stop_ids())
        self._checks = ServerChecks(self.client, llm, halves)
        self._salt = self.client.settings.cache_salt

    def apart(self, salt: str | None = None) -> VLLMGenerator:
        """The same for another tenant: with a prefix cache of its own at the server.

        So nobody learns from how soon an answer comes what others asked. Client, bound and checks are shared; closing
        either closes both.

        Args:
            salt: See `VLLMSettings.cache_salt`; None makes a secret.
        """
        made = VLLMGenerator.__new__(VLLMGenerator)
        made.__dict__.update(self.__dict__, _salt=salt or secrets.token_urlsafe(32))
        return made

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
        """Positions a prompt and its answer may take together: what the server has room for, if that is less.

        Raises:
            GeneratorUnavailableError, GeneratorMismatchError: See `stream`.
        """
        return min(self.llm.window, self._checks.model()[1])

    def stream(
        self, plan: PromptPlan, config: GenerationConfig | None = None, cancel: threading.Event | None = None
    ) -> VLLMStream:
        """Answer one prompt, piece by piece.

        Args:
            plan: The prompt.
            config: Limits; None takes the generator's.
            cancel: Ends the answer when set, at the server, too.

        Raises:
            ConfigurationError: Deep concepts, or a setting that vLLM understands otherwise.
            PromptTooLongError: Prompt and answer do not fit the window, or the prompt is longer than may be sent.
            GeneratorMismatchError: The server runs another LLM, or takes no embeddings.
            GeneratorUnavailableError: The server cannot be reached, or has no time after all tries.
            GeneratorRefusedError: The server refuses a request, or answers what makes no sense.
        """
        config = config or self.config
        self._check(plan, config)
        return VLLMStream(self, plan, config, cancel)

    def generate(self, plans: Sequence[PromptPlan], config: GenerationConfig | None = None) -> list[Generation]:
        """Answer several prompts; the server batches those that run at a time (`VLLMSettings.concurrency`).

        Returns:
            One answer per prompt, each with its own times.

        Raises:
            CompLLMError: See `stream`; the others are ended then.
        """
        config = config or self.config
        for plan in plans:
            self._check(plan, config)
        failed = threading.Event()  # by one of them: those in front of it are not waited for
        streams = [VLLMStream(self, plan, config, failed, failed) for plan in plans]
        try:
            for stream in streams:
                stream.begin()
            for stream in streams:
                for _ in stream:
                    pass
            for stream in streams:  # `failed` ends the one that failed like the others, pieces before its error untaken
                if (error := stream.begin().error) is not None:
                    raise error
        finally:
            for stream in streams:
                stream.end()
        return [stream.result for stream in streams]

    def close(self) -> None:
        """End what runs, and the connections."""
        self.client.close()

    def _check(self, plan: PromptPlan, config: GenerationConfig) -> None:
        if self._layout is None:
            refuse_deep(plan)
        sampling_fields(config, self.stop_ids)
        if plan.positions + config.max_new_tokens > self.window:  # the server knows no gaps
            raise PromptTooLongError(
                "prompt does not fit the window of the LLM",
                got=f"{plan.positions} positions and {config.max_new_tokens} new tokens",
                expected=f"at most {self.window} together",
                next_step="retrieve fewer chunks, raise the compression rate, shorten the question, or start vLLM with "
                "a larger --max-model-len",
            )
        if (size := payload_bytes(plan, self.llm, self._layout)) > self.client.settings.max_payload_bytes:
            raise too_large(size, self.client.settings)
        self._checks.match(text=is_text(plan))

    def request(self, plan: PromptPlan, config: GenerationConfig, failed: threading.Event | None = None) -> Running:
        """Send the request of one prompt.

        Args:
            plan: The prompt.
            config: Limits.
            failed: Set when it fails.
        """
        return self.client.stream(
            lambda: self._fields(plan, config), failed, before=lambda: self._checks.match(text=is_text(plan))
        )

    def _fields(self, plan: PromptPlan, config: GenerationConfig) -> dict[str, Any]:
        return {
            "model": self._checks.name,
            **prompt_fields(plan, self.llm, self._layout),
            **sampling_fields(config, self.stop_ids),
            **({} if self._salt is None else {"cache_salt": self._salt}),
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }


class VLLMStream:
    """An answer of `VLLMGenerator` that is being made; iterate once."""

    def __init__(
        self,
        generator: VLLMGenerator,
        plan: PromptPlan,
        config: GenerationConfig,
        cancel: threading.Event | None,
        failed: threading.Event | None = None,
    ) -> None:
        self._failed = failed
        self._generator, self._plan, self._config, self._cancel = generator, plan, config, cancel
        self._text = Detokenizer(generator.llm.tokenizer, config.stop)
        self._ids: list[int] = []
        self._reason: FinishReason = "cancelled"
        self._running: Running | None = None
        self._begun = self._sent = self._first = self._last = 0.0
        self._reused = 0

    def begin(self) -> Running:
        """Send the request, if it is not sent; nobody needs to take what arrives yet."""
        if self._running is None:
            self._begun = time.perf_counter()
            self._running = self._generator.request(self._plan, self._config, self._failed)
        return self._running

    def end(self) -> None:
        """End the answer at the server, if it is not at its end."""
        if self._running is not None:
            self._running.end()

    def __iter__(self) -> Iterator[str]:
        """Pieces of text, none of them empty.

        Raises:
            GeneratorUnavailableError, GeneratorRefusedError, PromptTooLongError: See `VLLMGenerator.stream`.
        """
        reason: FinishReason | None = None
        for arrived in self.begin().pieces(self._cancel):
            if arrived.piece is None:
                self._sent = arrived.at
                continue
            if arrived.piece.cached is not None:
                self._reused = arrived.piece.cached
            for token in arrived.piece.token_ids if reason is None else ():
                self._first, self._last = self._first or arrived.at, arrived.at
                piece, reason = self._take(token)
                if piece:
                    yield piece
                if reason is not None:
                    break
            told = self._told(arrived.piece.finish_reason)
            if reason is not None and told is None and arrived.piece.token_ids:
                break  # a stop text or a cancellation, of which the server knows nothing
            reason = reason or told
        cancelled = self._cancel is not None and self._cancel.is_set()
        if reason is None and not cancelled:
            raise GeneratorRefusedError(
                "the server's answer has no end",
                got=f"{len(self._ids)} tokens and no reason why no more",
                expected="a finish_reason",
                next_step="see its log",
            )
        if piece := self._text.finish():
            yield piece
        self._reason = reason or "cancelled"

    def _take(self, token: int) -> tuple[str, FinishReason | None]:
        """Add a token; the text that is now certain, and why there is no more."""
        if self._cancel is not None and self._cancel.is_set():
            return "", "cancelled"
        if token in self._generator.stop_ids:
            return "", "stop"
        self._ids.append(token)
        piece = self._text.push(token)
        return piece, "stop" if self._text.stopped else None

    def _told(self, told: str | None) -> FinishReason | None:
        return None if told is None else reason_of(told)

    @property
    def result(self) -> Generation:
        """The answer so far; `finish_reason` is "cancelled" until the iteration has come to its end."""
        return Generation(
            self._text.text,
            list(self._ids),
            self._reason,
            self._plan.positions,
            max(0.0, self._sent - self._begun),
            max(0.0, self._first - self._sent),
            self._last - self._first,
            self._reused,
        )

"""A generator known by the name of its LLM, which is loaded when it is first needed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from compllm_rag.config import Frozen, GenerationConfig
from compllm_rag.errors import ConfigurationError, FingerprintMismatchError
from compllm_rag.generation.base import Generation, Generator, TokenStream
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.models.llm import IN_MEMORY, TargetLLM
from compllm_rag.prompt import PromptPlan


class LLMName(Frozen):
    """How an LLM is found again, and how to know that it is the same.

    Attributes:
        source: Alias, folder or `org/name@revision`.
        reader: Folder of the reader adapter that is merged into it.
        dtype: Compute dtype.
        device: Torch device.
        identity: Of its files.
    """

    source: str
    reader: str | None = None
    dtype: str | None = None
    device: str | None = None
    identity: str | None = None

    @classmethod
    def of(cls, generator: Generator) -> LLMName | None:
        """The name behind a generator; None where only an object in memory is."""
        if isinstance(generator, NamedGenerator):
            return generator.llm_name
        if not isinstance(generator, LocalGenerator) or generator.llm.source == IN_MEMORY:
            return None
        llm = generator.llm
        return cls(
            source=llm.source,
            reader=None if llm.reader is None else str(llm.reader),
            dtype=str(llm.dtype).removeprefix("torch."),
            device=llm.device.type,
            identity=llm.identity,
        )

    def load(self) -> TargetLLM:
        """Load the LLM.

        Raises:
            FingerprintMismatchError: There is another one under this name now.
            UnknownModelError, ModelFetchError, UnsupportedModelError: See `TargetLLM.from_pretrained`.
        """
        reader = None if self.reader is None else Path(self.reader)
        llm = TargetLLM.from_pretrained(self.source, reader=reader, dtype=self.dtype, device=self.device)
        if self.identity is not None and llm.identity != self.identity:
            raise FingerprintMismatchError(
                "another LLM lies under this name now",
                got=f"{self.source} ({llm.identity[:16]})",
                expected=self.identity[:16],
                next_step="bring the former files back, or make the component anew",
            )
        return llm


class NamedGenerator:
    """Runs an LLM in this process, from its first prompt on; see `LocalGenerator`.

    Args:
        llm_name: Which LLM.
        config: Used where a call gives none.
    """

    narrows = True  # see `generation.base.narrows`

    def __init__(self, llm_name: LLMName, config: GenerationConfig | None = None) -> None:
        self.llm_name, self._config, self._lock = llm_name, config or GenerationConfig(), threading.Lock()

    @cached_property
    def _loaded(self) -> LocalGenerator:
        return LocalGenerator(self.llm_name.load(), self._config)

    @property
    def loaded(self) -> LocalGenerator:
        """The generator itself; the LLM is loaded now, if it was not before."""
        with self._lock:
            return self._loaded

    @property
    def name(self) -> str:
        """How the LLM is named."""
        return self.llm_name.source

    @property
    def tokenizer(self) -> Any:
        """The LLM's tokenizer."""
        return self.loaded.tokenizer

    @property
    def config(self) -> GenerationConfig:
        """Used where a call gives none."""
        return self._config

    @property
    def window(self) -> int:
        """Positions a prompt and its answer may take together."""
        return self.loaded.window

    def stream(
        self, plan: PromptPlan, config: GenerationConfig | None = None, cancel: threading.Event | None = None
    ) -> TokenStream:
        """Answer one prompt, piece by piece."""
        return self.loaded.stream(plan, config, cancel)

    def generate(self, plans: Sequence[PromptPlan], config: GenerationConfig | None = None) -> list[Generation]:
        """Answer several prompts as one batch."""
        return self.loaded.generate(plans, config)


def named_generator(data: dict[str, Any]) -> NamedGenerator:
    """The generator that a component's dictionary names.

    Args:
        data: With `llm`, an `LLMName` as a dictionary, and `generation`.

    Raises:
        ConfigurationError: It names none: the LLM was an object in memory, or ran elsewhere.
    """
    if not data.get("llm"):
        raise ConfigurationError(
            "this dictionary names no LLM that could be loaded",
            got="an LLM that was given as an object",
            expected="one loaded by TargetLLM.from_pretrained, or from a storage",
            next_step="pass generator= to from_dict",
        )
    return NamedGenerator(LLMName.model_validate(data["llm"]), GenerationConfig.model_validate(data["generation"]))

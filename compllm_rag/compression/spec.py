"""What is known of a compressor without its weights: enough to cut texts up, name their records and check them.

Whoever only reads concepts loads no compressor. It is loaded on the first miss.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from compllm_rag.compression.late_interaction import LateInteraction
from compllm_rag.compression.rate_policies.losses import LossPredictor
from compllm_rag.compression.segmentation import Segmenter, units_of
from compllm_rag.config import CompressorConfig, Narrowing
from compllm_rag.errors import FingerprintMismatchError
from compllm_rag.models.adapters import inject_lora, load_lora_state
from compllm_rag.models.halves import Halves, lower_half
from compllm_rag.models.llm import TargetLLM
from compllm_rag.models.plaintext import encode_plain

_ORDINARY = "The lighthouse on the rock was built of stone, and for ninety years its lamp was lit every evening."


@dataclass(frozen=True)
class ConceptSpec:
    """A kind of concepts.

    Attributes:
        config: Of the compressor that makes them.
        fingerprint: Identity of everything they depend on.
        segmenter: Cuts texts into what is compressed.
        hidden_size: Width of a concept.
        scale: RMS of the LLM's input embeddings, or of its states in front of the entry layer; concepts are measured
            against it.
        depth: D, how many layers the LLM has.
    """

    config: CompressorConfig
    fingerprint: str
    segmenter: Segmenter
    hidden_size: int
    scale: float
    depth: int

    def prefill_cost(self, rate: float, narrowing: Narrowing | None = None) -> float:
        """What one token of a passage costs at prefill, and in the KV cache, as a share of a token of text.

        A concept passes the layers from the entry layer L on: (D - L) / (D C). With narrowing all of them pass those
        up to layer T, and a share s those from T on: (T - L + s (D - T)) / (D C).

        Args:
            rate: C, achieved source tokens per concept.
            narrowing: T and s.
        """
        passed: float = self.depth - self.config.entry_layer
        if narrowing is not None:
            passed -= (1 - narrowing.share) * (self.depth - narrowing.layer)
        return passed / (self.depth * rate)

    @property
    def width(self) -> int:
        """Columns of a record in the store: a deep concept has one more, its place within its unit."""
        return self.hidden_size + self.config.deep

    def units(self, text: str) -> list[list[int]]:
        """Token ids of each unit of compression of a text; joined they are the text's.

        CompLLM's are segments, those of deep concepts chunks.
        """
        tokenized = self.segmenter.tokenize(text)
        if self.config.deep:
            return units_of(tokenized, self.config.unit_length)
        return tokenized.segment_ids()


class ConceptCompressor(Protocol):
    """Makes concepts of one kind: CompLLM's at the input embeddings, or deep ones."""

    llm: TargetLLM
    config: CompressorConfig
    losses: LossPredictor | None
    interaction: LateInteraction | None

    @property
    def halves(self) -> Halves | None:
        """Of deep concepts: the LLM in two halves, as it reads them."""
        ...

    @property
    def spec(self) -> ConceptSpec:
        """What is known of its concepts without its weights."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identity of everything its concepts depend on."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width of a concept."""
        ...

    def refresh_fingerprint(self) -> str:
        """Compute the fingerprint again, after the weights changed."""
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """Everything learned, in fp16 as it is saved."""
        ...

    def kept_places(self, units: Sequence[Sequence[int]], n_concepts: Sequence[int]) -> list[list[int]]:
        """The tokens of each unit that its concepts stand for, in order."""
        ...

    def compress(self, units: Sequence[Sequence[int]], n_concepts: Sequence[int]) -> list[torch.Tensor]:
        """One tensor (K, width) per unit, float32 on the CPU, in the order given."""
        ...

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write it to a folder."""
        ...


class DeferredCompressor:
    """A compressor that is loaded when something has to be compressed.

    Args:
        spec: What its concepts are.
        llm: The target LLM.
        load: Loads it.
        halves: Of deep concepts: the LLM in two halves, as it reads them.
        losses: Reads what rates lose, where that was fitted; it needs no weights.
        interaction: Reads which sentence answers a question, where that was learned; it needs no weights, either.
    """

    def __init__(
        self,
        spec: ConceptSpec,
        llm: TargetLLM,
        load: Callable[[], ConceptCompressor],
        halves: Halves | None = None,
        losses: Callable[[], LossPredictor | None] = lambda: None,
        interaction: Callable[[], LateInteraction | None] = lambda: None,
    ) -> None:
        self.spec, self.llm, self._load, self.halves, self._losses = spec, llm, load, halves, losses
        self._interaction = interaction
        self._loaded: ConceptCompressor | None = None
        self._lock = threading.Lock()

    @functools.cached_property
    def losses(self) -> LossPredictor | None:
        """What rates lose, if that was fitted; the weights stay where they are.

        Raises:
            UnsupportedFormatError: See `LossPredictor.load`.
        """
        return self._losses()

    @functools.cached_property
    def interaction(self) -> LateInteraction | None:
        """Which sentence answers a question, if that was learned; the weights stay where they are.

        Raises:
            UnsupportedFormatError: See `LateInteraction.load`.
        """
        return self._interaction()

    @property
    def loaded(self) -> bool:
        """Whether it was needed so far."""
        return self._loaded is not None

    def get(self) -> ConceptCompressor:
        """The compressor itself.

        Raises:
            FingerprintMismatchError: It is not the one that the spec describes.
            UnsupportedFormatError: Its files are damaged.
        """
        with self._lock:
            if self._loaded is None:
                made = self._load()
                if made.fingerprint != self.spec.fingerprint:
                    raise FingerprintMismatchError(
                        "compressor was changed since the storage was opened",
                        got=made.fingerprint[:16],
                        expected=self.spec.fingerprint[:16],
                        next_step="open the storage again",
                    )
                self._loaded = made
            return self._loaded


def reading_halves(
    llm: TargetLLM, config: CompressorConfig, read: dict[str, torch.Tensor], prompt: dict[str, torch.Tensor]
) -> Halves:
    """The LLM in two halves, each with the LoRA by which prompts with deep concepts are read.

    Args:
        llm: The target LLM.
        config: Of the compressor.
        read: Tensors of the upper half's LoRA, empty where `config` has none.
        prompt: Those of the lower half's.

    Raises:
        UnsupportedFormatError: They are not those that `config` tells of.
    """
    halves = Halves(llm, config.entry_layer)
    inject_reading(halves, config)
    load_lora_state(halves.upper, read)
    load_lora_state(halves.lower, prompt)
    return halves


def inject_reading(halves: Halves, config: CompressorConfig) -> None:
    """Add the LoRAs by which prompts with deep concepts are read, where a configuration has them, without an effect."""
    if config.read_rank:
        inject_lora(halves.upper, rank=config.read_rank, alpha=config.read_alpha, modules=config.read_modules)
    if config.prompt_rank:
        rank, alpha, modules = config.prompt_rank, config.prompt_alpha, config.prompt_modules
        inject_lora(halves.lower, rank=rank, alpha=alpha, modules=modules)


def state_rms(llm: TargetLLM, config: CompressorConfig) -> float:
    """Root mean square of the residual stream in front of the entry layer, at a typical token of ordinary text.

    A few dimensions, and all of a prompt's first token, may be a hundred times larger: hence the median.
    """
    ids = torch.tensor([[*config.opening, *encode_plain(llm.tokenizer, _ORDINARY)["input_ids"]]], device=llm.device)
    with torch.inference_mode():
        hidden = lower_half(llm.model, config.entry_layer)(
            inputs_embeds=llm.embedding(ids), use_cache=False
        ).last_hidden_state  # (1, n, hidden_size)
    return float(hidden[0].float().square().mean(-1).sqrt().median())


def embedding_rms(llm: TargetLLM) -> float:
    """Root mean square of the input embeddings, post-scale: the scale a trained compressor starts with.

    Taken once, by whoever creates the configuration: it is part of the identity, and must not depend on the dtype that
    some later machine computes in.
    """
    rows = min(llm.embedding.weight.shape[0], 4096)
    return float(llm.embed(range(rows)).float().pow(2).mean().sqrt())

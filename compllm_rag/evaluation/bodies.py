"""Passages as the spans each mode puts in their place: text, concepts, the anchors alone, or nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch

from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.rates import FixedRate
from compllm_rag.errors import ConfigurationError
from compllm_rag.prompt import ConceptSpan, Span, TextSpan
from compllm_rag.store.encodings import encoding_named

EvalMode = Literal["text", "concepts", "pruned", "none"]
MODES: tuple[EvalMode, ...] = get_args(EvalMode)
COMPRESSED = ("concepts", "pruned")

# Passages whose concepts are kept for the questions that follow; the runner asks those of one passage in a row.
_KEPT = 256


@dataclass(frozen=True)
class Setting:
    """What is measured: how passages are read, and at which rate.

    Args:
        mode: `text`; `concepts`; `pruned`, the anchors' own embeddings, as an untrained compressor would have it; or
            `none`, the same prompt without passages.
        rate: Source tokens per concept, None for text and none.
        encoding: Give concepts the precision of a storage with this encoding; None reads them as they are made.
    """

    mode: EvalMode
    rate: float | None = None
    encoding: str | None = None

    @classmethod
    def of(cls, mode: str, rate: float | None = None, encoding: str | None = None) -> Setting:
        """The setting of a mode's name.

        Raises:
            ConfigurationError: No such mode, or a rate is missing.
        """
        found = next((known for known in MODES if known == mode), None)
        if found is None:
            raise ConfigurationError(
                "unknown mode", got=mode, expected=", ".join(MODES), next_step="pass one of these modes"
            )
        if found not in COMPRESSED:
            return cls(found)
        if rate is None:
            raise ConfigurationError(
                f"mode {found} needs a rate", got=None, expected="source tokens per concept", next_step="use 2 or 4"
            )
        return cls(found, float(rate), encoding if found == "concepts" else None)

    def __str__(self) -> str:
        text = self.mode if self.rate is None else f"{self.mode} at rate {self.rate:g}"
        return text if self.encoding is None else f"{text} in {self.encoding}"


class Segmented:
    """Segments of each text that was asked for, cut once for all modes."""

    def __init__(self, compressor: Compressor) -> None:
        self._segmenter = compressor.segmenter
        self._known: dict[str, list[list[int]]] = {}

    def __call__(self, text: str) -> list[list[int]]:
        """Token ids of each segment; joined they are the text's."""
        if text not in self._known:
            self._known[text] = self._segmenter.split(text)
        return self._known[text]

    def n_tokens(self, text: str) -> int:
        """Source tokens of a text."""
        return sum(map(len, self(text)))


class PassageBodies(Protocol):
    """Gives the spans that stand for a passage in a prompt."""

    def size(self, text: str) -> int:
        """Prompt positions of a passage."""
        ...

    def prepare(self, texts: Iterable[str]) -> None:
        """Make what these passages need; called before `spans` of any of them."""
        ...

    def spans(self, text: str, passage: int) -> list[Span]:
        """The spans of a passage that was prepared, in reading order, as those of the passage of this number."""
        ...


class Bodies:
    """Spans of passages in one setting.

    Args:
        compressor: Makes concepts and chooses anchors.
        setting: Mode and rate; not mode none, which has no passages.
        segmented: Shared by the settings of a run.

    Raises:
        ConfigurationError, RateOutOfReachError: The rate cannot be kept, or there is no such encoding.
    """

    def __init__(self, compressor: Compressor, setting: Setting, segmented: Segmented) -> None:
        self._encoding = encoding_named(setting.encoding) if setting.encoding else None
        self._compressor, self._mode, self._segmented = compressor, setting.mode, segmented
        self._policy = FixedRate(setting.rate, compressor.config.segment_length) if setting.rate else None
        self._made: dict[str, torch.Tensor | tuple[int, ...]] = {}

    def size(self, text: str) -> int:
        """Prompt positions of a passage."""
        return sum(self._concepts(text)) if self._policy else self._segmented.n_tokens(text)

    def prepare(self, texts: Iterable[str]) -> None:
        """Make what these passages need, in one call of the compressor."""
        wanted = dict.fromkeys(texts)
        missing = [text for text in wanted if text not in self._made]
        spare = len(self._made) + len(missing) - _KEPT
        for text in [text for text in self._made if text not in wanted][: max(0, spare)]:
            del self._made[text]
        if self._mode == "concepts":
            self._compress(missing)
            return
        for text in missing:
            self._made[text] = (
                self._pruned(text) if self._policy else tuple(t for s in self._segmented(text) for t in s)
            )

    def spans(self, text: str, passage: int) -> list[Span]:
        """The spans of a passage that was prepared."""
        made = self._made[text]
        return [ConceptSpan(made, passage) if isinstance(made, torch.Tensor) else TextSpan(made, passage)]

    def _concepts(self, text: str) -> list[int]:
        return self._policy.n_concepts(self._segmented(text)) if self._policy else []

    def _compress(self, texts: list[str]) -> None:
        segments = [self._segmented(text) for text in texts]
        counts = [self._concepts(text) for text in texts]
        # (K, hidden_size) for each segment, those of all texts in a row
        flat = self._compressor.compress([s for group in segments for s in group], [k for ks in counts for k in ks])
        at = 0
        for text, ks in zip(texts, counts, strict=True):
            made = torch.cat(flat[at : at + len(ks)])  # (n_concepts, hidden_size) of one text
            self._made[text] = self._encoding.rounded(made) if self._encoding else made
            at += len(ks)

    def _pruned(self, text: str) -> tuple[int, ...]:
        pairs = zip(self._segmented(text), self._concepts(text), strict=True)
        return tuple(segment[i] for segment, k in pairs for i in self._compressor.anchors(segment, k))

"""Passages as the spans each mode puts in their place: text, concepts, the anchors alone, or nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import torch

from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.rates import FixedRate
from compllm_rag.compression.selection import best_positions, random_scores
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import Narrowing
from compllm_rag.errors import ConfigurationError
from compllm_rag.library import unpacked
from compllm_rag.prompt import ConceptSpan, Span, TextSpan
from compllm_rag.store.encodings import deep_encoding, encoding_named

EvalMode = Literal["text", "concepts", "random", "pruned", "budgeted", "none"]
MODES: tuple[EvalMode, ...] = get_args(EvalMode)
COMPRESSED = ("concepts", "random", "pruned", "budgeted")

# Passages whose concepts are kept for the questions that follow; the runner asks those of one passage in a row.
_KEPT = 256


@dataclass(frozen=True)
class Setting:
    """What is measured: how passages are read, and at which rate.

    Args:
        mode: `text`; `concepts`; `random`, deep concepts at places taken by chance; `pruned`, the kept tokens as text;
            `budgeted`, what a read policy chooses for the question (`read_policies`); or `none`, the same prompt
            without passages.
        rate: Source tokens per concept, None for text and none. Of `budgeted`, the rate at which concepts of all
            passages would take its budget.
        encoding: Give concepts the precision of a storage with this encoding; None reads them as they are made.
        narrowing: Of deep concepts: from which layer on but a share of them is read.
    """

    mode: EvalMode
    rate: float | None = None
    encoding: str | None = None
    narrowing: Narrowing | None = None

    @classmethod
    def of(
        cls, mode: str, rate: float | None = None, encoding: str | None = None, narrowing: Narrowing | None = None
    ) -> Setting:
        """The setting of a mode's name.

        Raises:
            ConfigurationError: No such mode, a rate is missing, or nothing is read that could be narrowed.
        """
        found = next((known for known in MODES if known == mode), None)
        if found is None:
            raise ConfigurationError(
                "unknown mode", got=mode, expected=", ".join(MODES), next_step="pass one of these modes"
            )
        if narrowing is not None and found not in ("concepts", "random", "budgeted"):
            raise ConfigurationError(
                f"mode {found} reads nothing that can be narrowed",
                got=f"narrowing {narrowing}",
                expected="mode concepts, random or budgeted",
                next_step="leave narrowing out",
            )
        if found not in COMPRESSED:
            return cls(found)
        if rate is None:
            raise ConfigurationError(
                f"mode {found} needs a rate", got=None, expected="source tokens per concept", next_step="use 2 or 4"
            )
        return cls(found, float(rate), encoding if found == "concepts" else None, narrowing)

    def __str__(self) -> str:
        text = self.mode if self.rate is None else f"{self.mode} at rate {self.rate:g}"
        text = text if self.encoding is None else f"{text} in {self.encoding}"
        return text if self.narrowing is None else f"{text}, narrowed {self.narrowing}"


class Segmented:
    """Segments of each text that was asked for, cut once for all modes."""

    def __init__(self, compressor: ConceptCompressor) -> None:
        self._units = compressor.spec.units
        self._known: dict[str, list[list[int]]] = {}

    def __call__(self, text: str) -> list[list[int]]:
        """Token ids of each segment; joined they are the text's."""
        if text not in self._known:
            self._known[text] = self._units(text)
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

    def __init__(self, compressor: ConceptCompressor, setting: Setting, segmented: Segmented) -> None:
        if setting.mode == "random" and not compressor.config.deep:
            raise ConfigurationError(
                "only deep concepts can stand at any places",
                got="concepts at the input embeddings",
                expected="a compressor of deep concepts",
                next_step="leave mode random out",
            )
        name = setting.encoding
        if name and compressor.config.deep:
            name = deep_encoding(name)
        self._encoding = encoding_named(name) if name else None
        self._compressor, self._mode, self._segmented = compressor, setting.mode, segmented
        self._policy = FixedRate(setting.rate, compressor.config.longest_unit) if setting.rate else None
        self._made: dict[str, Span] = {}

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
        if self._mode in ("concepts", "random"):
            self._compress(missing)
            return
        for text in missing:
            units = self._segmented(text)
            if self._policy:
                kept = self._compressor.kept_places(units, self._concepts(text))
                units = [[unit[i] for i in places] for unit, places in zip(units, kept, strict=True)]
            self._made[text] = TextSpan(tuple(token for unit in units for token in unit))

    def spans(self, text: str, passage: int) -> list[Span]:
        """The spans of a passage that was prepared."""
        return [replace(self._made[text], passage=passage)]

    def _concepts(self, text: str) -> list[int]:
        return self._policy.n_concepts(self._segmented(text)) if self._policy else []

    def _compress(self, texts: list[str]) -> None:
        units = [self._segmented(text) for text in texts]
        counts = [self._concepts(text) for text in texts]
        wanted, all_ks = [u for group in units for u in group], [k for ks in counts for k in ks]
        # (K, width) for each unit, those of all texts in a row
        if self._mode == "random" and isinstance(self._compressor, DeepCompressor):
            chance = [best_positions(random_scores(u), k) for u, k in zip(wanted, all_ks, strict=True)]
            flat = self._compressor.compress(wanted, all_ks, places=chance)
        else:
            flat = self._compressor.compress(wanted, all_ks)
        at = 0
        for text, group, ks in zip(texts, units, counts, strict=True):
            rows = torch.cat(flat[at : at + len(ks)])  # (n_concepts, width) of one text
            rows = self._encoding.rounded(rows) if self._encoding else rows
            if self._compressor.config.deep:
                states, places = unpacked(rows, group, ks)
                self._made[text] = ConceptSpan(states, 0, places, sum(map(len, group)))
            else:
                self._made[text] = ConceptSpan(rows, 0)
            at += len(ks)

"""The rows of `bench alike` by the words they are asked for by."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.rivals.trained.about import KINDS, Kind
from benchmarks.rivals.trained.compllm import CompLLM, CompLLMDeep, MeanInput
from benchmarks.rivals.trained.icae import ICAE
from benchmarks.rivals.trained.kv_distill import KVDistill
from benchmarks.rivals.trained.lingua2 import Lingua2
from benchmarks.rivals.trained.ours import Deep, MeanDeep, SegmentDeep, Untrained
from benchmarks.rivals.trained.projected import EncoderDeep, EncoderInput, XRag
from benchmarks.rivals.trained.row import Row, Setup
from compllm_rag.errors import ConfigurationError

_MADE_BY: dict[str, type[Row]] = {
    "untrained": Untrained,
    "deep": Deep,
    "segment_deep": SegmentDeep,
    "compllm": CompLLM,
    "compllm_deep": CompLLMDeep,
    "xrag": XRag,
    "kv_distill": KVDistill,
    "lingua2": Lingua2,
    "icae": ICAE,
    "mean_input": MeanInput,
    "mean_deep": MeanDeep,
    "encoder_input": EncoderInput,
    "encoder_deep": EncoderDeep,
}
# The two rates of ours, every rival at rate 2, and the encoder where it has about one word piece for each concept.
DEFAULT = [
    *("untrained@1", "untrained@2", "deep@1", "deep@2", "segment_deep@2", "compllm@2", "compllm_deep@2", "xrag"),
    *("kv_distill@2", "lingua2@2", "icae@2", "mean_input@2", "mean_deep@2"),
    *("encoder_input@2", "encoder_deep@2", "encoder_deep@1"),
]


@dataclass(frozen=True)
class Named:
    """A row as it was asked for.

    Attributes:
        name: Of its kind.
        rate: Source tokens per position.
    """

    name: str
    rate: float

    @property
    def word(self) -> str:
        """How it is asked for, and where its weights are kept: `deep@2`, however it was typed."""
        return f"{self.name}@{self.rate:g}" if self.kind.rated else self.name

    @property
    def kind(self) -> Kind:
        """What it is."""
        return KINDS[self.name]

    @property
    def title(self) -> str:
        """In tables and plots."""
        return f"{self.kind.title}, rate {self.rate:g}" if self.kind.rated else self.kind.title

    def make(self, setup: Setup) -> Row:
        """The row, untrained."""
        return _MADE_BY[self.name](setup, self.rate)


def named(word: str) -> Named:
    """The row of a word, `NAME` (at rate 2) or `NAME@RATE`.

    Raises:
        ConfigurationError: There is no such row, or the rate is none.
    """
    name, at, rate = word.partition("@")
    try:
        asked = float(rate) if at else 2.0
    except ValueError:
        asked = 0.0
    if name not in KINDS or not 1 <= asked <= 6 or (at and not KINDS[name].rated):
        raise ConfigurationError(
            "unknown row",
            got=word,
            expected=f"{', '.join(KINDS)}, each (but for xrag) with @RATE from 1 to 6 behind it or without",
            next_step="see `compllm-rag bench alike --help`",
        )
    return Named(name, asked)

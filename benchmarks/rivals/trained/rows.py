"""All rows of `bench alike` by name, with what each is after and how it differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.rivals.trained.compllm import CompLLM, CompLLMDeep, MeanInput
from benchmarks.rivals.trained.icae import ICAE
from benchmarks.rivals.trained.kv_distill import KVDistill
from benchmarks.rivals.trained.ours import Deep, MeanDeep, SegmentDeep, Untrained
from benchmarks.rivals.trained.projected import EncoderDeep, EncoderInput, XRag
from benchmarks.rivals.trained.row import Row, Setup
from compllm_rag.errors import ConfigurationError


@dataclass(frozen=True)
class Kind:
    """One kind of row.

    Attributes:
        title: In tables and plots.
        make: Makes it from a setup and a rate.
        after: Paper and section it is after.
        what: What stands for a passage, and what is learned.
        differs: From the paper.
        rated: Whether it has a rate.
    """

    title: str
    make: Callable[[Setup, float], Row]
    after: str
    what: str
    differs: str
    rated: bool = True


_CHUNK = "a chunk of at most 240 tokens"
KINDS: dict[str, Kind] = {
    "untrained": Kind(
        "deep concepts, untrained",
        Untrained,
        "ours",
        "states of kept tokens in front of layer L; nothing is learned",
        "the start of `deep`",
    ),
    "deep": Kind(
        "deep concepts (ours)",
        Deep,
        "ours",
        f"states of kept tokens of {_CHUNK} in front of layer L; LoRA in both halves of the LLM",
        "what `train deep` trains, at one rate and from nothing",
    ),
    "segment_deep": Kind(
        "deep concepts of 20-token segments",
        SegmentDeep,
        "ours",
        "the same of segments of at most 20 tokens, each read on its own",
        "of `deep` in that alone",
    ),
    "compllm": Kind(
        "CompLLM",
        CompLLM,
        "arXiv 2509.19228, section 3",
        "outputs at end-of-sequence tokens behind a segment of at most 20 tokens, through a linear layer, as input "
        "embeddings; LoRA on the whole LLM and the layer, by the distance of hidden states",
        "gold answers, not the LLM's own; the linear layer is trained over standardised states",
    ),
    "compllm_deep": Kind(
        "CompLLM at layer L",
        CompLLMDeep,
        "arXiv 2509.19228, section 3",
        "the same with the layers below L alone, entering in front of layer L; the layers above stay frozen",
        "of `compllm` in that alone",
    ),
    "xrag": Kind(
        "xRAG",
        XRag,
        "arXiv 2405.13792, sections 3.2 and 3.3",
        f"one input embedding for {_CHUNK}: its retrieval vector through two linear layers, which are learned",
        "the embedder is MiniLM; no paraphrase pretraining",
        rated=False,
    ),
    "kv_distill": Kind(
        "KV-Distill",
        KVDistill,
        "arXiv 2503.10337",
        "keys and values of kept tokens at all layers; LoRA that changes kept tokens alone, by KL both ways",
        "tokens are chosen by our scores, not by a trained scorer; each passage is compressed on its own",
    ),
    "icae": Kind(
        "ICAE-like slots",
        ICAE,
        "arXiv 2307.06945, section 2.1",
        f"outputs at learned slots behind {_CHUNK}, as input embeddings; LoRA on the whole LLM, slots",
        "as many slots as the rate says, not 128; no autoencoding; the output's size is learned",
    ),
    "mean_input": Kind(
        "mean of embeddings",
        MeanInput,
        "arXiv 2510.20797, section 3",
        "means of neighbouring tokens' embeddings with a learned correction, of segments, as input embeddings",
        "the LLM that reads them stays frozen",
    ),
    "mean_deep": Kind(
        "mean of states at layer L",
        MeanDeep,
        "arXiv 2510.20797, section 3",
        f"means of neighbouring states of {_CHUNK} in front of layer L; LoRA in both halves",
        "encoder and decoder are the two halves of one LLM",
    ),
    "encoder_input": Kind(
        "encoder only, input embeddings",
        EncoderInput,
        "the seed article's future work",
        f"states of the embedder's word pieces of {_CHUNK}, averaged to K, through two linear layers, which are "
        "learned, as input embeddings",
        "–",
    ),
    "encoder_deep": Kind(
        "encoder only, at layer L",
        EncoderDeep,
        "the seed article's future work",
        "the same in front of layer L, with LoRA on the layers above",
        "–",
    ),
}
# The two rates of ours, every rival at rate 2, and the encoder where it has about one word piece for each concept.
DEFAULT = [
    *("untrained@1", "untrained@2", "deep@1", "deep@2", "segment_deep@2", "compllm@2", "compllm_deep@2", "xrag"),
    *("kv_distill@2", "icae@2", "mean_input@2", "mean_deep@2", "encoder_input@2", "encoder_deep@2", "encoder_deep@1"),
]


@dataclass(frozen=True)
class Named:
    """A row as it was asked for.

    Attributes:
        word: As it was typed, such as `deep@2`.
        kind: What it is.
        rate: Source tokens per position.
    """

    word: str
    kind: Kind
    rate: float

    @property
    def title(self) -> str:
        """In tables and plots."""
        return f"{self.kind.title}, rate {self.rate:g}" if self.kind.rated else self.kind.title


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
    return Named(word, KINDS[name], asked)

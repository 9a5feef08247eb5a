"""What a training run starts from: models, data, and what of them is trained.

The flags of `compllm-rag train` are made from these models; no torch is loaded, so that `--help` answers at once.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from compllm_rag.compression.rates import concepts_at, max_rate
from compllm_rag.config import DEFAULT_LLM, LONGEST_UNIT, CompressorConfig, Frozen

if TYPE_CHECKING:
    from compllm_rag.training.examples import Example

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class MaterialConfig(Frozen):
    """How examples are mixed.

    Their lengths are drawn evenly on a logarithmic scale from 20 tokens; with `max_passages` the number of distractors
    is drawn instead.
    """

    max_context: int = Field(
        default=320,
        ge=20,
        le=8000,
        description="most source tokens of one example; passages that hold the answer are read whole, however long",
    )
    qa: Share = Field(default=0.6, description="share of examples with questions; the others are windows of plain text")
    distractors: Share = Field(default=0.35, description="share of single-passage questions that get further passages")
    near: Share = Field(
        default=0.0,
        description="share of those distractors that come from the same document (title), as retrieval would find them",
    )
    max_passages: int | None = Field(
        default=None,
        ge=1,
        description="most passages of one question, a random number of distractors among them; None: as fit its length",
    )
    max_branches: int = Field(default=6, ge=1, description="most questions of one example")
    copy_share: Share = Field(
        default=0.3, description="share of single passages that are to be copied besides their questions"
    )
    copy_length: int = Field(default=64, ge=1, description="most tokens of a copied passage")
    continue_length: int = Field(default=48, ge=1, description="most tokens of a continuation")


class DataOptions(Frozen):
    """Where training data comes from; at least one must be given."""

    data_dir: Path | None = Field(
        default=None, description="holds train/*.jsonl(.gz) with questions and text/*.jsonl(.gz) with texts"
    )
    questions: tuple[Path, ...] = Field(default=(), description="a further file of questions; may be repeated")
    texts: tuple[Path, ...] = Field(default=(), description="a further file of texts; may be repeated")
    hub: tuple[str, ...] = Field(default=(), description="a hub dataset, org/name[:config][@revision]; may be repeated")
    material: MaterialConfig = MaterialConfig()


# Prompts as retrieval makes them: one to six chunks, and not all of them of use.
_RETRIEVED = MaterialConfig(max_context=700, max_passages=6, distractors=0.5)
READER_DATA = DataOptions(material=_RETRIEVED)
DEEP_DATA = DataOptions(material=_RETRIEVED.model_copy(update={"qa": 1.0, "copy_share": 0.0}))


class ObjectiveConfig(Frozen):
    """Weights of the parts; 0 switches a part off."""

    hidden: Weight = Field(default=1.0, description="weight of the distance of hidden states")
    kl: Weight = Field(default=1.0, description="weight of the KL divergence of the output")
    ce: Weight = Field(default=0.1, description="weight of the cross-entropy on the answers")
    prompt: Weight = Field(default=0.2, description="weight of the tokens of the questions, those of answers being 1")
    copy_branches: Weight = Field(default=1.0, description="weight of copied passages, questions being 1")
    continue_branches: Weight = Field(default=1.0, description="weight of continuations, questions being 1")

    @property
    def kinds(self) -> dict[str, float]:
        """Weight of a branch by its kind; 1 for those not named."""
        return {"copy": self.copy_branches, "continue": self.continue_branches}


class RatesConfig(Frozen):
    """Which compression rates a passage is compressed at while training."""

    rates: tuple[float, ...] = Field(
        default=(1.5, 2.0, 2.0, 2.0, 2.0, 3.0, 4.0, 4.0, 6.0),
        description="a rate to train at; may be repeated. Each passage draws one, so one compressor serves them all",
    )
    mixed: Share = Field(default=0.2, description="share of passages in which every segment draws its own rate")

    def draw(self, example: Example, rng: random.Random, segment_length: int) -> list[list[int]]:
        """K of every segment of every passage."""
        rates = [rate for rate in self.rates if rate <= max_rate(segment_length)] or [1.5]
        out = []
        for body in example.bodies:
            one, each = rng.choice(rates), rng.random() < self.mixed
            out.append([concepts_at(rng.choice(rates) if each else one, len(s)) for s in body.segments])
        return out


class JobOptions(Frozen):
    """What every run starts from."""

    llm: str = Field(default=DEFAULT_LLM, description="target LLM: alias, folder or org/name@revision")
    validation: int = Field(default=24, ge=1, description="groups of held-out questions to look at")
    dtype: str | None = Field(default=None, description="of the frozen LLM: float32, bfloat16 or float16")
    device: str | None = Field(default=None, description="a torch device")


class ReaderOptions(JobOptions):
    """What a reader run starts from."""

    init: Path | None = Field(default=None, description="an adapter to go on from; its rank is kept")
    rank: int = Field(default=16, ge=1, description="of LoRA")
    keep_share: float = Field(
        default=0.1,
        ge=0,
        le=0.9,
        description="share of examples that are other prompts with the LLM's own answers, which it keeps following",
    )


class ConceptOptions(JobOptions):
    """What a run starts from that trains concepts of either kind."""

    reader: str | Path | None = Field(
        default="auto", description="folder of a reader adapter; auto: the shipped one; None: the LLM as it is"
    )
    other_reader: bool = Field(
        default=False, description="go on from a compressor that was made with another reader of the same LLM"
    )
    answer_weight: Weight = Field(
        default=2.0,
        description="how much tokens that answers are made of count where the tokens of concepts are chosen; what a "
        "run goes on from keeps its own",
    )


class DeepOptions(ConceptOptions):
    """What a run of deep concepts starts from.

    `init` keeps its own table of information, whatever `answer_weight` says, and the settings that have no field here.
    """

    init: Path | None = Field(
        default=None,
        description="a compressor of deep concepts to go on from, of the same entry layer and LoRA; with "
        "--frozen-upper its reading LoRA is left out",
    )
    entry_layer: int | None = Field(
        default=None, ge=1, description="the layer at which concepts enter; left out: half the LLM's layers"
    )
    unit_length: int | None = Field(
        default=None,
        ge=2,
        le=LONGEST_UNIT,
        description="most tokens that concepts are made of at once; left out: what a run goes on from has, 240 for a "
        "new one",
    )
    lora_rank: int = Field(default=32, ge=1, description="of LoRA, in each half")
    prompt_rank: int | None = Field(
        default=None,
        ge=0,
        description="of a LoRA with which the prompt's own tokens run below the entry layer; left out: what a run goes "
        "on from has, and none for a new one. Where that has none, it is added",
    )
    marked: bool | None = Field(
        default=None,
        description="learn a vector that marks the tokens that are kept, where others are dropped; left out: what a "
        "run goes on from has, and none for a new one. Where that has none, it is added",
    )
    lora_modules: tuple[str, ...] = Field(
        default=LINEARS, description="a linear layer that LoRA changes, by the end of its name; may be repeated"
    )
    frozen_upper: bool = Field(
        default=False, description="train the half that writes concepts alone: the LLM reads them as it is"
    )
    rates: tuple[float, ...] = Field(
        default=(1.0, 1.5, 2.0, 3.0, 4.0),
        description="a rate to train at; may be repeated. Each example draws one, so one compressor serves them all",
    )
    kl: Weight = Field(default=1.0, description="weight of the KL divergence from the LLM that reads text")
    narrow: tuple[str, ...] = Field(
        default=(),
        description="a way of narrowing prompts to train for, LAYER:SHARE (see `query --narrow`); may be repeated",
    )
    narrowed: Share = Field(default=0.5, description="share of examples that are narrowed, where a way is given")


class CompressorOptions(ConceptOptions):
    """What a compressor run starts from.

    `config` is that of a new compressor; its `scale` is set from the LLM's embeddings. `answer_weight` is the factor of
    what `answer_odds` counts in the training questions; `init` keeps its own. With `reader_rank` above 0 the target
    learns to read concepts along with the compressor (`best/reader`); at 0 it stays as it is, as in the paper.
    """

    reader_rank: int = Field(
        default=0,
        ge=0,
        description="LoRA rank of a reader trained along, for small LLMs; 0: the LLM stays as it is",
    )
    text_share: Share = Field(default=0.15, description="share of batches that a reader trained along reads as text")
    init: Path | None = Field(default=None, description="a compressor to go on from; its settings are kept")
    config: CompressorConfig = CompressorConfig(
        layers=12, anchor_words=True, lora_rank=32, lora_alpha=64, lora_modules=LINEARS
    )
    objective: ObjectiveConfig = ObjectiveConfig()
    rates: RatesConfig = RatesConfig()
    labels: Literal["gold", "own"] = Field(
        default="gold", description="gold answers, or own: the LLM's answers to the questions"
    )
    label_groups: int = Field(default=2000, ge=1, description="most groups of questions that the LLM answers itself")

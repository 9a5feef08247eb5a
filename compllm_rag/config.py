"""Settings as frozen pydantic models; those that are written to disk carry a `format_version`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from compllm_rag.errors import ConfigurationError

FORMAT_VERSION = 1
SEGMENTER_VERSION: Literal[2] = 2
SEGMENTER_VERSIONS = (1, 2)  # of what is made anew; what is still read

DEFAULT_LLM = "smollm2-135m-instruct"
DEFAULT_EMBEDDER = "all-minilm-l6-v2"
# Source tokens per concept where nobody asks for another rate: deep concepts at 1 already halve what a passage costs.
DEFAULT_RATES = {"deep": 1.0, "input": 2.0}
LONGEST_UNIT = 2048  # records keep places in fp16, which counts no further

Mode = Literal["concepts", "text"]
Codec = Literal["deep", "input"]
MissingPolicy = Literal["recompress", "text", "error"]
# `auto`: whichever of recompress and text is sooner, node by node.
MissingChoice = Literal["recompress", "text", "error", "auto"]
OverflowPolicy = Literal["drop", "error"]
EncodingName = Literal["fp16", "int8", "int4"]
# By what the rate of a text is chosen; `auto` takes `learned` where a compressor has predicted losses, else
# `information`.
RatePolicyName = Literal["auto", "information", "learned", "budget"]
GuardName = Literal["off", "exact", "loss"]
Pin = Literal["digits", "dates", "names"]


Settings = TypeVar("Settings", bound="Frozen")


class Frozen(BaseModel):
    """Base of all settings: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def checked(model: type[Settings], **fields: Any) -> Settings:
    """Make settings from what a user typed.

    Raises:
        ConfigurationError: A value is out of bounds; it names the first.
    """
    try:
        return model(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigurationError(
            f"setting {'.'.join(map(str, first['loc']))} makes no sense",
            got=first.get("input"),
            expected=str(first["msg"]),
            next_step="see --help",
        ) from error


class CompressorConfig(Frozen):
    """All that makes one compressor differ from another, besides its weights.

    Every field except `format_version` is part of the fingerprint (docs/design.md section 5).
    """

    format_version: Literal[1] = 1
    segment_length: int = Field(default=20, ge=2, le=512, description="S, the most tokens of one segment")
    segmenter_version: Literal[1, 2] = Field(
        default=SEGMENTER_VERSION, description="rules by which texts are cut; 1: those of earlier releases"
    )
    layers: int | None = Field(default=None, ge=1, description="first L layers of the LLM; None: all of them")
    queries: Literal["anchor", "eos", "mean"] = Field(
        default="anchor", description="what a concept starts from: a token, nothing, or the mean of neighbouring tokens"
    )
    anchor_positions: Literal["continue", "source"] = Field(
        default="continue", description="rotary positions of the anchors: after the segment, or their own"
    )
    anchor_words: bool = Field(
        default=False, description="tokens of one word count as informative as the most informative of them"
    )
    sink: bool = Field(default=False, description="put the beginning-of-sequence token in front of each segment")
    scale: float = Field(
        default=1.0, gt=0.0, description="factor of the head's output, the RMS of embeddings if trained"
    )
    lora_rank: int = Field(default=0, ge=0, description="rank of the LoRA that writes concepts; 0: no LoRA")
    lora_alpha: int = Field(default=0, ge=0)
    lora_modules: tuple[str, ...] = Field(
        default=(), description="linear layers that LoRA changes, by the end of their names"
    )
    entry_layer: int = Field(
        default=0, ge=0, description="L, the layer at which concepts enter; 0: the input embeddings (CompLLM)"
    )
    unit_length: int = Field(
        default=240, ge=2, le=LONGEST_UNIT, description="most tokens of what deep concepts are made of at once, a chunk"
    )
    opening: tuple[int, ...] = Field(
        default=(), description="token ids in front of every unit: the prompt's constant opening"
    )
    selector: Literal["information+surprisal", "information", "learned", "random"] = Field(
        default="information+surprisal", description="by what deep concepts choose the tokens they keep"
    )
    pins: tuple[Pin, ...] = Field(
        default=(), description="words whose tokens deep concepts keep before others, as far as half of K goes"
    )
    marked: bool = Field(
        default=False, description="where tokens are dropped, a learned vector is added to the embeddings of those kept"
    )
    read_rank: int = Field(default=0, ge=0, description="rank of the LoRA that reads deep concepts; 0: no LoRA")
    read_alpha: int = Field(default=0, ge=0)
    read_modules: tuple[str, ...] = ()
    prompt_rank: int = Field(
        default=0,
        ge=0,
        description="rank of the LoRA with which a prompt's own tokens run below the entry layer; 0: no LoRA",
    )
    prompt_alpha: int = Field(default=0, ge=0)
    prompt_modules: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _unit_of_whole_segments(self) -> Self:
        if self.unit_length < self.segment_length:
            raise ValueError("unit_length must not be below segment_length: a unit is a run of whole segments")
        return self

    @model_validator(mode="after")
    def _pins_of_deep_concepts(self) -> Self:
        if self.pins and not self.entry_layer:
            raise ValueError("pins are of deep concepts: concepts at the input embeddings choose anchors")
        if tuple(sorted(set(self.pins))) != self.pins:
            raise ValueError("pins must be in alphabetical order, each once: their order changes nothing")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A setting that came later is not named while it is off: fingerprints and files of before stay as they are."""
        made: dict[str, Any] = handler(self)
        for name in ("pins", "marked"):
            if not made.get(name):
                made.pop(name, None)
        if not self.prompt_rank:
            for name in ("prompt_rank", "prompt_alpha", "prompt_modules"):
                made.pop(name, None)
        return made

    @property
    def deep(self) -> bool:
        """Whether concepts enter above the input embeddings."""
        return self.entry_layer > 0

    @property
    def trained(self) -> bool:
        """Whether there is anything learned in it: a LoRA that writes or reads, or a head (its scale is then set)."""
        return self.lora_rank > 0 or self.read_rank > 0 or self.prompt_rank > 0 or self.scale != 1.0

    @property
    def longest_unit(self) -> int:
        """Most tokens of what is compressed at once: of a segment, or of a unit of deep concepts."""
        return self.unit_length if self.deep else self.segment_length


class RateOptions(Frozen):
    """Of rate policies that look at the text (docs/rates.md)."""

    bands: tuple[float, float, float, float] = Field(
        default=(1.0, 1.5, 3.0, 4.0), description="of policy information: rates at the ends of its bands, dense to thin"
    )
    window: int = Field(default=40, ge=2, description="of policy information: tokens that density is measured over")
    measure: Literal["unigram", "surprisal"] = Field(
        default="unigram", description="information by how rare tokens are, or by the LLM (one more pass of it)"
    )
    most_loss: float = Field(
        default=0.1, ge=0.0, description="of policy learned: most predicted loss, in nats per token of an answer"
    )

    @model_validator(mode="after")
    def _bands_rise(self) -> Self:
        if self.bands[0] < 1 or list(self.bands) != sorted(self.bands):
            raise ValueError("bands must be rates of at least 1 that rise from dense to thin text")
        return self


class IngestConfig(Frozen):
    """How documents become chunks and concepts."""

    rate: Annotated[float, Field(ge=1.0)] | RatePolicyName = Field(
        default=2.0, description="source tokens per concept, or the policy that chooses them"
    )
    also_rates: tuple[Annotated[float, Field(ge=1.0)], ...] = Field(
        default=(), description="further rates at which every chunk is kept"
    )
    rate_options: RateOptions = Field(default_factory=RateOptions, description="of the policy")
    budget_positions: int | None = Field(default=None, ge=1, description="concepts that the storage may hold at most")
    budget_bytes: int | None = Field(default=None, ge=1, description="bytes that its concepts may take at most")
    guard: GuardName = Field(
        default="off", description="leave chunks as text: by signs that must be given back exactly, or predicted loss"
    )
    guard_limit: float | None = Field(default=None, ge=0.0, description="of the guard; None: its own")
    chunk_size: int = Field(default=200, ge=20, description="target tokens of a chunk, about")
    namespace: str = Field(default="default", min_length=1, max_length=200)
    encoding: EncodingName = Field(default="fp16", description="how the store writes concepts")

    @model_validator(mode="after")
    def _budget_of_one_kind(self) -> Self:
        if self.budget_positions is not None and self.budget_bytes is not None:
            raise ValueError("a budget is of positions or of bytes, not of both")
        if (self.rate == "budget") != (self.budget_positions is not None or self.budget_bytes is not None):
            raise ValueError("a budget and the policy `budget` need each other")
        return self


class Narrowing(Frozen):
    """From a layer on, only those of a prompt's deep concepts are read that the question attends to most.

    It is chosen when a question is asked; nothing that is stored depends on it.
    """

    layer: int = Field(ge=1, description="T, the first layer that does without the others")
    share: float = Field(default=0.1, ge=0.0, le=1.0, description="of a prompt's concepts, read from T on; 0: none")
    by: Literal["attention", "chance"] = Field(
        default="attention", description="which of them: those that the question attends to, or any, to compare with"
    )

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `LAYER`, `LAYER:SHARE` or `LAYER:SHARE:chance`, such as `24:0.1`.

        Raises:
            ConfigurationError: It is none of these, or a value is out of bounds.
        """
        layer, *more = text.split(":")
        try:
            fields: dict[str, Any] = {"layer": int(layer)}
            if more:
                fields["share"] = float(more[0])
            if more[1:]:
                [fields["by"]] = more[1:]
        except ValueError:
            raise ConfigurationError(
                "narrowing is not understood",
                got=text,
                expected="auto, LAYER or LAYER:SHARE",
                next_step="use auto, or a layer and the share of concepts that is read from it on, such as 24:0.1",
            ) from None
        return checked(cls, **fields)

    def __str__(self) -> str:
        return f"{self.layer}:{self.share:g}" + ("" if self.by == "attention" else f":{self.by}")


_LEAST_TEMPERATURE = 1e-6


class GenerationConfig(Frozen):
    """How an answer is decoded: until a stop token, a stop text or `max_new_tokens`; greedily at temperature 0."""

    max_new_tokens: int = Field(default=64, ge=1)
    stop: tuple[str, ...] = Field(default=(), description="texts that end the answer")
    temperature: float = Field(
        default=0.0, ge=0.0, allow_inf_nan=False, description="0: the likeliest token; above: drawn at random"
    )
    top_p: float | None = Field(
        default=None, gt=0.0, le=1.0, description="draw from the likeliest tokens that have this share together"
    )
    top_k: int | None = Field(default=None, ge=1, description="draw from so many of the likeliest tokens")
    repetition_penalty: float = Field(
        default=1.0, gt=0.0, description="above 1: tokens that the answer has already are less likely"
    )
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="of what is drawn; None: another each time")
    json_schema: str | None = Field(default=None, description="JSON schema that the answer must follow")

    @model_validator(mode="after")
    def _chance_is_heeded(self) -> Self:
        if 0 < self.temperature < _LEAST_TEMPERATURE:
            raise ValueError(f"a temperature is 0, or at least {_LEAST_TEMPERATURE:g}: logits are divided by it")
        given = [name for name in ("top_p", "top_k", "seed") if getattr(self, name) is not None]
        if given and not self.temperature and "temperature" not in self.model_fields_set:
            raise ValueError(f"{', '.join(given)} need a temperature, which is 0 where none is given: nothing is drawn")
        return self

"""The protocol of read policies: what they are told, what they decide, and the fixed choice that is the default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from compllm_rag.compression.late_interaction import LateInteraction
from compllm_rag.compression.spec import ConceptSpec
from compllm_rag.config import Mode
from compllm_rag.errors import ConfigurationError
from compllm_rag.reading.budget import Meter, extent_of
from compllm_rag.reading.sentences import Sentence

if TYPE_CHECKING:
    import torch

Used = Literal["text", "concepts", "left out"]


@dataclass(frozen=True)
class Part:
    """A run of a passage's tokens, and what it is read as.

    Attributes:
        start: Its first token within the passage.
        end: The token behind its last.
        used: `text`, `concepts` or `left out`.
        rate: Of concepts: source tokens per concept.
        why: In plain words.
        kept: Of concepts: the share of what text gives that a policy reckoned them to keep; None where it did not.
    """

    start: int
    end: int
    used: Used
    rate: float | None = None
    why: str = ""
    kept: float | None = None


@dataclass(frozen=True)
class Reading:
    """What one passage is read as: parts that follow one another from its first token to its last.

    Attributes:
        parts: In order; none for a passage without tokens.
        why: Of the passage as a whole, in plain words.
    """

    parts: tuple[Part, ...]
    why: str = ""

    @classmethod
    def whole(cls, passage: Candidate, used: Used, rate: float | None = None, why: str = "") -> Reading:
        """A passage that is read in one way from beginning to end."""
        return cls((Part(0, passage.n_tokens, used, rate, why),) if passage.n_tokens else (), why)

    @property
    def left_out(self) -> bool:
        """Whether nothing of the passage is read, not even its title."""
        return all(part.used == "left out" for part in self.parts)


@dataclass(frozen=True)
class Candidate:
    """A retrieved passage, as a policy sees it.

    Attributes:
        id: Of the node.
        text: The passage.
        title: May be empty.
        rank: 0 for the best.
        score: The retriever's; None where it gives none.
        n_tokens: As text.
        around: Prompt positions of its number, title and metadata, which stand there if anything of it is read.
        sentences: Runs of its tokens that concepts can be told apart by; joined they are the passage.
        rates: At which its concepts are kept, that of the fixed choice first (None: a rate policy's).
    """

    id: str
    text: str
    title: str
    rank: int
    score: float | None
    n_tokens: int
    around: int
    sentences: tuple[Sentence, ...]
    rates: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class PassageStates:
    """Deep concepts of a passage, as relevance compares them.

    Attributes:
        states: (n_concepts, hidden_size), the residual stream in front of the entry layer.
        places: The token of the passage that each stands for, (n_concepts,), increasing.
    """

    states: torch.Tensor
    places: torch.Tensor


class States(Protocol):
    """States in front of the entry layer: of the question, and of passages as far as they are stored."""

    def of_question(self, query: str) -> torch.Tensor:
        """The residual stream (n_tokens, hidden_size) in front of the entry layer at the question's tokens.

        Asked for the first time, it takes a forward of the LLM's lower half over the question alone, which a time as
        budget pays for.

        Raises:
            ConfigurationError: Concepts enter at the input embeddings: there is no layer below to run.
        """
        ...

    def of_passage(self, node: Candidate) -> PassageStates | str:
        """What is stored of a passage, at the first of its rates that is; or why nothing is, in plain words."""
        ...


@dataclass(frozen=True)
class ReadSpec:
    """What a policy may choose from, and what that takes.

    Attributes:
        concepts: What is known of the concepts: entry layer L, layers D of the LLM, and `prefill_cost(rate)`.
        mode: What the fixed choice reads: with `text` no concepts may be chosen.
        rate: Source tokens per concept where nobody asks for another; None where a rate policy decides.
        meter: Measures what is chosen against the budget.
        at_hand: Whether concepts of a passage can be read at a rate without a wait (None: at `rate`): they are stored,
            or nobody minds that they are made now.
        n_concepts: How many concepts stand for the tokens from `start` to `end` of a passage at a rate.
        states: What late interaction compares. Nothing is compressed for it.
        shares: The share of what text gives that concepts of a passage are predicted to keep at a rate (None: at
            `rate`), by losses that were fitted to this compressor; or why nothing is predicted, in plain words.
        interaction: Which sentence answers a question, as learned for these concepts; or why nothing was, in plain
            words.
        told: A policy puts in here, as plain values by name, what accounts should tell of its decision.
    """

    concepts: ConceptSpec
    mode: Mode
    rate: float | None
    meter: Meter
    at_hand: Callable[[Candidate, float | None], bool]
    n_concepts: Callable[[Candidate, int, int, float | None], int]
    states: States
    shares: Callable[[Candidate, float | None], float] | str = "nothing predicts losses"
    interaction: LateInteraction | str = "no relevance is learned"
    told: dict[str, Any] = field(default_factory=dict)


class ReadPolicy(Protocol):
    """Decides what each passage is read as."""

    @property
    def name(self) -> str:
        """How it is called in accounts."""
        ...

    def choose(self, query: str, nodes: Sequence[Candidate], spec: ReadSpec) -> list[Reading]:
        """What each passage is read as, within the budget.

        Args:
            query: What is asked.
            nodes: Retrieved passages, best first.
            spec: What can be chosen, and what it takes.

        Returns:
            One reading per passage, in their order.

        Raises:
            ReadBudgetError: Nothing fits the budget.
        """
        ...


@dataclass(frozen=True)
class FixedReadPolicy:
    """Every passage in the same way, as far as the budget goes: what is done where no policy is named.

    A passage that does not fit beside those before it is left out, smaller ones behind it are read.

    Args:
        mode: `concepts` or `text`; None takes what the engine is set to.
        rate: Source tokens per concept; None takes what the engine is set to.
    """

    mode: Mode | None = None
    rate: float | None = None
    name: str = field(default="fixed", init=False)

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in get_args(Mode):
            raise ConfigurationError(
                "unknown mode", got=repr(self.mode), expected=" or ".join(get_args(Mode)), next_step="correct it"
            )

    def choose(self, query: str, nodes: Sequence[Candidate], spec: ReadSpec) -> list[Reading]:
        """See `ReadPolicy.choose`."""
        mode = "text" if spec.mode == "text" else self.mode or spec.mode
        rate = spec.rate if self.rate is None else self.rate
        out: list[Reading] = []
        tokens = concepts = extent = 0
        least: tuple[int, int, int] | None = None
        for node in nodes:
            as_concepts = mode == "concepts" and spec.at_hand(node, rate)
            k = spec.n_concepts(node, 0, node.n_tokens, rate) if as_concepts else 0
            text = node.around + (0 if as_concepts else node.n_tokens)
            if not node.n_tokens:
                out.append(Reading((), "it has no text"))
                continue
            used: Used = "concepts" if as_concepts else "text"
            takes = node.around + extent_of([(used, node.n_tokens, k)], deep=spec.meter.deep)
            least = least or (text, k, takes)
            if not spec.meter.fits(tokens + text, concepts + k, extent + takes):
                what = "budget" if not spec.meter.fits(tokens + text, concepts + k) else "window of the LLM"
                why = f"does not fit the {what} beside the passages before it"
                out.append(Reading.whole(node, "left out", why=why))
                continue
            tokens, concepts, extent = tokens + text, concepts + k, extent + takes
            # Why concepts at the engine's own rate cannot be read, whoever looked them up says.
            other = not as_concepts and mode == "concepts" and rate != spec.rate
            why = f"its concepts are not stored at rate {rate:g}" if other and rate is not None else ""
            out.append(Reading.whole(node, used, rate if as_concepts else None, why))
        if least and all(reading.left_out for reading in out):
            raise spec.meter.too_small(*least)
        return out


def checked_readings(policy: ReadPolicy, nodes: Sequence[Candidate], readings: Any) -> list[Reading]:
    """What a policy gave, if it is what was asked for.

    Raises:
        ConfigurationError: It is not: too few readings, parts that do not cover their passage, or cut a segment.
    """
    found = list(readings)
    trouble = f"{len(found)} readings of {len(nodes)} passages" if len(found) != len(nodes) else ""
    for node, reading in zip(nodes, found, strict=False):
        if trouble:
            break
        trouble = _trouble(node, reading)
    if trouble:
        raise ConfigurationError(
            f"read policy {getattr(policy, 'name', type(policy).__name__)} chose what cannot be read",
            got=trouble,
            expected="a Reading for each passage, whose parts follow one another from its first token to its last",
            next_step="correct its `choose`",
        )
    return found


def _trouble(node: Candidate, reading: Any) -> str:
    if not isinstance(reading, Reading):
        return f"a {type(reading).__name__} for {node.id}"
    ends = [0, *(part.end for part in reading.parts)]
    starts = [*(part.start for part in reading.parts), node.n_tokens]
    if ends != starts or any(b <= a for a, b in pairwise(ends)):
        spans = ", ".join(f"{part.start} to {part.end}" for part in reading.parts)
        return f"parts {spans or 'none'} of the {node.n_tokens} tokens of {node.id}"
    unknown = [part.used for part in reading.parts if part.used not in get_args(Used)]
    return f"{unknown[0]!r} for {node.id}" if unknown else ""

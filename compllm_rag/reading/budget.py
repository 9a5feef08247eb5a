"""How much passages may take: positions, prefill in text tokens, or the time to the first token."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from compllm_rag.compression.spec import ConceptSpec
from compllm_rag.config import Narrowing
from compllm_rag.errors import ConfigurationError, NotCalibratedError, ReadBudgetError
from compllm_rag.generation.costs import CostModel, counted_prefill

# Of a TTFT, what planning, fetching and layout may take beside the prefill.
_BESIDE = 0.05
NAMES = {"positions": "position_budget", "prefill": "prefill_budget", "ttft_s": "ttft_budget_s"}


@dataclass(frozen=True)
class ReadBudget:
    """Limits of one prompt; None is no limit, several hold together.

    Attributes:
        positions: Most prompt positions of all passages, their numbers, titles and metadata included.
        prefill: Most that these passages take at prefill, in text tokens: a token counts 1, a concept (D - L) / D, or
            less where the prompt is narrowed.
        ttft_s: Most seconds to the first token, by the cost model; the whole prompt counts.
        costs: What reading takes on this machine; needed for `ttft_s`.
        narrowing: Of the prompt's deep concepts. A time does not reckon with it.

    Raises:
        ConfigurationError: A limit is none, or a time is asked for of a narrowed prompt.
        NotCalibratedError: A time is asked for without a cost model.
    """

    positions: int | None = None
    prefill: float | None = None
    ttft_s: float | None = None
    costs: CostModel | None = None
    narrowing: Narrowing | None = None

    def __post_init__(self) -> None:
        for field, name in NAMES.items():
            value = getattr(self, field)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigurationError(
                    f"{name} makes no sense", got=repr(value), expected="a number above 0", next_step="correct it"
                )
        if self.prefill is not None and self.prefill < 1:
            raise ConfigurationError(
                "prefill_budget makes no sense",
                got=self.prefill,
                expected="text tokens that passages may be worth, at least 1; it is no share",
                next_step="multiply the share by the tokens of the passages",
            )
        if self.ttft_s is not None and self.narrowing is not None:
            raise ConfigurationError(
                "no budget of time reckons with narrowing",
                got=f"ttft_budget_s and narrowing {self.narrowing}",
                expected="one of them",
                next_step="leave narrowing out, or ask for prefill_budget in place of the time",
            )
        if self.ttft_s is not None and self.costs is None:
            raise NotCalibratedError(
                "ttft_budget_s needs the speed of this machine",
                got="no calibration",
                expected="a cost model",
                next_step="compllm-rag calibrate",
            )

    @property
    def limits(self) -> dict[str, float]:
        """The limits that there are, by the names of `as_query_engine`."""
        return {name: getattr(self, field) for field, name in NAMES.items() if getattr(self, field) is not None}

    def meter(
        self, spec: ConceptSpec, prompt_tokens: int, *, beside_s: float = 0.0, window: int | None = None
    ) -> Meter:
        """Measures prompts against this budget.

        Args:
            spec: Of the concepts.
            prompt_tokens: The prompt's own, without any passage.
            beside_s: Seconds that are spent before anything is read.
            window: Positions of the LLM's window that passages may take; None where somebody else sees to that.
        """
        return Meter(self, spec, prompt_tokens, beside_s, window)


class Meter:
    """What the passages of one prompt take of its budget.

    Args:
        budget: The limits.
        spec: Of the concepts.
        prompt_tokens: The prompt's own, without any passage.
        beside_s: Seconds that are spent before anything is read.
        window: See `ReadBudget.meter`.
    """

    def __init__(
        self,
        budget: ReadBudget,
        spec: ConceptSpec,
        prompt_tokens: int,
        beside_s: float = 0.0,
        window: int | None = None,
    ) -> None:
        self.budget, self._prompt_tokens, self._beside_s, self.window = budget, prompt_tokens, beside_s, window
        self.deep = spec.config.deep
        self._entry_layer, self._depth = spec.config.entry_layer, spec.depth
        self.beside = 0.0  # of the prefill budget, in text tokens

    def spend_beside(self, tokens: int) -> None:
        """Set aside what tokens take that run through the LLM's lower half before the prompt does.

        Args:
            tokens: How many.
        """
        self.beside += tokens * self._entry_layer / self._depth
        if self.budget.costs is not None and self.budget.costs.lower is not None:
            self._beside_s += self.budget.costs.lower(tokens)

    def taken(self, tokens: int, concepts: int) -> dict[str, float]:
        """What passages take, by the names of the limits.

        Args:
            tokens: Read as text, numbers and titles included.
            concepts: Read as such.
        """
        out: dict[str, float] = {
            "position_budget": tokens + concepts,
            "prefill_budget": self.beside
            + counted_prefill(
                tokens, concepts, entry_layer=self._entry_layer, depth=self._depth, narrowing=self.budget.narrowing
            ),
        }
        if self.budget.costs is not None:
            read = self.budget.costs.prefill_s(self._prompt_tokens + tokens, concepts)
            out["ttft_budget_s"] = self._beside_s + read * (1 + _BESIDE)
        return {name: out[name] for name in out if name in self.budget.limits}

    def fits(self, tokens: int, concepts: int, extent: int = 0) -> bool:
        """Whether passages that take so much are within every limit.

        Args:
            tokens: Read as text, numbers and titles included.
            concepts: Read as such.
            extent: Positions of the window: more than tokens and concepts, since deep concepts keep gaps between their
                positions (`extent_of`). Passages that do not fit the window are dropped afterwards, bought or not.
        """
        if self.window is not None and extent > self.window:
            return False
        return all(took <= self.budget.limits[name] + 1e-9 for name, took in self.taken(tokens, concepts).items())

    def share(self, tokens: int, concepts: int) -> float:
        """What passages take of the limit that is nearest, 1 being all of it; 0 where there is no limit.

        What is taken without passages does not count.
        """
        bare = self.taken(0, 0)
        shares = [
            (took - bare[name]) / max(1e-9, self.budget.limits[name] - bare[name])
            for name, took in self.taken(tokens, concepts).items()
        ]
        return max(shares, default=0.0)

    def too_small(self, tokens: int, concepts: int, extent: int = 0) -> ReadBudgetError:
        """The error that says the least that would do.

        Args:
            tokens: Of the least that could be read, as text.
            concepts: And as concepts.
            extent: Positions of the window that it takes.
        """
        limits, least = self.budget.limits, self.taken(tokens, concepts)
        if self.window is not None and extent > self.window and self.fits(tokens, concepts):
            return ReadBudgetError(
                "none of the retrieved passages fits the window of the LLM",
                got=f"{max(0, self.window)} positions beside the question",
                expected=f"at least {extent}: number and title of a passage, and its smallest piece with the gaps that "
                "deep concepts keep between their positions",
                next_step="shorten the question, lower max_new_tokens, ingest in smaller chunks, or keep long metadata "
                "from the LLM (excluded_llm_metadata_keys)",
            )
        short = {name: least[name] for name in limits if least[name] > limits[name]}
        # Rounded up: what is named here must do.
        named = {
            n: f"{math.ceil(v * 1000) / 1000:g} s" if n.endswith("_s") else str(math.ceil(v)) for n, v in short.items()
        }
        return ReadBudgetError(
            "no passage fits the budget",
            got=", ".join(f"{name}={limits[name]:g}" for name in short),
            expected=", ".join(f"{name} of at least {value}" for name, value in named.items())
            + ": the prompt, and the smallest piece of the first passage",
            next_step="raise the budget, or keep long titles and metadata from the LLM (excluded_llm_metadata_keys)",
        )


def extent_of(parts: Iterable[tuple[str, int, int]], *, deep: bool) -> int:
    """Positions of the LLM's window that the parts of one passage take, its number and title aside.

    Deep concepts stand at the positions of their tokens: a run of parts that holds any reaches from its first token to
    its last, what is left out among them included.

    Args:
        parts: From the passage's first token to its last: what each is used as, its tokens, and its concepts read.
        deep: Whether concepts are deep; others stand one behind the other.
    """
    out = run = concepts_in_run = 0
    for used, tokens, concepts in parts:
        if used == "text":
            out, run, concepts_in_run = out + tokens + (run if concepts_in_run else 0), 0, 0
        else:
            run += tokens if deep else concepts
            concepts_in_run += concepts
    return out + (run if concepts_in_run else 0)

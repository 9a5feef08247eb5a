"""The options by which engines, the synthesizer and the command line say what passages are read as."""

from __future__ import annotations

from typing import Any, TypedDict

from compllm_rag.compression.rates import is_number
from compllm_rag.config import MissingChoice, Mode, Narrowing
from compllm_rag.errors import ConfigurationError, UnsupportedModelError
from compllm_rag.generation.base import Generator, narrows
from compllm_rag.generation.calibration import needed_costs, saved_costs
from compllm_rag.generation.costs import CostModel
from compllm_rag.library import ConceptLibrary
from compllm_rag.models.narrowing import check_narrowing
from compllm_rag.reading.budget import NAMES, ReadBudget
from compllm_rag.reading.budgeted import BudgetedReadPolicy, weights_for
from compllm_rag.reading.choice import FixedReadPolicy, ReadPolicy
from compllm_rag.reading.passages import PassageReading
from compllm_rag.reading.signals import Signal

READ_OPTIONS = (
    "rate", "narrowing", "read_policy", "relevance", "relevance_cutoff", "position_budget", "prefill_budget",
    "ttft_budget_s", "costs",
)  # fmt: skip
_AUTO_DEPTH = 0.8  # of the LLM's layers; chosen on held-out rows (docs/quality.md, narrowing)
_POLICIES: dict[str, type[FixedReadPolicy] | type[BudgetedReadPolicy]] = {
    "fixed": FixedReadPolicy,
    "budgeted": BudgetedReadPolicy,
}


class ReadOptions(TypedDict, total=False):
    """See `passage_reading`."""

    rate: float | None
    narrowing: Narrowing | str | None
    read_policy: ReadPolicy | str | None
    relevance: Signal | str | None
    relevance_cutoff: float | None
    position_budget: int | None
    prefill_budget: float | None
    ttft_budget_s: float | None
    costs: CostModel | None


def policy_named(given: object) -> ReadPolicy | None:
    """A read policy by its name, or one as it is; None where there is none.

    Raises:
        ConfigurationError: There is no such policy, or it cannot choose.
    """
    if given is None:
        return None
    if isinstance(given, str) and given in _POLICIES:
        return _POLICIES[given]()
    if isinstance(given, str | type) or not callable(getattr(given, "choose", None)):
        raise ConfigurationError(
            "there is no such read policy",
            got=repr(given),
            expected=f"{', '.join(_POLICIES)}, or an object with `name` and `choose`",
            next_step="pass one of them",
        )
    return given  # type: ignore[return-value]


def policy_of(given: object, relevance: Signal | str | None, cutoff: float | None = None) -> ReadPolicy | None:
    """The read policy that these options name together; None where they name none.

    Args:
        given: See `policy_named`.
        relevance: By what the budgeted policy judges sentences; None leaves it as it is.
        cutoff: Below which share of the likeliest sentence it leaves sentences out; None leaves it as it is.

    Raises:
        ConfigurationError: There is no such policy or relevance, the cutoff is no share, or the policy judges by none.
    """
    if cutoff is not None and not is_number(cutoff):
        raise ConfigurationError("relevance_cutoff is no number", got=repr(cutoff), expected="a share, 0 to 1")
    asked = {"relevance": relevance, "relevance_cutoff": cutoff}
    asked = {name: value for name, value in asked.items() if value is not None}
    if not asked:
        return policy_named(given)
    if given is not None and given != "budgeted":
        raise ConfigurationError(
            f"{' and '.join(asked)} belongs to the budgeted read policy",
            got=f"{', '.join(asked)}, and read_policy {given if isinstance(given, str) else type(given).__name__}",
            expected="read_policy budgeted, or none",
            next_step="leave one out, or give it to `BudgetedReadPolicy` itself",
        )
    return BudgetedReadPolicy(weights=weights_for(relevance, cutoff or 0.0), relevance=relevance or "bm25")


def passage_reading(
    library: ConceptLibrary, *, mode: Mode, missing: MissingChoice, decides_otherwise: bool, options: ReadOptions
) -> PassageReading | None:
    """What decides how passages are read; None where nothing but the fixed choice was asked for.

    Args:
        library: Compressor and store.
        mode: The fixed choice.
        missing: See `PassageReading`.
        decides_otherwise: Whether something else decides for each node (`choose`).
        options: `rate`: source tokens per concept, where it is not that of the library. `read_policy`: `fixed`,
            `budgeted`, or one of your own; None is `budgeted` where there is a budget. `relevance`: by what `budgeted`
            judges sentences; see `BudgetedReadPolicy`. `relevance_cutoff`: a share, 0 to 1, of the likeliest sentence;
            less likely ones are left out though there be room. `position_budget`: most prompt positions of all
            passages, their titles included. `prefill_budget`: most that they take at prefill, in text tokens.
            `narrowing`: see `narrowing_of`; that budget reckons with it. `ttft_budget_s`: most seconds to the first
            token. `costs`: of this machine; None takes what `compllm-rag calibrate` found.

    Raises:
        ConfigurationError: There is no such policy or relevance, a budget makes no sense, two options contradict each
            other, or states are to be compared and there are none.
        NotCalibratedError: A time is asked for, and nothing was measured.
        RateOutOfReachError: See `FixedRate`.
    """
    rate = options.get("rate")
    library.at_rate(rate)  # whatever is wrong with it is said now
    if rate is not None and mode == "text" and not decides_otherwise:
        raise ConfigurationError(
            "text has no compression rate",
            got=f"mode text and rate {rate:g}",
            expected="one of them",
            next_step="leave one out",
        )
    limits: dict[str, Any] = {
        field: options.get(name) for field, name in NAMES.items() if options.get(name) is not None
    }
    policy = policy_of(options.get("read_policy"), options.get("relevance"), options.get("relevance_cutoff"))
    if policy is None and not limits:
        return None
    if decides_otherwise:
        raise ConfigurationError(
            "choose and a read policy both decide what passages are read as",
            got="choose, and a read policy or a budget",
            expected="one of them",
            next_step="leave choose out",
        )
    narrowing = narrowing_of(library, mode=mode, decides_otherwise=decides_otherwise, options=options)
    costs = options.get("costs")
    layer = library.spec.config.entry_layer
    if costs is None:
        costs = needed_costs(library.llm, layer) if "ttft_s" in limits else known_costs(library, missing)
    budget = ReadBudget(**limits, costs=costs, narrowing=narrowing)
    return PassageReading(library, policy or BudgetedReadPolicy(), budget, mode=mode, missing=missing, rate=rate)


def narrowing_of(
    library: ConceptLibrary, *, mode: Mode, decides_otherwise: bool, options: ReadOptions
) -> Narrowing | None:
    """From which layer on the LLM reads but a share of a prompt's deep concepts; None where it reads all.

    Args:
        library: Says which layers there are.
        mode: The fixed choice.
        decides_otherwise: Whether something else decides for each node (`choose`).
        options: `narrowing`: the layer and the share, `LAYER:SHARE`, or `auto`: a tenth from four fifths of the LLM's
            layers on.

    Raises:
        ConfigurationError: There is nothing to narrow, no such layer, or a time as budget, which reckons with all
            concepts.
    """
    given, spec = options.get("narrowing"), library.spec
    if given is None:
        return None
    against = [] if options.get("ttft_budget_s") is None else ["ttft_budget_s"]
    against += ["mode text"] if mode == "text" and not decides_otherwise else []
    against += [] if spec.config.deep else ["concepts at the input embeddings"]
    if against:
        raise ConfigurationError(
            "narrowing is of deep concepts, and no budget of time reckons with it",
            got=f"narrowing {given} and {', '.join(against)}",
            expected="one of them",
            next_step="leave narrowing out, or what stands against it",
        )
    if given == "auto":
        layer = max(spec.config.entry_layer + 1, round(_AUTO_DEPTH * spec.depth))
        made = Narrowing(layer=min(layer, max(1, spec.depth - 1)))
    else:
        made = given if isinstance(given, Narrowing) else Narrowing.parse(str(given))
    check_narrowing(made, spec.config.entry_layer, spec.depth)
    return made


def require_narrowing(generator: Generator, narrowing: Narrowing) -> None:
    """Refuse a generator that would read a narrowed prompt whole, or not at all, before it is asked.

    Raises:
        ConfigurationError: It does not say that it narrows prompts, or its LLM cannot be narrowed there.
    """
    if not narrows(generator):
        raise ConfigurationError(
            "this generator cannot narrow a prompt",
            got=f"narrowing and {type(generator).__name__} ({generator.name})",
            expected="the generator of this process, or one with an attribute `narrows` that is true",
            next_step="leave narrowing out, or run the LLM in this process (no --generator)",
        )
    prepare = getattr(generator, "prepare_narrowing", None)
    try:
        if prepare is not None:
            prepare(narrowing)
    except UnsupportedModelError as error:
        raise ConfigurationError(
            error.what, got=error.got, expected=error.expected, next_step=error.next_step
        ) from error


def known_costs(library: ConceptLibrary, missing: MissingChoice) -> CostModel | None:
    """What was measured on this machine, where it would be looked at."""
    return saved_costs(library.llm, library.spec.config.entry_layer) if missing == "auto" else None


def refuse_several_prompts(response_mode: str) -> None:
    """Refuse a read policy where what it leaves out would be read in the next prompt.

    Raises:
        ConfigurationError: Always.
    """
    raise ConfigurationError(
        "a read policy decides for one prompt",
        got=f"a read policy or a budget, and response_mode {response_mode}",
        expected="simple_summarize",
        next_step="leave response_mode out; what does not fit the budget is left out, and told",
    )

"""What is chosen for one text: how many concepts at each rate it is kept at, or that it stays text."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from compllm_rag.compression.rate_policies.guard import ExactGuard, Guard, LossGuard
from compllm_rag.compression.rate_policies.losses import RATES, InformationLosses, LearnedLosses, Losses
from compllm_rag.compression.rate_policies.measures import Floats, TextMeasures, Units
from compllm_rag.compression.rate_policies.policies import InformationRate, LeastLossRate, PricedRate
from compllm_rag.compression.rates import FixedRate, RatePolicy, concepts_at, max_rate
from compllm_rag.config import IngestConfig, RatePolicyName
from compllm_rag.errors import ConfigurationError

GUARD = "guard"


@dataclass(frozen=True)
class Choice:
    """How one text is kept.

    Attributes:
        rates: By which its concepts are asked for, the default of queries first.
        n_concepts: K of each unit, for each of these; empty where it stays text.
        wished: The rate that the policy wanted for the first, before K was rounded; None where it does not say.
        reason: Why it stays text; None where it does not.
        expected: What the guard measured of it; None without one.
        sizes: Tokens of each unit, where a budget decides.
        lost: What each unit loses at each rate of the policy, likewise.
    """

    rates: tuple[float, ...]
    n_concepts: tuple[tuple[int, ...], ...]
    wished: float | None = None
    reason: str | None = None
    expected: float | None = None
    sizes: tuple[int, ...] = ()
    lost: tuple[tuple[float, ...], ...] = ()

    def fits(self, units: Units) -> bool:
        """Whether it can be a choice for these units: what was kept may be damaged."""
        if self.reason is not None:
            return not self.n_concepts
        return (
            len(self.rates) == len(self.n_concepts) > 0
            and all(math.isfinite(rate) for rate in self.rates)
            and all(
                len(ks) == len(units) and all(1 <= k <= len(unit) for k, unit in zip(ks, units, strict=True))
                for ks in self.n_concepts
            )
        )


class RateChooser:
    """Chooses for each text.

    Args:
        policy: For what is read unless another rate is asked for.
        further: Other rates at which every text is kept as well.
        guard: Tells which texts stay text; None leaves none.
        name: Of all of it, with its settings, for keys of caches.
    """

    def __init__(
        self, policy: RatePolicy, further: Sequence[FixedRate] = (), guard: Guard | None = None, name: str = ""
    ) -> None:
        self.policy, self.further, self.guard = policy, tuple(further), guard
        rates = [each.rate for each in (policy, *further) if isinstance(each, FixedRate)]
        if len(set(rates)) < len(rates):
            raise ConfigurationError(
                "a rate is named twice", got=", ".join(f"{rate:g}" for rate in rates), expected="different rates"
            )
        self.name = name or f"{type(policy).__name__}({getattr(policy, 'rate', '')})"

    @property
    def budgeted(self) -> bool:
        """Whether what is chosen for a text depends on the others."""
        return isinstance(self.policy, PricedRate)

    @property
    def plain(self) -> bool:
        """Whether the length of a text alone decides, so that nothing has to be remembered."""
        return isinstance(self.policy, FixedRate) and self.guard is None

    def choose(self, units: Units) -> Choice:
        """How a text of these units is kept."""
        sizes = [len(unit) for unit in units]
        lost: tuple[tuple[float, ...], ...] = ()
        wanted: Sequence[float] | None = None
        if isinstance(self.policy, PricedRate):
            table = self.policy.table(units) if units else None
            wanted = [] if table is None else self.policy.rates_at(table, sizes)
            lost = () if table is None else tuple(map(tuple, table.tolist()))
        elif not isinstance(self.policy, FixedRate) and hasattr(self.policy, "rates"):
            wanted = self.policy.rates(units)
        ks = (
            [int(k) for k in self.policy.n_concepts(units)]
            if wanted is None
            else [concepts_at(rate, size) for rate, size in zip(wanted, sizes, strict=True)]
        )
        fixed, total = isinstance(self.policy, FixedRate), sum(sizes)
        rate = float(self.policy.rate) if isinstance(self.policy, FixedRate) else total / max(sum(ks), 1)
        wished = rate if fixed else _wished(wanted, sizes)
        expected = self.guard.expected(units, ks) if self.guard is not None and total else None
        if self.guard is not None and expected is not None and expected > self.guard.limit:
            return Choice((), (), wished, GUARD, expected)
        counts = [tuple(ks), *(tuple(other.n_concepts(units)) for other in self.further)]
        rates = (rate, *(other.rate for other in self.further))
        return Choice(rates, tuple(counts), wished, None, expected, tuple(sizes) if lost else (), lost)


def _wished(wanted: Sequence[float] | None, sizes: Sequence[int]) -> float | None:
    """Tokens per concept that a policy wants for a whole text; None where it does not say."""
    if not wanted:
        return None
    return sum(sizes) / sum(size / rate for size, rate in zip(sizes, wanted, strict=True))


def chooser_of(config: IngestConfig, measures: TextMeasures, longest_unit: int) -> RateChooser:
    """The chooser that the settings of a storage describe.

    Args:
        config: Its settings; policy `auto` must have been resolved, see `resolved`.
        measures: Of its compressor, which is asked for as late as possible.
        longest_unit: Most tokens of a unit.

    Raises:
        ConfigurationError: A setting makes no sense.
        RateOutOfReachError: Units are too short for a rate.
    """
    further = [FixedRate(rate, longest_unit) for rate in config.also_rates]
    return RateChooser(_policy(config, measures, longest_unit), further, _guard(config, measures), described(config))


def resolved(rate: float | RatePolicyName, compressor: Any) -> float | RatePolicyName:
    """A rate, or the name of a policy; `auto` becomes the best policy that a compressor has the means for."""
    if rate != "auto":
        return rate
    return "information" if getattr(compressor, "losses", None) is None else "learned"


def described(config: IngestConfig) -> str:
    """The settings of a chooser as one text, the same for the same settings."""
    text = f"FixedRate({config.rate})" if isinstance(config.rate, float) else f"{config.rate}"
    if not isinstance(config.rate, float):
        text += f"({config.rate_options.model_dump_json()})"
    text += "".join(f"+{rate:g}" for rate in config.also_rates)
    return text if config.guard == "off" else f"{text} guard {config.guard} {config.guard_limit}"


def learned_losses(measures: TextMeasures) -> LearnedLosses:
    """The losses that were fitted to a compressor.

    Raises:
        ConfigurationError: None were.
    """
    predictor = getattr(measures.compressor, "losses", None)
    if predictor is None:
        raise ConfigurationError(
            "nothing was learned about what this compressor loses",
            got="no rates.json beside the compressor",
            expected="predicted losses",
            next_step="fit them with `compllm-rag train rates`, or use rate information and guard exact",
        )
    return LearnedLosses(predictor, measures)


def best_losses(measures: TextMeasures) -> Losses:
    """Learned losses where there are any, else the share of information that is dropped."""
    has = getattr(measures.compressor, "losses", None) is not None
    return learned_losses(measures) if has else InformationLosses(measures)


def rates_within(longest_unit: int) -> tuple[float, ...]:
    """The rates that policies choose from, those that units are too short for left out."""
    return tuple(rate for rate in RATES if rate <= max_rate(longest_unit))


def _policy(config: IngestConfig, measures: TextMeasures, longest_unit: int) -> RatePolicy:
    if isinstance(config.rate, float):
        return FixedRate(config.rate, longest_unit)
    if config.rate == "information":
        return InformationRate(measures, config.rate_options, longest_unit)
    if config.rate == "learned":
        within = rates_within(longest_unit)
        return LeastLossRate(Later(lambda: learned_losses(measures)), config.rate_options.most_loss, within)
    if config.rate == "budget":
        return PricedRate(Later(lambda: best_losses(measures)), choices=rates_within(longest_unit))
    raise ConfigurationError("policy auto was not resolved", got=config.rate, next_step="see `resolved`")


def _guard(config: IngestConfig, measures: TextMeasures) -> Guard | None:
    limit = {} if config.guard_limit is None else {"limit": config.guard_limit}
    if config.guard == "exact":
        return ExactGuard(measures, **limit)
    return LossGuard(Later(lambda: learned_losses(measures)), **limit) if config.guard == "loss" else None


class Later:
    """Losses that are made when they are asked for first: a storage is opened without its compressor's weights.

    Args:
        make: Makes them.
    """

    def __init__(self, make: Callable[[], Losses]) -> None:
        self._make = make

    @functools.cached_property
    def _made(self) -> Losses:
        return self._make()

    def of(self, units: Units, rates: Sequence[float]) -> Floats:
        """See `Losses.of`."""
        return self._made.of(units, rates)

"""What a user asks for, as settings: rates and policies by name, budgets in positions or bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from compllm_rag.config import GuardName, IngestConfig, RateOptions, RatePolicyName
from compllm_rag.errors import ConfigurationError

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
# Options of `RateOptions` by the policy that heeds them, and how the command line calls them.
_HEEDED: dict[str, tuple[str, ...]] = {
    "information": ("bands", "window", "measure"),
    "learned": ("most_loss",),
    "auto": tuple(RateOptions.model_fields),
}
_FLAGS = {
    "bands": "bands (--rate-bands)",
    "window": "window (--rate-window)",
    "measure": "measure (--rate-measure)",
    "most_loss": "most_loss (--most-loss)",
}
# `1,500` is fifteen hundred to some and one and a half to others, so it is neither; a fraction is of bytes alone.
_BUDGET = re.compile(r"\s*(?P<whole>\d+(?:_\d+)*)(?:(?P<mark>[.,])(?P<part>\d+))?\s*(?P<unit>[a-z]*)\s*", re.IGNORECASE)


def rate_settings(
    rate: float | str | None,
    rates: Sequence[float | str] | None = None,
    budget: float | str | None = None,
    guard: str | None = None,
) -> dict[str, Any]:
    """Fields of `IngestConfig`, those that nobody asked for left out.

    Args:
        rate: Source tokens per concept, or the name of a policy.
        rates: Several rates to keep side by side; the first is the one that queries read.
        budget: Most positions (a whole number), or bytes ("40MB").
        guard: Which chunks stay text.

    Raises:
        ConfigurationError: One of them makes no sense, or two of them exclude each other.
    """
    if rate is not None and rates is not None:
        raise ConfigurationError("rate and rates exclude each other", got=f"{rate} and {rates}", expected="one of them")
    if rates is not None and (isinstance(rates, str | float | int) or not rates):
        raise ConfigurationError("rates make no sense", got=repr(rates), expected="one or more, such as (1, 2)")
    asked = [one_rate(each) for each in (rates if rates is not None else [] if rate is None else [rate])]
    found: dict[str, Any] = {"rate": asked[0]} if asked else {}
    if len(asked) > 1:
        named = [each for each in asked[1:] if isinstance(each, str)]
        if named:
            raise ConfigurationError(
                "only the first of several rates can be left to a policy",
                got=named[0],
                expected="numbers behind it, such as (1, 2)",
            )
        found["also_rates"] = tuple(asked[1:])
    if budget is not None:
        found |= _budget_settings(budget, found)
    elif found.get("rate") == "budget":
        raise ConfigurationError(
            "a budget says how much the storage may hold",
            got="rate budget without one",
            expected="a budget",
            next_step='give one: --budget 200000, --budget 40MB, or budget="40MB"',
        )
    if guard is not None:
        if guard not in get_args(GuardName):
            raise ConfigurationError("unknown guard", got=guard, expected=", ".join(get_args(GuardName)))
        found["guard"] = guard
    return found


def named_options(given: RateOptions | Mapping[str, Any] | None) -> tuple[str, ...]:
    """The options of rate policies that somebody asks for: those named, or those that are not the default."""
    if isinstance(given, RateOptions):
        default = RateOptions()
        return tuple(name for name in RateOptions.model_fields if getattr(given, name) != getattr(default, name))
    return tuple(given or ())


def check_heeded(
    options: RateOptions | Mapping[str, Any] | None,
    guard_limit: float | None,
    rate: float | RatePolicyName,
    guard: GuardName,
) -> None:
    """Refuse options that a rate and a guard would not heed.

    Args:
        options: Of the rate policy, as they were asked for.
        guard_limit: Likewise; None for none.
        rate: Of the storage; `auto` may become either policy that looks at the text.
        guard: Of the storage.

    Raises:
        ConfigurationError: One would be without effect; it names it.
    """
    heeded = _HEEDED.get(rate, ()) if isinstance(rate, str) else ()
    unheeded = [name for name in named_options(options) if name not in heeded]
    if unheeded:
        name = unheeded[0]
        policy = next((policy for policy, names in _HEEDED.items() if name in names), "information")
        raise ConfigurationError(
            f"option {name} of rate policies would be without effect",
            got=f"{_FLAGS.get(name, name)}, and rate {rate if isinstance(rate, str) else f'{rate:g}'}",
            expected=f"rate {policy}",
            next_step=f"ask for rate {policy} in a new storage, or leave the option out",
        )
    if guard_limit is not None and guard == "off":
        raise ConfigurationError(
            "a limit without a guard would be without effect",
            got=f"guard_limit {guard_limit:g} (--guard-limit), and guard off",
            expected="guard exact or loss",
            next_step="ask for a guard in a new storage, or leave the limit out",
        )


def options_of(ingest: IngestConfig) -> dict[str, Any]:
    """The options that `rate_settings` and `ConceptIndex.create` would make the same settings of rates from."""
    heeded = isinstance(ingest.rate, str) and ingest.rate in _HEEDED  # earlier releases kept what nothing heeds
    found: dict[str, Any] = {
        "guard": ingest.guard,
        "guard_limit": None if ingest.guard == "off" else ingest.guard_limit,
        "rate_options": ingest.rate_options if heeded else None,
    }
    if ingest.rate == "budget":
        bytes_ = ingest.budget_bytes
        return found | {"budget": ingest.budget_positions if bytes_ is None else f"{bytes_}B"}
    return found | ({"rates": (ingest.rate, *ingest.also_rates)} if ingest.also_rates else {"rate": ingest.rate})


def one_rate(rate: float | str) -> float | RatePolicyName:
    """A rate as a number, or the name of a policy.

    Raises:
        ConfigurationError: It is neither; it names the policies.
    """
    if isinstance(rate, str):
        found: RatePolicyName | None = next((name for name in get_args(RatePolicyName) if name == rate.strip()), None)
        if found is not None:
            return found
    try:
        number = float(rate)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            "unknown rate policy",
            got=repr(rate),
            expected=f"a number of at least 1, or {', '.join(get_args(RatePolicyName))}",
            next_step="pass one of them",
        ) from error
    if not math.isfinite(number) or number < 1:
        raise ConfigurationError(
            "rate makes no sense", got=rate, expected="a number of at least 1", next_step="use 1, 2 or 4"
        )
    return number


def _budget_settings(budget: float | str, found: dict[str, Any]) -> dict[str, Any]:
    if found.get("rate") not in (None, "auto", "budget") or "also_rates" in found:
        raise ConfigurationError(
            "a budget chooses the rates itself",
            got=f"a budget and rate {found['rate']}" + (" beside others" if "also_rates" in found else ""),
            expected="one of them",
            next_step="leave the rate out",
        )
    return {"rate": "budget", **_budget(budget)}


def _budget(budget: float | str) -> dict[str, int]:
    if isinstance(budget, float) and budget.is_integer():
        budget = int(budget)
    match = _BUDGET.fullmatch(str(budget)) if not isinstance(budget, bool) else None
    unit = match["unit"].lower() if match else ""
    unclear = match is not None and match["part"] and (not unit or (match["mark"] == "," and len(match["part"]) == 3))
    if match is None or unclear or (unit and unit not in _UNITS):
        raise ConfigurationError(
            "budget cannot be read",
            got=repr(budget),
            expected='positions (200000) or bytes with their unit ("40MB", "1.5GiB")',
            next_step="write it so",
        )
    whole = match["whole"].replace("_", "")
    if unit:
        return {"budget_bytes": max(1, int(float(f"{whole}.{match['part'] or 0}") * _UNITS[unit]))}
    if not int(whole):
        raise ConfigurationError("budget makes no sense", got=budget, expected="at least 1 position")
    return {"budget_positions": int(whole)}

"""Learning what rates lose: a ridge regression from what a chunk looks like to what the reader loses of it.

How much it trusts what chunks look like is chosen by groups of questions left out of the fit; where those are foretold
no better than by the mean, the mean stands for every chunk.

On training rows that no compressor was trained on, the LLM reads each passage as text and as concepts at each rate, and
the gold answers' negative log-likelihoods are compared. What a chunk looks like (`FEATURES`) takes no pass of an LLM,
so that the rate of a chunk is known before it is compressed. The LLM reads the same questions without a passage, too:
what text gains over that is what a loss is a share of (`compllm_rag.compression.rate_policies.shares`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.loading import AUTO
from compllm_rag.compression.rate_policies.losses import RATES, LossPredictor
from compllm_rag.compression.rate_policies.measures import Floats, TextMeasures
from compllm_rag.compression.rates import concepts_at
from compllm_rag.errors import ConfigurationError
from compllm_rag.prompt import ConceptSpan
from compllm_rag.training.deep_source import deep_source
from compllm_rag.training.examples import Example, pack, pack_deep, targets_of
from compllm_rag.training.job_options import DEEP_DATA
from compllm_rag.training.material import Material
from compllm_rag.training.objective import last_hidden_state, nll_by_kind
from compllm_rag.training.run_config import Progress

# In units of text, and past them all the mean loss alone: which is best is found on groups left out. With a few hundred
# units, what tells two chunks apart may be less than chance, and nobody is to be led by it.
_RIDGES = (30.0, 100.0, 300.0, 1000.0, np.inf)
# Nats per token; a question that the LLM gets wholly wrong says no more than that.
_MOST = 3.0
_FOLDS = 5


def train_rates(
    out: Path,
    data_dir: Path,
    init: str,
    llm: str,
    progress: Progress,
    *,
    reader: str = AUTO,
    n_groups: int = 400,
    seed: int = 0,
    gain_only: bool = False,
    dtype: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Give a compressor of deep concepts predicted losses; its concepts and its fingerprint stay the same.

    Args:
        out: Where `load_compressor` will find it; may be the folder it comes from.
        data_dir: Holds `train/*.jsonl(.gz)` with questions.
        init: Folder of the compressor; `auto` takes the shipped one, or an untrained one.
        llm: Its target LLM.
        progress: Called with a message and the share that is done.
        reader: Folder of the reader it was made with, "auto" for the shipped one, "none" for the LLM as it is.
        n_groups: See `fit_losses`.
        seed: See `fit_losses`.
        gain_only: Leave the predicted losses as they are, and find out what text gains over no passage: for those that
            were fitted without it. Number of groups and seed should be those of the fit, so that it is the same groups.
        dtype: Of the LLM.
        device: A torch device.

    Returns:
        What was done, as plain values.

    Raises:
        ConfigurationError: `init` is no compressor of deep concepts, or there is nothing to learn from; with
            `gain_only`, no losses are fitted to it.
        DataFileError, EvaluationDataError: See `Material`.
        FingerprintMismatchError, UnknownModelError: See `load_compressor_for`.
    """
    questions, _ = Material.files_of(data_dir)
    compressor = deep_source(
        llm,
        init,
        reader,
        refusal="losses are learned of deep concepts alone",
        instead="ingest by rate information",
        dtype=dtype,
        device=device,
        progress=progress,
    )
    fitted = _fitted(compressor, init) if gain_only else None
    unit_length = compressor.config.unit_length
    material = Material(questions, [], compressor.segmenter, DEEP_DATA.material, unit_length=unit_length)
    made = (
        fit_losses(compressor, material, n_groups=n_groups, seed=seed, progress=progress)
        if fitted is None
        else fitted.model_copy(
            update={"gain": mean_gain(compressor, material, n_groups=n_groups, seed=seed, progress=progress)}
        )
    )
    compressor.losses = made
    compressor.save_pretrained(out)
    return {
        "out": str(out),
        "units": made.units,
        "rates": list(made.rates),
        "mean_loss": list(made.offsets),
        "explained": list(made.explained),
        "gain": made.gain,
        "told_apart": any(map(any, made.weights)),
        "fingerprint": compressor.fingerprint,
        "skipped": len(material.skipped),
    }


def fit_losses(
    compressor: DeepCompressor,
    material: Material,
    *,
    n_groups: int = 400,
    rates: Sequence[float] = RATES,
    seed: int = 0,
    progress: Progress | None = None,
) -> LossPredictor:
    """Measure what each rate loses on held-out rows, and fit what predicts it.

    Args:
        compressor: As it is.
        material: Questions with passages, cut into the compressor's units; only what it holds out is read.
        n_groups: How many groups of questions that share their passages to read, at most.
        rates: At which to measure, rising.
        seed: Of the choice.
        progress: Called with a message and the share that is done.

    Raises:
        ConfigurationError: Nothing is held out.
    """
    measures = TextMeasures(lambda: compressor)
    features, losses, of_group = list[Floats](), list[Floats](), list[int]()
    gains = list[float]()
    told = f"at {len(rates)} rates"
    for number, example, units in _examples(material, n_groups, seed, told, progress):
        found = measured_losses(compressor, example, rates)
        features += [measures.features(unit) for unit in units]
        losses += [found] * len(units)
        gains += [measured_gain(compressor, example)] * len(units)
        of_group += [number] * len(units)
    if not features:
        raise _nothing_held_out(material)
    x, y = np.stack(features), np.clip(np.stack(losses), -_MOST, _MOST)  # (n_units, n_features), (n_units, n_rates)
    mean, scale = x.mean(0), x.std(0) + 1e-6
    explained, strength = _best_ridge((x - mean) / scale, y, np.array(of_group))
    weights = _ridge((x - mean) / scale, y - y.mean(0), strength)
    return LossPredictor(
        mean=tuple(mean.tolist()),
        scale=tuple(scale.tolist()),
        rates=tuple(float(rate) for rate in rates),
        weights=tuple(tuple(row) for row in weights.T.tolist()),
        offsets=tuple(y.mean(0).tolist()),
        units=len(x),
        explained=explained,
        compressor=compressor.fingerprint,
        gain=_mean_of(gains),
    )


def mean_gain(
    compressor: DeepCompressor,
    material: Material,
    *,
    n_groups: int = 400,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    """What text gains over no passage, as `fit_losses` finds it: with the same material, number and seed, the same.

    It takes two passes of the LLM for each group, where a fit takes two and two more for each rate, about.

    Args:
        compressor: As it is.
        material: See `fit_losses`.
        n_groups: See `fit_losses`.
        seed: See `fit_losses`.
        progress: See `fit_losses`.

    Raises:
        ConfigurationError: Nothing is held out.
    """
    gains = list[float]()
    for _, example, units in _examples(material, n_groups, seed, "as text and without a passage", progress):
        gains += [measured_gain(compressor, example)] * len(units)
    if not gains:
        raise _nothing_held_out(material)
    return _mean_of(gains)


def _examples(
    material: Material, n_groups: int, seed: int, told: str, progress: Progress | None
) -> Iterator[tuple[int, Example, list[tuple[int, ...]]]]:
    """Groups of questions that are held out: number, passages with questions, and the units of all passages."""
    rng = random.Random(seed)
    groups = rng.sample(material.held_out, min(n_groups, len(material.held_out)))
    for number, group in enumerate(groups):
        example = material.questions(group, rng, 0, extras=False)
        units = [unit for body in example.bodies for unit in body.segments]
        if units and all(body.segments for body in example.bodies):
            yield number, example, units
        if progress:
            progress(f"reading {len(groups)} groups of questions {told}", (number + 1) / len(groups))


def _nothing_held_out(material: Material) -> ConfigurationError:
    return ConfigurationError(
        "nothing can be learned about rates",
        got=f"{len(material.held_out)} groups of questions held out of {len(material.groups)}",
        expected="training questions, one group in 40 of which no compressor is trained on",
        next_step="give more questions with --data-dir",
    )


def _fitted(compressor: DeepCompressor, init: str) -> LossPredictor:
    found = compressor.losses
    if found is None or found.compressor != compressor.fingerprint:
        raise ConfigurationError(
            "there are no losses to complete",
            got=f"{init} with {'none' if found is None else 'those of another compressor'}",
            expected="a compressor with losses that `compllm-rag train rates` fitted to it",
            next_step="leave --gain-only out: a fit measures the gain as well",
        )
    return found


@torch.no_grad()
def measured_gain(compressor: DeepCompressor, example: Example) -> float:
    """What reading an example's passages as text gains over reading none, in nats per token of its answers.

    Args:
        compressor: Its LLM reads.
        example: Passages, with questions behind them.
    """
    bare = Example((example.prefix[0],), example.branches)  # what stands in front of the first passage
    return _nll_as_text(compressor, bare) - _nll_as_text(compressor, example)


def _nll_as_text(compressor: DeepCompressor, example: Example) -> float:
    llm = compressor.llm
    targets = targets_of([example], prompt_weight=0.0, kind_weights={}, device=llm.device)
    total, tokens = nll_by_kind(llm, last_hidden_state(llm, pack([example], llm)), targets)["qa"]
    return total / tokens


def _mean_of(gains: Sequence[float]) -> float:
    """Mean of gains, one for each unit, bounded as losses are: both are parts of one quotient."""
    return float(np.clip(gains, -_MOST, _MOST).mean())


@torch.no_grad()
def measured_losses(compressor: DeepCompressor, example: Example, rates: Sequence[float]) -> Floats:
    """What reading an example's passages as concepts loses, (n_rates,) in nats per token of its answers.

    Args:
        compressor: Makes and reads the concepts.
        example: Passages, none of them empty, with questions behind them.
        rates: Source tokens per concept.
    """
    llm, halves = compressor.llm, compressor.halves
    targets = targets_of([example], prompt_weight=0.0, kind_weights={}, device=llm.device)
    bodies = example.bodies
    units = [unit for body in bodies for unit in body.segments]
    scores = list(compressor.scores(units))
    # What is not marked has the same states at every rate.
    hidden = None if compressor.config.marked else list(compressor.states(units))

    def nll(states: torch.Tensor) -> float:
        total, tokens = nll_by_kind(llm, states, targets)["qa"]
        return total / tokens

    as_text = _nll_as_text(compressor, example)
    found = []
    for rate in rates:
        spans, at = list[ConceptSpan](), 0
        chosen = [
            compressor.best_places(unit, own, concepts_at(rate, len(unit)))
            for unit, own in zip(units, scores, strict=True)
        ]
        rows = hidden or list(compressor.states(units, chosen))
        for number, body in enumerate(bodies):
            states, places, begin = [], list[int](), 0
            for unit in body.segments:
                kept = chosen[at]
                states.append(rows[at][kept])
                places += [begin + place for place in kept]
                at, begin = at + 1, begin + len(unit)
            spans.append(ConceptSpan(torch.cat(states), number, torch.tensor(places), len(body)))
        packed = pack_deep([example], halves, [spans])
        found.append(nll(last_hidden_state(llm, packed, halves.upper)) - as_text)
    return np.array(found)


def _ridge(x: Floats, y: Floats, strength: float) -> Floats:
    """Weights (n_features, n_rates) of x (n_units, n_features) for y (n_units, n_rates), in closed form."""
    if not np.isfinite(strength):
        return np.zeros((x.shape[1], y.shape[1]))
    found = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y)
    return np.asarray(found, dtype=np.float64)


def _best_ridge(x: Floats, y: Floats, groups: np.ndarray[Any, Any]) -> tuple[tuple[float, ...], float]:
    """R² by rate on groups left out of the fit, and the strength at which their sum is most.

    Of too few groups none can be left out: then the mean stands for all.
    """
    if len(set(groups.tolist())) < 2 * _FOLDS:
        return (), np.inf
    tried = [(_explained(x, y, groups, strength), strength) for strength in _RIDGES]
    return max(tried, key=lambda one: (sum(one[0]), one[1]))


def _explained(x: Floats, y: Floats, groups: np.ndarray[Any, Any], strength: float) -> tuple[float, ...]:
    """R² by rate on groups left out of the fit, a fifth at a time; a little below 0 is what the mean has."""
    guessed = np.empty_like(y)
    for fold in range(_FOLDS):
        out = groups % _FOLDS == fold
        mean = np.asarray(y[~out].mean(0), dtype=np.float64)
        guessed[out] = mean + x[out] @ _ridge(x[~out], y[~out] - mean, strength)
    total = ((y - y.mean(0)) ** 2).sum(0)
    rest = ((y - guessed) ** 2).sum(0)
    return tuple((1 - rest / np.maximum(total, 1e-12)).tolist())

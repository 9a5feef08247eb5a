"""Learning what rates lose: a ridge regression from what a chunk looks like to what the reader loses of it.

On training rows that no compressor was trained on, the LLM reads each passage as text and as concepts at each rate, and
the gold answers' negative log-likelihoods are compared. What a chunk looks like (`FEATURES`) takes no pass of an LLM,
so that the rate of a chunk is known before it is compressed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.loading import AUTO, load_compressor_for
from compllm_rag.compression.rate_policies.losses import RATES, LossPredictor
from compllm_rag.compression.rate_policies.measures import Floats, TextMeasures
from compllm_rag.compression.rates import concepts_at
from compllm_rag.errors import ConfigurationError
from compllm_rag.prompt import ConceptSpan
from compllm_rag.training.examples import Example, pack, pack_deep, targets_of
from compllm_rag.training.job_options import DEEP_DATA
from compllm_rag.training.material import Material
from compllm_rag.training.objective import last_hidden_state, nll_by_kind
from compllm_rag.training.run_config import Progress

# In units of text: with a few hundred of them the mean loss is trusted more than what tells two chunks apart.
_RIDGE = 30.0
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
        dtype: Of the LLM.
        device: A torch device.

    Returns:
        What was done, as plain values.

    Raises:
        ConfigurationError: `init` is no compressor of deep concepts, or there is nothing to learn from.
        DataFileError, EvaluationDataError: See `Material`.
        FingerprintMismatchError, UnknownModelError: See `load_compressor_for`.
    """
    questions, _ = Material.files_of(data_dir)
    compressor = load_compressor_for(
        llm,
        reader=None if reader == "none" else reader,
        compressor=init,
        dtype=dtype,
        device=device,
        progress=progress,
    )
    if not isinstance(compressor, DeepCompressor):
        raise ConfigurationError(
            "losses are learned of deep concepts alone",
            got=f"{init}, concepts at the input embeddings",
            expected="a compressor of deep concepts",
            next_step="name another with --from, or ingest by rate information",
        )
    unit_length = compressor.config.unit_length
    material = Material(questions, [], compressor.segmenter, DEEP_DATA.material, unit_length=unit_length)
    made = fit_losses(compressor, material, n_groups=n_groups, seed=seed, progress=progress)
    compressor.losses = made
    compressor.save_pretrained(out)
    return {
        "out": str(out),
        "units": made.units,
        "rates": list(made.rates),
        "mean_loss": list(made.offsets),
        "explained": list(made.explained),
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
    rng, measures = random.Random(seed), TextMeasures(lambda: compressor)
    groups = rng.sample(material.held_out, min(n_groups, len(material.held_out)))
    features, losses, of_group = list[Floats](), list[Floats](), list[int]()
    for number, group in enumerate(groups):
        example = material.questions(group, rng, 0, extras=False)
        units = [unit for body in example.bodies for unit in body.segments]
        if units and all(body.segments for body in example.bodies):
            found = measured_losses(compressor, example, rates)
            features += [measures.features(unit) for unit in units]
            losses += [found] * len(units)
            of_group += [number] * len(units)
        if progress:
            progress(f"reading {len(groups)} groups of questions at {len(rates)} rates", (number + 1) / len(groups))
    if not features:
        raise ConfigurationError(
            "nothing can be learned about rates",
            got=f"{len(material.held_out)} groups of questions held out of {len(material.groups)}",
            expected="training questions, one group in 40 of which no compressor is trained on",
            next_step="give more questions with --data-dir",
        )
    x, y = np.stack(features), np.clip(np.stack(losses), -_MOST, _MOST)  # (n_units, n_features), (n_units, n_rates)
    mean, scale = x.mean(0), x.std(0) + 1e-6
    weights = _ridge((x - mean) / scale, y - y.mean(0))
    return LossPredictor(
        mean=tuple(mean.tolist()),
        scale=tuple(scale.tolist()),
        rates=tuple(float(rate) for rate in rates),
        weights=tuple(tuple(row) for row in weights.T.tolist()),
        offsets=tuple(y.mean(0).tolist()),
        units=len(x),
        explained=_explained((x - mean) / scale, y, np.array(of_group)),
        compressor=compressor.fingerprint,
    )


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
    hidden, scores = list(compressor.states(units)), list(compressor.scores(units))

    def nll(states: torch.Tensor) -> float:
        total, tokens = nll_by_kind(llm, states, targets)["qa"]
        return total / tokens

    as_text = nll(last_hidden_state(llm, pack([example], llm)))
    found = []
    for rate in rates:
        spans, at = list[ConceptSpan](), 0
        for number, body in enumerate(bodies):
            states, places, begin = [], list[int](), 0
            for unit in body.segments:
                kept = compressor.best_places(unit, scores[at], concepts_at(rate, len(unit)))
                states.append(hidden[at][kept])
                places += [begin + place for place in kept]
                at, begin = at + 1, begin + len(unit)
            spans.append(ConceptSpan(torch.cat(states), number, torch.tensor(places), len(body)))
        packed = pack_deep([example], halves, [spans])
        found.append(nll(last_hidden_state(llm, packed, halves.upper)) - as_text)
    return np.array(found)


def _ridge(x: Floats, y: Floats) -> Floats:
    """Weights (n_features, n_rates) of x (n_units, n_features) for y (n_units, n_rates), in closed form."""
    found = np.linalg.solve(x.T @ x + _RIDGE * np.eye(x.shape[1]), x.T @ y)
    return np.asarray(found, dtype=np.float64)


def _explained(x: Floats, y: Floats, groups: np.ndarray[Any, Any]) -> tuple[float, ...]:
    """R² by rate on groups left out of the fit, a fifth at a time; empty where there are too few."""
    if len(set(groups.tolist())) < 2 * _FOLDS:
        return ()
    guessed = np.empty_like(y)
    for fold in range(_FOLDS):
        out = groups % _FOLDS == fold
        mean = np.asarray(y[~out].mean(0), dtype=np.float64)
        guessed[out] = mean + x[out] @ _ridge(x[~out], y[~out] - mean)
    total = ((y - y.mean(0)) ** 2).sum(0)
    rest = ((y - guessed) ** 2).sum(0)
    return tuple((1 - rest / np.maximum(total, 1e-12)).tolist())

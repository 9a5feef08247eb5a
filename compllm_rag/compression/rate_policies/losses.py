"""What reading a unit at a rate is expected to lose: without any training, or as fitted to a reader's loss."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from pydantic import Field, ValidationError, model_validator

from compllm_rag.compression.rate_policies.measures import FEATURES, Floats, TextMeasures, Units, dropped
from compllm_rag.compression.rates import concepts_at
from compllm_rag.config import Frozen
from compllm_rag.errors import UnsupportedFormatError

# Rates that policies choose from, and that losses are fitted at.
RATES = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
RATES_FILE = "rates.json"


class Losses(Protocol):
    """Predicts what units lose."""

    def of(self, units: Units, rates: Sequence[float]) -> Floats:
        """Loss of each unit at each rate, (n_units, n_rates), never falling with the rate."""
        ...


class InformationLosses:
    """The share of a unit's information that its dropped tokens have: 0 at rate 1, for any compressor.

    Keeping one token more never saves more than the one before it did, so that sums over units are minimised one step
    at a time.

    Args:
        measures: Of the compressor.
    """

    def __init__(self, measures: TextMeasures) -> None:
        self._measures = measures

    def of(self, units: Units, rates: Sequence[float]) -> Floats:
        """Between 0 and 1 each, (n_units, n_rates)."""
        rows = self._measures.information(units)
        return np.array([[dropped(row, concepts_at(rate, len(row))) for rate in rates] for row in rows]).reshape(
            len(rows), len(rates)
        )


class LossPredictor(Frozen):
    """A ridge regression from a unit's features to what the reader loses, one for each rate.

    It lies beside the compressor whose concepts it was fitted to and is no part of their identity: it changes which
    rate is chosen, and no concept.
    """

    format_version: Literal[1] = 1
    features: tuple[str, ...] = FEATURES
    mean: tuple[float, ...] = Field(description="of each feature")
    scale: tuple[float, ...] = Field(description="standard deviation of each feature")
    rates: tuple[float, ...] = RATES
    weights: tuple[tuple[float, ...], ...] = Field(description="of the scaled features, by rate")
    offsets: tuple[float, ...] = Field(description="mean loss at each rate, nats per token of a gold answer")
    units: int = Field(description="units it was fitted to")
    explained: tuple[float, ...] = Field(default=(), description="R² on rows left out, by rate")
    compressor: str = Field(default="", description="fingerprint of the compressor")
    gain: float | None = Field(
        default=None,
        description="what reading text gains over reading no passage, mean over the units, in nats per token of a gold "
        "answer; None where it was not measured",
    )

    @model_validator(mode="after")
    def _fits(self) -> LossPredictor:
        width, rates = len(self.features), len(self.rates)
        sizes = [len(self.mean), len(self.scale), *map(len, self.weights)]
        if self.features != FEATURES or set(sizes) != {width} or {len(self.weights), len(self.offsets)} != {rates}:
            raise ValueError("a predictor of other features than this release computes")
        if any(later <= earlier for earlier, later in zip(self.rates, self.rates[1:], strict=False)):
            raise ValueError("rates must rise")
        return self

    def predict(self, features: Floats, rates: Sequence[float]) -> Floats:
        """Loss in nats per token of a gold answer over reading text.

        Args:
            features: (n_units, n_features).
            rates: Those between the fitted ones are interpolated.

        Returns:
            (n_units, n_rates), at least 0 and never falling with the rate.
        """
        scaled = (features - np.array(self.mean)) / np.array(self.scale)
        known = scaled @ np.array(self.weights).T + np.array(self.offsets)  # (n_units, n_fitted_rates)
        known = np.maximum.accumulate(np.clip(known, 0, None), axis=1)
        return np.array([np.interp(rates, self.rates, row) for row in known]).reshape(len(features), len(rates))

    def save(self, folder: Path) -> None:
        """Write it beside a compressor."""
        (folder / RATES_FILE).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> LossPredictor | None:
        """The one that lies beside a compressor; None where none was fitted.

        Raises:
            UnsupportedFormatError: It is damaged, or of a newer release.
        """
        path = folder / RATES_FILE
        if not path.is_file():
            return None
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, ValidationError) as error:
            raise UnsupportedFormatError(
                "these are no predicted losses that this release reads",
                got=f"{path} ({type(error).__name__})",
                expected="a file that `compllm-rag train rates` wrote",
                next_step="fit it again, or remove it",
            ) from error


class LearnedLosses:
    """What a `LossPredictor` says.

    Args:
        predictor: Fitted to the compressor's concepts.
        measures: Of the compressor.
    """

    def __init__(self, predictor: LossPredictor, measures: TextMeasures) -> None:
        self.predictor, self._measures = predictor, measures

    def of(self, units: Units, rates: Sequence[float]) -> Floats:
        """In nats per token of a gold answer, (n_units, n_rates)."""
        if not units:
            return np.zeros((0, len(rates)))
        return self.predictor.predict(np.stack([self._measures.features(unit) for unit in units]), rates)

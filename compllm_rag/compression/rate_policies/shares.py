"""The share of what text gives that concepts of one text are predicted to keep: by learned losses, unit by unit."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

from compllm_rag.compression.rate_policies.losses import LossPredictor
from compllm_rag.compression.rate_policies.measures import Floats, TextMeasures, Units

# Nats per token of a gold answer: where reading the passages gains less there is nothing to keep a share of
# (docs/design.md section 7).
LEAST_GAIN = 0.3
_REMEMBERED = 4096  # units whose features are kept; of retrieved passages many are retrieved again


class PredictedShares:
    """What concepts keep, as a `LossPredictor` says it: 1 - predicted loss / what text gains over no passage.

    No LLM runs for it: features come from token ids and their text.

    Args:
        predictor: Of the compressor, with a gain of at least `LEAST_GAIN`.
        measures: Of the compressor.
    """

    def __init__(self, predictor: LossPredictor, measures: TextMeasures) -> None:
        self.predictor, self._gain, self._last = predictor, float(predictor.gain or 0.0), predictor.rates[-1]

        @functools.lru_cache(_REMEMBERED)
        def features(unit: tuple[int, ...]) -> Floats:
            return measures.features(unit)

        self._features = features

    def of(self, units: Units, n_concepts: Sequence[int]) -> float:
        """The share that a text's concepts keep, from 0 to 1; the more concepts, the more of it.

        A unit counts by its tokens, at the rate that its own concepts come to. Above the highest rate that losses were
        measured at, the share falls by proportion, as that of the table does (`compllm_rag.reading.kept`).

        Args:
            units: Token ids of each unit, none empty.
            n_concepts: K of each.
        """
        total = sum(len(unit) for unit in units)
        kept = sum(self._of_unit(tuple(unit), k) * len(unit) for unit, k in zip(units, n_concepts, strict=True))
        return float(kept / total) if total else 1.0

    def _of_unit(self, unit: tuple[int, ...], k: int) -> float:
        if not k:
            return 0.0
        rate = max(1.0, len(unit) / k)
        lost = float(self.predictor.predict(self._features(unit)[None], [rate])[0, 0])
        return min(1.0, max(0.0, 1 - lost / self._gain)) * min(1.0, self._last / rate)


def shares_of(predictor: LossPredictor | None, fingerprint: str, measures: TextMeasures) -> PredictedShares | str:
    """What a compressor's predicted losses say of shares; or why they say nothing, in plain words.

    Args:
        predictor: What lies beside the compressor; None for nothing.
        fingerprint: Of the compressor.
        measures: Of the compressor.
    """
    why = _why_none(predictor, fingerprint)
    return why if predictor is None or why else PredictedShares(predictor, measures)


def shares_identity(predictor: LossPredictor | None, fingerprint: str) -> dict[str, str]:
    """Of what predicts shares, for journals that keep what was read; nothing where a table of rates stands in.

    Args:
        predictor: See `shares_of`.
        fingerprint: Of the compressor.
    """
    if predictor is None or _why_none(predictor, fingerprint):
        return {}
    return {"losses": hashlib.sha256(predictor.model_dump_json().encode()).hexdigest()}


def _why_none(predictor: LossPredictor | None, fingerprint: str) -> str:
    """Why a predictor says nothing of shares; "" where it does."""
    if predictor is None:
        return "no losses are fitted to this compressor"
    if predictor.compressor != fingerprint:
        return "the losses beside this compressor are fitted to another one"
    if predictor.gain is None:
        return "its losses were fitted without what text gains over no passage: `compllm-rag train rates --gain-only`"
    if predictor.gain < LEAST_GAIN:
        return f"text gained too little over no passage where losses were fitted ({predictor.gain:.3f} nats per token)"
    return ""

"""What reading a prompt takes: in text tokens by counting layers, in seconds by curves that were measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from compllm_rag.config import Narrowing
from compllm_rag.errors import UnsupportedFormatError
from compllm_rag.models.narrowing import kept_concepts

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Curve:
    """Seconds as a function of a number of positions: base + linear n + quadratic n^2, none of them negative.

    Attention is quadratic in a prompt's length, all else linear.
    """

    base: float
    linear: float
    quadratic: float

    def __call__(self, n: float) -> float:
        """Seconds for n positions; nothing for none."""
        return self.base + self.linear * n + self.quadratic * n * n if n > 0 else 0.0

    @classmethod
    def fitted(cls, lengths: Sequence[int], seconds: Sequence[float]) -> Curve:
        """The curve nearest to what was measured, by relative error, so that short prompts count as long ones do."""
        n, s = np.asarray(lengths, dtype=np.float64), np.asarray(seconds, dtype=np.float64)  # (measured,) each
        columns = np.stack([np.ones_like(n), n, n * n], axis=1) / s[:, None]  # (measured, 3)
        kept = [0, 1, 2] if len(n) > 2 else [1]
        while True:  # what comes out negative is left out: a curve must not fall
            found = np.linalg.lstsq(columns[:, kept], np.ones_like(n), rcond=None)[0]  # (kept,)
            if len(kept) == 1 or bool((found >= 0).all()):
                break
            kept.pop(int(found.argmin()))
        values = dict(zip(kept, map(float, found), strict=True))
        return cls(*(max(0.0, values.get(i, 0.0)) for i in range(3)))


@dataclass(frozen=True)
class CostModel:
    """Seconds that an LLM takes on one machine, as `compllm-rag calibrate` found them.

    Attributes:
        llm: How the LLM is named.
        identity: Of the LLM, its reader merged; see `TargetLLM.identity`.
        entry_layer: L, where concepts enter; 0: at the input embeddings, and there are no halves.
        depth: D, layers of the LLM.
        dtype: Compute dtype.
        device: The kind of device.
        threads: Of torch.
        whole: The whole LLM over a prompt.
        lower: Layers [0, L) over a prompt; None at L = 0.
        upper: Layers [L, D) over a prompt, and the first new token; None at L = 0.
        compress_s_per_token: Of making concepts in line; per source token.
        longest: Positions of the longest prompt that was measured.
    """

    llm: str
    identity: str
    entry_layer: int
    depth: int
    dtype: str
    device: str
    threads: int
    whole: Curve
    lower: Curve | None
    upper: Curve | None
    compress_s_per_token: float
    longest: int

    def prefill_s(self, tokens: float, concepts: float) -> float:
        """Seconds to read a prompt.

        Args:
            tokens: Those that are read as text, the template's and the question's included.
            concepts: Those that stand among them.
        """
        if self.lower is None or self.upper is None or not concepts:
            return self.whole(tokens + concepts)
        return self.lower(tokens) + self.upper(tokens + concepts)

    def compress_s(self, tokens: float) -> float:
        """Seconds to make the concepts of so many source tokens in line."""
        return self.compress_s_per_token * tokens

    def to_json(self) -> str:
        """As it lies in the cache folder."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """What `to_json` gave.

        Raises:
            UnsupportedFormatError: It is something else.
        """
        try:
            fields: dict[str, Any] = dict(json.loads(text))
            version = fields.pop("format_version", None)
            for name in ("whole", "lower", "upper"):
                fields[name] = None if fields[name] is None else Curve(**fields[name])
            if version != FORMAT_VERSION or fields["whole"] is None:
                raise ValueError(f"format version {version}")
            return cls(**fields)
        except (ValueError, TypeError, KeyError) as error:
            raise UnsupportedFormatError(
                "calibration cannot be read",
                got=f"{type(error).__name__}: {error}",
                expected=f"format version {FORMAT_VERSION}",
                next_step="compllm-rag calibrate",
            ) from error


def layers_passed(concepts: int, *, entry_layer: int, depth: int, narrowing: Narrowing | None = None) -> int:
    """Concepts of a prompt times the layers that they pass: those from the entry layer on.

    Where the prompt is narrowed from a layer T on, a share of them passes those from T on.
    """
    passed = concepts * (depth - entry_layer)
    if narrowing is not None:
        passed -= (concepts - kept_concepts(concepts, narrowing.share)) * (depth - narrowing.layer)
    return passed


def counted_prefill(
    tokens: float, concepts: int, *, entry_layer: int, depth: int, narrowing: Narrowing | None = None
) -> float:
    """What a prompt takes at prefill in text tokens; see `layers_passed`."""
    return tokens + layers_passed(concepts, entry_layer=entry_layer, depth=depth, narrowing=narrowing) / depth

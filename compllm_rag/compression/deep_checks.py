"""What deep concepts cannot be made of: refused before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compllm_rag.config import CompressorConfig
from compllm_rag.errors import ConfigurationError


def require_deep(config: CompressorConfig) -> None:
    """Refuse the configuration of a compressor whose concepts enter at the input embeddings."""
    if not config.deep:
        raise ConfigurationError(
            "this is no compressor of deep concepts",
            got="entry layer 0, the input embeddings",
            expected="an entry layer of at least 1",
            next_step="use Compressor",
        )


def check_selector(config: CompressorConfig, weights: torch.Tensor | None, hidden_size: int) -> None:
    """Refuse a learned selector without weights, weights without it, or of another width."""
    wanted = (hidden_size + 1,) if config.selector == "learned" else None
    has = None if weights is None else tuple(weights.shape)
    if has != wanted:
        raise ConfigurationError(
            "selector and its weights do not fit",
            got=f'selector "{config.selector}" with ' + ("no weights" if has is None else f"weights {has}"),
            expected="no weights" if wanted is None else f"weights {wanted}",
            next_step="make one with `compllm-rag train selector`" if wanted else "leave the weights out",
        )


def check_unit(config: CompressorConfig, unit: Sequence[int], k: int, places: Sequence[int] | None) -> None:
    """Refuse a unit that is empty or too long, a K out of bounds, and places that are not K of it in order."""
    n = len(unit)
    fits = 1 <= n <= config.unit_length and 1 <= k <= n
    if places is not None:
        fits = fits and len(places) == k and list(places) == sorted({*places} & {*range(n)})
    if not fits:
        raise ConfigurationError(
            "unit cannot be compressed",
            got=f"{n} tokens into {k} concepts" + ("" if places is None else f" at {list(places)[:20]}"),
            expected=f"1 to {config.unit_length} tokens and 1 to that many concepts, at places in order",
            next_step="cut the text with the spec's `units`",
        )

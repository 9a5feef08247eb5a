"""Units that are compressed at several rates at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compllm_rag.compression.spec import ConceptCompressor


def compressed_once(
    compressor: ConceptCompressor, segments: Sequence[tuple[int, ...]], n_concepts: Sequence[int]
) -> list[torch.Tensor]:
    """Compress units, some of them at several rates; a deep one that is kept whole gives its other rates, too.

    Not where tokens that are kept are marked: they are other concepts at each rate.

    Args:
        compressor: Makes concepts.
        segments: Token ids of each unit.
        n_concepts: K of each.

    Returns:
        One tensor (K, width) per unit, as of `ConceptCompressor.compress`.
    """
    shared = compressor.config.deep and not compressor.config.marked
    whole = {s for s, k in zip(segments, n_concepts, strict=True) if k == len(s)} if shared else set()
    cut = [i for i, (s, k) in enumerate(zip(segments, n_concepts, strict=True)) if s in whole and k < len(s)]
    rest = sorted(set(range(len(segments))) - set(cut))
    made = dict(zip(rest, compressor.compress([segments[i] for i in rest], [n_concepts[i] for i in rest]), strict=True))
    if cut:
        # Every token's state is there; which of them stay is all that differs.
        rows = {segments[i]: made[i] for i in rest if n_concepts[i] == len(segments[i])}
        kept = compressor.kept_places([segments[i] for i in cut], [n_concepts[i] for i in cut])
        made |= {i: rows[segments[i]][places].clone() for i, places in zip(cut, kept, strict=True)}
    return [made[i] for i in range(len(segments))]

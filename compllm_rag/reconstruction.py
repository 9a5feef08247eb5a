"""What storing loses of concepts, measured on a sample of those just written."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compllm_rag.compressor import Compressor
from compllm_rag.metrics import Metrics
from compllm_rag.store.base import ConceptStore


def sample(
    compressor: Compressor,
    store: ConceptStore,
    keys: Sequence[str],
    segments: Sequence[Sequence[int]],
    made: Sequence[torch.Tensor],
    metrics: Metrics,
) -> None:
    """Read a few records back and compare them with what the compressor made.

    Args:
        compressor: Made them.
        store: Keeps them, flushed or not.
        keys: Of the records just put.
        segments: Token ids of each.
        made: Concepts (K, hidden_size) of each, as they were put.
        metrics: Told the outcome.
    """
    chosen = range(0, len(keys), metrics.sample_every)
    for i, read in zip(chosen, store.get([keys[i] for i in chosen]), strict=True):
        if read is not None:
            true = made[i].float()
            loss = float((read.float() - true).square().mean().sqrt() / true.square().mean().sqrt().clamp_min(1e-12))
            metrics.sampled(loss, _anchor_cosine(compressor, segments[i], true))


def _anchor_cosine(compressor: Compressor, segment: Sequence[int], concepts: torch.Tensor) -> float | None:
    """Mean cosine between concepts (K, hidden_size) and the embeddings they start from; None when they do not."""
    if compressor.config.queries != "anchor":
        return None
    places = compressor.anchors(segment, len(concepts))
    anchors = compressor.llm.embed([segment[place] for place in places]).float().cpu()
    return float(torch.nn.functional.cosine_similarity(anchors, concepts, dim=-1).mean())

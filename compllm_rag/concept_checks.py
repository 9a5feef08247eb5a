"""Whether concepts are sound: within the scale of what the LLM reads, and given back by a store as they were made."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.spec import ConceptCompressor, ConceptSpec
from compllm_rag.errors import InvalidConceptsError
from compllm_rag.metrics import Metrics
from compllm_rag.store.base import ConceptStore
from compllm_rag.store.codec import largest

# Times the RMS of the LLM's embeddings. Concepts stay within a few; a hundred is a head that has run away, or damage.
_MOST_RMS = 100.0


def check_scale(concepts: torch.Tensor, spec: ConceptSpec) -> None:
    """Refuse concepts (n, width) that would drown everything else in a prompt.

    Raises:
        InvalidConceptsError: They are far outside the scale of the LLM's embeddings or states.
    """
    concepts, most = concepts[:, : spec.hidden_size], _MOST_RMS * spec.scale
    if _largest(concepts) <= most:
        return  # no RMS is larger than the largest value, and this takes a tenth of the time
    rms = float(concepts.float().square().mean(-1).max().sqrt())
    if not rms <= most:
        raise InvalidConceptsError(
            "concepts are far outside the scale of what the LLM reads",
            got=f"an RMS of {rms:.3g}",
            expected=f"at most {most:.3g}, {_MOST_RMS:g} times that of the LLM's own states",
            next_step="look at the compressor that made them",
        )


def _largest(concepts: torch.Tensor) -> float:
    """The largest magnitude in concepts (n, hidden_size); those of a store go by their bits."""
    if concepts.dtype != torch.float16 or concepts.device.type != "cpu":
        return float(concepts.abs().max())
    return largest(concepts.detach().contiguous().numpy())


def sample(
    compressor: ConceptCompressor,
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
            true, read = made[i][:, : compressor.hidden_size].float(), read[:, : compressor.hidden_size]
            loss = float((read.float() - true).square().mean().sqrt() / true.square().mean().sqrt().clamp_min(1e-12))
            metrics.sampled(loss, _anchor_cosine(compressor, segments[i], true))


def _anchor_cosine(compressor: ConceptCompressor, segment: Sequence[int], concepts: torch.Tensor) -> float | None:
    """Mean cosine between concepts (K, hidden_size) and the embeddings they start from; None when they do not."""
    if not isinstance(compressor, Compressor) or compressor.config.queries != "anchor":
        return None
    places = compressor.anchors(segment, len(concepts))
    anchors = compressor.llm.embed([segment[place] for place in places]).float().cpu()
    return float(torch.nn.functional.cosine_similarity(anchors, concepts, dim=-1).mean())

"""Late interaction: how near the closest state of a passage is to each token of a question, summed up.

ColBERT (Khattab and Zaharia, SIGIR 2020, section 3.3) scores a passage by the sum over the question's tokens of the
largest cosine to any of the passage's token embeddings. Here the embeddings are states in front of the entry layer L,
which the store keeps of passages and which a question has there, too. Nobody trained them for that, and as they are
they cannot be compared: a few dimensions are a hundred times larger than the rest, and all states share a mean that is
longer than what tells them apart. So each dimension is standardised before: minus its mean and divided by its standard
deviation, over the states of the passages that were retrieved for the question. These are at hand for every storage,
whatever LLM made it, and nothing has to be kept with it; the question's few tokens are too few for a mean of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from compllm_rag.reading.sentences import Sentence

# A dimension's standard deviation counts as at least this share of the median one: what hardly varies must not decide.
_LEAST_SPREAD = 0.1


def cosines(question: torch.Tensor, passages: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Cosines between a question's states and those of passages, standardised by the passages'.

    Args:
        question: (n_tokens, hidden_size).
        passages: (n_concepts, hidden_size) each; together at least one state.

    Returns:
        (n_tokens, n_concepts) of each passage.
    """
    every = torch.cat([states.float() for states in passages])  # (n_concepts of all, hidden_size)
    spread, mean = torch.std_mean(every, 0, correction=0)  # (hidden_size,) each
    spread = spread.clamp_min(_LEAST_SPREAD * float(spread.median()))
    spread[spread == 0] = 1.0  # a single state: nothing varies
    asked = F.normalize((question.float() - mean) / spread, dim=-1)  # (n_tokens, hidden_size)
    found = F.normalize((every - mean) / spread, dim=-1)  # (n_concepts of all, hidden_size)
    return list(torch.split(asked @ found.T, [len(states) for states in passages], 1))


def of_sentences(near: torch.Tensor, places: torch.Tensor, sentences: Sequence[Sentence]) -> list[float | None]:
    """The score of each sentence of a passage.

    Args:
        near: (n_tokens, n_concepts), cosines of the question's tokens to the passage's states.
        places: The token of the passage that each state stands for, (n_concepts,).
        sentences: Of the passage.

    Returns:
        See `max_sim`; None for a sentence of which no token was kept.
    """
    return [max_sim(near[:, (places >= one.start) & (places < one.end)]) for one in sentences]


def max_sim(near: torch.Tensor) -> float | None:
    """The score of a passage, or of a part of it.

    Args:
        near: (n_tokens, n_concepts), cosines of the question's tokens to its states.

    Returns:
        The mean over the question's tokens of the largest cosine, from -1 to 1; None where there is nothing to compare.
    """
    return float(near.amax(1).mean()) if near.numel() else None

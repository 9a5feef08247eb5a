"""Which tokens concepts are made of: anchors of a segment, kept places of a unit.

The most informative ones, by a table over the vocabulary (docs/design.md section 4), token by token or word by word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xxhash

# Tokens; a longer run without white space is no word.
_LONGEST_WORD = 8


class AnchorChooser:
    """Chooses anchors.

    Args:
        information: Of each token, (rows,) in nats.
        begins: Boolean (rows,), which tokens begin a word, see `word_begins`; None where each token stands by itself.
    """

    def __init__(self, information: torch.Tensor, begins: torch.Tensor | None = None) -> None:
        self.information, self._begins = information, begins

    def choose(self, segment: Sequence[int], n_concepts: int) -> list[int]:
        """Indices of a segment's K most informative tokens, in order; among equals the earlier one."""
        ids = torch.tensor([list(segment)], device=self.information.device)
        scores = self._scores(ids, torch.ones_like(ids, dtype=torch.bool))[0]
        order = torch.argsort(scores, descending=True, stable=True)[:n_concepts]
        return sorted(order.tolist())

    def places(self, ids: torch.Tensor, is_token: torch.Tensor, counts: torch.Tensor, k: int) -> torch.Tensor:
        """Indices (batch, max K) of each row's anchors in order of place; padding repeats the last slot."""
        n = ids.shape[1]
        order = torch.argsort(self._scores(ids, is_token), dim=1, descending=True, stable=True)
        slots = torch.arange(n, device=ids.device).expand_as(ids)
        rank = torch.empty_like(order).scatter_(1, order, slots)
        return torch.where(rank < counts, slots, n).sort(dim=1).values[:, :k].clamp_max(n - 1)

    def _scores(self, ids: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        """How informative each token is where it stands, (batch, n_tokens); minus infinity for padding."""
        scores = self.information[ids].masked_fill(~is_token, -math.inf)
        if self._begins is None:
            return scores
        # A name or a number that is kept in part tells nothing, so a word's tokens stand and fall together.
        first = torch.zeros_like(is_token)
        first[:, 1:] = is_token[:, 1:] & ~is_token[:, :-1]
        word = (self._begins[ids] | first).long().cumsum(1)
        best = torch.full((ids.shape[0], ids.shape[1] + 1), -math.inf, device=ids.device)
        best = best.scatter_reduce(1, word, scores, "amax").gather(1, word)
        length = (
            torch.zeros_like(best[:, :1]).expand(-1, ids.shape[1] + 1).scatter_add(1, word, torch.ones_like(scores))
        )
        # Scripts without blanks have no words to go by.
        best = torch.where(length.gather(1, word) <= _LONGEST_WORD, best, scores)
        return best.masked_fill(~is_token, -math.inf)


def best_positions(scores: torch.Tensor, n_concepts: int) -> list[int]:
    """Places of the K highest of `scores` (n_tokens,), in order; among equals the earlier one."""
    order = torch.argsort(scores, descending=True, stable=True)[:n_concepts]
    return sorted(order.tolist())


def learned_scores(states: torch.Tensor, information: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """How much each token is worth keeping, by what `train selector` has learned.

    Args:
        states: (n_tokens, hidden_size), what stands in front of the entry layer of the LLM without any LoRA.
        information: (n_tokens,) in nats.
        weights: (hidden_size + 1,), of the states, each divided by its root mean square, and of the information.

    Returns:
        (n_tokens,) float32.
    """
    return selector_features(states, information) @ weights


def selector_features(states: torch.Tensor, information: torch.Tensor) -> torch.Tensor:
    """What a learned selector judges by, (n_tokens, hidden_size + 1) float32; see `learned_scores`."""
    wide = states.float()
    rms = wide.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-12)  # (n_tokens, 1)
    return torch.cat([wide / rms, information.float()[:, None]], 1)


def random_scores(unit: Sequence[int]) -> torch.Tensor:
    """Chance that depends on a unit's token ids alone, (n_tokens,): the row that every selector must beat."""
    seed = xxhash.xxh3_64_intdigest(np.asarray(unit, dtype="<u4").tobytes()) & (2**63 - 1)
    return torch.rand(len(unit), generator=torch.Generator().manual_seed(seed))


def word_begins(tokenizer: Any, rows: int) -> torch.Tensor:
    """Which tokens begin a word: those with white space in front, and all that are not letters or digits.

    Returns:
        Boolean (rows,); what is beyond the vocabulary begins one.
    """
    begins = torch.ones(rows, dtype=torch.bool)
    names = tokenizer.convert_ids_to_tokens(list(range(min(rows, len(tokenizer)))))
    for index, name in enumerate(names):
        # Letters of a byte-level vocabulary that stand for blanks and line breaks, and SentencePiece's mark, count as
        # white space; so does whatever the decoder turns into it.
        if name and name[0].isalnum() and name[0] not in "\u0120\u010a\u2581":
            begins[index] = False
    return begins


def fitted(table: torch.Tensor, rows: int) -> torch.Tensor:
    """The table for `rows` embedding rows; padded vocabulary rows count as never seen."""
    if table.numel() < rows:
        return torch.cat([table, table.max().expand(rows - table.numel())])
    return table[:rows]

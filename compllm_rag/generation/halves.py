"""A prompt through both halves of the LLM: tokens below the entry layer, tokens and concepts above it.

The lower half sees the prompt's own tokens and nothing else; its KV cache holds them alone. At the entry layer the
concepts join, each where its passage stood, and the upper half runs over all. A token that is generated goes through
both. Plain tensors in and out; who lays out a prompt decides on positions.

*Slots and positions.* A row's order is the order of its slots: a slot sees all slots in front of it, whatever their
positions. Positions only turn queries and keys (RoPE). They may have gaps, where tokens of a passage were dropped or,
in the lower half, where whole passages are missing. A sliding window counts slots, as transformers does: it always
holds as many keys as the LLM was trained with, and reaches further back in the text where there are gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compllm_rag.errors import ConfigurationError, InvalidConceptsError
from compllm_rag.models.halves import Halves

Positions = Sequence[int] | torch.Tensor | None


@dataclass(frozen=True)
class Tokens:
    """Text of a prompt.

    Attributes:
        ids: Token ids (n,).
        positions: (n,); None counts on from the item in front.
    """

    ids: Sequence[int] | torch.Tensor
    positions: Positions = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class States:
    """Concepts of a passage.

    Attributes:
        states: (n_concepts, hidden_size), the residual stream in front of the entry layer.
        positions: (n_concepts,); None counts on from the item in front.
    """

    states: torch.Tensor
    positions: Positions = None

    def __len__(self) -> int:
        return int(self.states.shape[0])


class SplitForward:
    """Prefill and decoding of one left-padded batch of prompts.

    Rows are padded in each half by itself, since they differ in their concepts as in their tokens.

    Args:
        halves: The LLM in two halves.
        rows: For each prompt its items in order, with at least one token in each row.

    Raises:
        ConfigurationError: There is no row, a row has no token, or an item's positions are not as many as the item is
            long.
        InvalidConceptsError: Concepts are not a matrix, or of another width.
    """

    def __init__(self, halves: Halves, rows: Sequence[Sequence[Tokens | States]]) -> None:
        self.halves = halves
        if not rows or not all(any(isinstance(item, Tokens) and len(item) for item in row) for row in rows):
            raise ConfigurationError(
                "prompt has no token",
                got=f"{len(rows)} rows, one of them without a token" if rows else "no rows",
                expected="at least one token in each row",
                next_step="put the chat template's text around the concepts",
            )
        ids, token_positions, kinds, positions, states = [], [], [], [], []
        for row in rows:
            where: list[int] = []
            kind: list[bool] = []
            text: list[int] = []
            for item in row:
                where += _positions(item, where[-1] + 1 if where else 0)
                kind += [isinstance(item, Tokens)] * len(item)
                if isinstance(item, Tokens):
                    text += torch.as_tensor(item.ids).tolist()
                else:
                    states.append(self._checked(item.states))
            ids.append(text)
            token_positions.append([at for at, is_token in zip(where, kind, strict=True) if is_token])
            kinds.append(kind)
            positions.append(where)
        # Below: (batch, most tokens of a row). Above: (batch, most slots of a row).
        self._ids, self._low_mask = self._padded(ids)
        self._low_positions, _ = self._padded(token_positions)
        self._positions, self._mask = self._padded(positions)
        kind_of, _ = self._padded(kinds)
        self._is_token = kind_of.bool()
        self._states = torch.cat(states) if states else None  # (concepts of all rows, hidden_size)
        self.lower_cache, self.upper_cache = halves.caches()
        self._low_seen, self._seen = self._low_mask, self._mask  # of all slots in the caches, as steps add to them
        self._at: torch.Tensor | None = None  # (batch, 1), position of the next token; None before the prefill

    def _checked(self, states: torch.Tensor) -> torch.Tensor:
        llm = self.halves.llm
        if states.ndim != 2 or states.shape[1] != llm.hidden_size:
            raise InvalidConceptsError(
                "concepts do not fit the LLM",
                got=f"shape {tuple(states.shape)}",
                expected=f"(n_concepts, {llm.hidden_size})",
                next_step="use the LLM the storage was made for",
            )
        return states.to(llm.device, llm.dtype)

    def _padded(self, rows: list[list[int]] | list[list[bool]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows as one left-padded tensor (batch, longest), zeros in front, and its mask."""
        longest, device = max(map(len, rows)), self.halves.llm.device
        padded = torch.tensor([[0] * (longest - len(row)) + list(map(int, row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return padded, (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()

    @torch.inference_mode()
    def prefill(self) -> torch.Tensor:
        """Run the prompts; called again, it starts anew.

        Returns:
            Logits (batch, vocab_size) of the first new token.
        """
        halves = self.halves
        self.lower_cache, self.upper_cache = halves.caches()
        self._low_seen, self._seen, self._at = self._low_mask, self._mask, self._positions[:, -1:] + 1
        embeddings = halves.llm.embedding(self._ids)  # (batch, most tokens, hidden_size)
        hidden = halves.below(embeddings, self._low_mask, self._low_positions, self.lower_cache)
        # Row by row and slot by slot, tokens stand in the same order in both halves.
        joined = hidden.new_zeros(*self._mask.shape, hidden.shape[-1])  # (batch, most slots, hidden_size)
        joined[self._is_token] = hidden[self._low_mask.bool()]
        if self._states is not None:
            joined[self._mask.bool() & ~self._is_token] = self._states
        return halves.above(joined, self._mask, self._positions, self.upper_cache, keep=1)[:, -1]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Run one more token of each row, at the position behind the last.

        Args:
            tokens: Token ids (batch,).

        Returns:
            Logits (batch, vocab_size) of the token after it.

        Raises:
            ConfigurationError: There was no prefill, or there are not as many tokens as rows.
        """
        ids = torch.as_tensor(tokens, device=self.halves.llm.device).reshape(-1, 1)  # (batch, 1)
        if self._at is None or len(ids) != len(self._mask):
            raise ConfigurationError(
                "a step needs a prefill and one token for each row",
                got=f"{len(ids)} tokens {'before' if self._at is None else 'after'} the prefill",
                expected=f"{len(self._mask)} tokens after it",
                next_step="call prefill() first, and go on with rows that have ended, too",
            )
        one = torch.ones_like(ids)
        self._low_seen, self._seen = torch.cat([self._low_seen, one], 1), torch.cat([self._seen, one], 1)
        hidden = self.halves.below(self.halves.llm.embedding(ids), self._low_seen, self._at, self.lower_cache)
        logits = self.halves.above(hidden, self._seen, self._at, self.upper_cache, keep=1)[:, -1]
        self._at = self._at + 1
        return logits


def _positions(item: Tokens | States, start: int) -> list[int]:
    """Positions of one item, counted from `start` where it gives none."""
    if item.positions is None:
        return list(range(start, start + len(item)))
    given: list[int] = torch.as_tensor(item.positions).tolist()
    if len(given) != len(item):
        raise ConfigurationError(
            "an item's positions do not fit it",
            got=f"{len(given)} positions",
            expected=f"{len(item)}, one a slot",
            next_step="give each token or concept its position, or none to count on",
        )
    return given

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

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from compllm_rag.errors import ConfigurationError, InvalidConceptsError
from compllm_rag.generation.forward import Past, cuts, fork_cache, last_of
from compllm_rag.models.halves import Halves
from compllm_rag.prompt import PromptPlan, TextSpan

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

    @property
    def caches(self) -> tuple[Any, ...]:
        """The KV caches of the lower and of the upper half, as far as the prompts were read."""
        return self.lower_cache, self.upper_cache

    @property
    def owner(self) -> object:
        """What the KV caches belong to."""
        return self.halves

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.halves.llm.device

    def empty_caches(self) -> tuple[Any, ...]:
        """KV caches to begin with."""
        return self.halves.caches()

    @property
    def next_position(self) -> int:
        """Position of the first new token of a prompt that is alone in its batch."""
        return int(self._positions[0, -1]) + 1

    def prefill(self, past: Past | None = None) -> torch.Tensor:
        """Run the prompts; called again, it starts anew.

        Args:
            past: What was read before of a prompt that is alone in its batch.

        Returns:
            Logits (batch, vocab_size) of the first new token.
        """
        return last_of(self.prefill_parts(past))

    def prefill_parts(self, past: Past | None = None, *, most: int | None = None) -> Iterator[torch.Tensor | None]:
        """See `Forward.prefill_parts`, and `prefill`: first all parts of the lower half, then those of the upper."""
        tokens, slots = (past.tokens, past.slots) if past else (0, 0)
        self.lower_cache, self.upper_cache = past.caches if past else self.empty_caches()
        self._low_seen, self._seen, self._at = self._low_mask, self._mask, self._positions[:, -1:] + 1
        below: list[torch.Tensor] = []
        for begin, end in cuts(tokens, self._ids.shape[1], most):
            if below:
                yield None
            below.append(self._below(begin, end))
        joined, last = self._joined(torch.cat(below, 1), tokens, slots), self._mask.shape[1]
        for begin, end in cuts(slots, last, most):
            if begin > slots or len(below) > 1:
                yield None
            logits = self._above(joined[:, begin - slots : end - slots], begin, end)
        yield logits

    @torch.inference_mode()
    def _below(self, begin: int, end: int) -> torch.Tensor:
        """Tokens from `begin` to `end` through the lower half, (batch, end - begin, hidden_size)."""
        embeddings = self.halves.llm.embedding(self._ids[:, begin:end])  # (batch, end - begin, hidden_size)
        positions = self._low_positions[:, begin:end]
        return self.halves.below(embeddings, self._low_mask[:, :end], positions, self.lower_cache)

    @torch.inference_mode()
    def _joined(self, hidden: torch.Tensor, tokens: int, slots: int) -> torch.Tensor:
        """Tokens from the lower half, and concepts: (batch, most slots, hidden_size), what was read before left out."""
        # Row by row and slot by slot, tokens stand in the same order in both halves.
        mask, is_token = self._mask[:, slots:], self._is_token[:, slots:]
        joined = hidden.new_zeros(*mask.shape, hidden.shape[-1])
        joined[is_token] = hidden[self._low_mask[:, tokens:].bool()]
        if self._states is not None:
            joined[mask.bool() & ~is_token] = self._states[slots - tokens :]
        return joined

    @torch.inference_mode()
    def _above(self, joined: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Slots from `begin` to `end` through the upper half; logits (batch, vocab_size) behind them."""
        mask, positions = self._mask[:, :end], self._positions[:, begin:end]
        return self.halves.above(joined, mask, positions, self.upper_cache, keep=1)[:, -1]

    @torch.inference_mode()
    def extend(self, ids: torch.Tensor) -> torch.Tensor:
        """Go on with tokens of each row, the first at the position behind the last.

        Args:
            ids: Token ids (batch, n).

        Returns:
            Logits (batch, n, vocab_size) of the token behind each.

        Raises:
            ConfigurationError: There was no prefill, or there are not as many rows as prompts.
        """
        at = self._next(ids)  # (batch, n)
        hidden = self.halves.below(self.halves.llm.embedding(ids), self._low_seen, at, self.lower_cache)
        return self.halves.above(hidden, self._seen, at, self.upper_cache)  # (batch, n, vocab_size)

    def _next(self, ids: torch.Tensor) -> torch.Tensor:
        """Count tokens (batch, n) that follow; their positions (batch, n)."""
        if self._at is None or len(ids) != len(self._mask):
            raise ConfigurationError(
                "what follows a prompt needs its prefill and a row for each prompt",
                got=f"{len(ids)} rows {'before' if self._at is None else 'after'} the prefill",
                expected=f"{len(self._mask)} rows after it",
                next_step="call prefill() first, and go on with rows that have ended, too",
            )
        ones, n = torch.ones_like(ids), ids.shape[1]
        self._low_seen, self._seen = torch.cat([self._low_seen, ones], 1), torch.cat([self._seen, ones], 1)
        at = self._at + torch.arange(n, device=ids.device)  # (batch, n)
        self._at = self._at + n
        return at

    def step(self, tokens: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """`extend` by one token of each row, (batch,); logits (batch, vocab_size) of the token behind it."""
        ids = torch.as_tensor(tokens, device=self.halves.llm.device).reshape(-1, 1)  # (batch, 1)
        return self.extend(ids)[:, -1]

    def fork(self) -> Self:
        """The same prompts as they were read, to be gone on with in another way."""
        forked = copy.copy(self)
        forked.lower_cache, forked.upper_cache = fork_cache(self.lower_cache), fork_cache(self.upper_cache)
        return forked


def split_rows(plans: Sequence[PromptPlan]) -> list[list[Tokens | States]]:
    """Plans as rows for `SplitForward`: deep concepts at the positions that their tokens would have."""
    rows: list[list[Tokens | States]] = []
    for plan in plans:
        row: list[Tokens | States] = []
        at = 0
        for span in plan.spans:
            if isinstance(span, TextSpan):
                row.append(Tokens(span.ids, range(at, at + len(span))))
            else:
                places = range(len(span)) if span.places is None else span.places.tolist()
                row.append(States(span.concepts, [at + place for place in places]))
            at += span.extent
        rows.append(row)
    return rows


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

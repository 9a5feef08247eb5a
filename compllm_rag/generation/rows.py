"""Prompts that were read, decoded together: one step gives each row its next token."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from compllm_rag.generation.forward import Forward, WholeForward, as_rows
from compllm_rag.generation.halves import SplitForward, Tokens
from compllm_rag.generation.reuse import ReusingForward
from compllm_rag.generation.row_attention import RowsCache, row_tree
from compllm_rag.generation.row_cache import RowCache
from compllm_rag.models.device_memory import memory_trouble
from compllm_rag.models.halves import Halves
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import PromptPlan, TextSpan, lay_out

logger = logging.getLogger(__name__)


@dataclass
class Row:
    """A prompt that was read, as it is gone on with.

    Attributes:
        forward: The prompt, where rows are decoded one by one.
        caches: Of the LLM, or of the lower and the upper half, where they are decoded together.
        position: Of the next token.
    """

    forward: Forward | None
    caches: tuple[RowCache, ...]
    position: int


class Steps(Protocol):
    """Takes steps of rows of one kind.

    Attributes:
        together: Whether rows share a step; else it has to be given one row at a time.
    """

    together: bool

    def take(self, forward: Forward, new_tokens: int) -> Row:
        """A row of a prompt that was read alone, with room for so many new tokens."""
        ...

    def step(self, rows: Sequence[Row], tokens: Sequence[int]) -> torch.Tensor:
        """Go on with a token of each row; logits (rows, vocab_size) behind it.

        After an error rows that share a step are as they were before.
        """
        ...


class WholeSteps:
    """Steps of the LLM as it is: prompts with text, and with concepts among the input embeddings.

    Args:
        llm: The target LLM.

    Raises:
        TypeError: See `row_tree`.
    """

    together = True

    def __init__(self, llm: TargetLLM) -> None:
        self._tree, self._device = row_tree(llm.model), llm.device

    @torch.inference_mode()
    def take(self, forward: Forward, new_tokens: int) -> Row:
        """See `Steps.take`."""
        return _taken(forward, new_tokens)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row], tokens: Sequence[int]) -> torch.Tensor:
        """See `Steps.step`."""
        logits: torch.Tensor = self._tree(
            input_ids=as_rows(tokens, self._device),
            position_ids=as_rows([row.position for row in rows], self._device),
            past_key_values=RowsCache([row.caches[0] for row in rows]),
            use_cache=True,
        ).logits[:, -1]
        _count(rows)
        return logits


class SplitSteps:
    """Steps of both halves of the LLM: prompts with deep concepts.

    The upper half has been trained to read them, so these rows share no step with those of `WholeSteps`.

    Args:
        halves: The LLM in two halves.

    Raises:
        TypeError: See `row_tree`.
    """

    together = True

    def __init__(self, halves: Halves) -> None:
        self._halves = copy.copy(halves)
        self._halves.lower, self._halves.upper = row_tree(halves.lower), row_tree(halves.upper)

    @torch.inference_mode()
    def take(self, forward: Forward, new_tokens: int) -> Row:
        """See `Steps.take`."""
        return _taken(forward, new_tokens)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row], tokens: Sequence[int]) -> torch.Tensor:
        """See `Steps.step`."""
        halves, device = self._halves, self._halves.llm.device
        ids, positions = as_rows(tokens, device), as_rows([row.position for row in rows], device)
        lower, upper = (RowsCache([row.caches[half] for row in rows]) for half in (0, 1))
        # Rows have no padding, so the mask says nothing; it is not even looked at.
        mask = torch.ones_like(ids)
        hidden = halves.below(halves.llm.embedding(ids), mask, positions, lower)  # (rows, 1, hidden_size)
        logits = halves.above(hidden, mask, positions, upper)[:, -1]
        _count(rows)
        return logits


class SingleSteps:
    """Steps of one row at a time, where an LLM's structure allows no others."""

    together = False

    def take(self, forward: Forward, new_tokens: int) -> Row:
        """See `Steps.take`."""
        return Row(forward, (), 0)

    def step(self, rows: Sequence[Row], tokens: Sequence[int]) -> torch.Tensor:
        """See `Steps.step`."""
        [row], [token] = rows, tokens
        if row.forward is None:
            raise TypeError("a row that is decoded together with others cannot be decoded by itself")
        return row.forward.extend(as_rows([token], inner_of(row.forward).device))[:, -1]


def steps_for(forward: Forward) -> Steps:
    """What goes on with prompts of this kind: together where that gives what each alone gives, tried on a few tokens.

    Args:
        forward: One of them.
    """
    inner = inner_of(forward)
    try:
        made: Steps = WholeSteps(inner.llm) if isinstance(inner, WholeForward) else SplitSteps(inner.halves)
        _compare(made, inner)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if memory_trouble(error) is not None:
            raise  # another time there may be room
        logger.warning(
            "answers of %s are decoded one by one: its layers do not take steps of several rows (%s: %s)",
            _llm(inner).source, type(error).__name__, " ".join(str(error).split())[:200],
        )  # fmt: skip
        return SingleSteps()
    return made


def inner_of(forward: Forward) -> WholeForward | SplitForward:
    """The prompt itself, without what looks for its beginning among earlier ones.

    Raises:
        TypeError: It is of another kind.
    """
    found = forward.inner if isinstance(forward, ReusingForward) else forward
    if not isinstance(found, WholeForward | SplitForward):
        raise TypeError(f"a prompt of the kind {type(found).__name__}")
    return found


def _llm(inner: WholeForward | SplitForward) -> TargetLLM:
    return inner.llm if isinstance(inner, WholeForward) else inner.halves.llm


def _taken(forward: Forward, new_tokens: int) -> Row:
    inner = inner_of(forward)
    return Row(None, tuple(RowCache.of(cache, new_tokens) for cache in inner.caches), inner.next_position)


def _count(rows: Sequence[Row]) -> None:
    for row in rows:
        row.position += 1
        for cache in row.caches:
            cache.count()


def _compare(steps: Steps, like: WholeForward | SplitForward) -> None:
    """Two short prompts alone and together.

    Raises:
        ValueError: They differ.
    """
    llm = _llm(like)
    # Ordinary tokens from all over the vocabulary.
    ids = torch.linspace(0, llm.embedding.weight.shape[0] - 1, 9, device=llm.device).long()[1:-1].tolist()
    forwards: list[WholeForward | SplitForward] = []
    for prompt in (ids[:4], ids[4:6]):
        if isinstance(like, WholeForward):
            forwards.append(WholeForward(llm, lay_out([PromptPlan((TextSpan(tuple(prompt)),))], llm)))
        else:
            forwards.append(SplitForward(like.halves, [[Tokens(prompt)]]))
        forwards[-1].prefill()
    rows, tokens = [steps.take(forward, 1) for forward in forwards], [ids[6], ids[0]]
    mine = steps.step(rows, tokens)  # (2, vocab_size)
    each = [
        forward.extend(as_rows([token], llm.device))[:, -1] for forward, token in zip(forwards, tokens, strict=True)
    ]
    theirs = torch.cat(each)
    off = float((mine - theirs).float().abs().max() / theirs.float().abs().max())
    if not off <= (1e-4 if llm.dtype == torch.float32 else 2e-2):
        raise ValueError(f"logits off by {off:.2g} of the largest")

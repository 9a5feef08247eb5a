"""The KV cache of a prompt that was read, gone on with where another prompt begins alike.

Prompts of one chat begin with the same opening and the same earlier turns, questions to one index with the same
opening. What they have in common need not be read again: its KV cache is cut out of that of the earlier prompt.

Two prompts are compared token by token, and concepts by their values and their places. Where both agree from the start,
positions agree too, so nothing else has to. What was kept is never written to: each answer gets caches of its own
(transformers puts new tensors in place of old ones), and is kept only once a step has come to its end. So neither an
error nor an answer that is given up can leave anything half written behind.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compllm_rag.errors import ConfigurationError
from compllm_rag.generation.forward import Past, WholeForward, cropped_cache, fork_cache, last_of, remembering_cache
from compllm_rag.generation.halves import SplitForward
from compllm_rag.models.device_memory import memory_trouble, release_unused
from compllm_rag.prompt import ConceptSpan, PromptPlan, TextSpan

# A token's id, or the concepts of a passage.
Atom = int | ConceptSpan


@dataclass(frozen=True)
class _Kept:
    """A prompt and its KV caches, in memory of `nbytes`."""

    owner: object
    atoms: Sequence[Atom]
    caches: tuple[Any, ...]
    nbytes: int


class PrefixCache:
    """KV caches of the prompts that were read last; the one used longest ago goes first. Safe among threads.

    Whoever measures how fast prompts are read shares none: a prompt that comes again costs next to nothing.

    Args:
        prompts: How many to keep, about one for each conversation that goes on at the same time.
        max_bytes: Most memory that they may take together, on the LLM's device. A larger prompt is not kept.

    Raises:
        ConfigurationError: A limit is below 1.
    """

    def __init__(self, prompts: int = 4, max_bytes: int = 1 << 30) -> None:
        if prompts < 1 or max_bytes < 1:
            raise ConfigurationError(
                "a prefix cache keeps something",
                got=f"{prompts} prompts in {max_bytes} bytes",
                expected="at least 1 of each",
                next_step="to keep nothing give the generator no prefix cache: prefixes=None",
            )
        self.prompts, self.max_bytes = prompts, max_bytes
        self._kept: OrderedDict[int, _Kept] = OrderedDict()  # by number, the one used last at the end
        self._next, self._lock = 0, threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept: KV caches, and concepts to compare with."""
        with self._lock:
            return sum(kept.nbytes for kept in self._kept.values())

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._kept.clear()

    @torch.inference_mode()
    def find(self, owner: object, atoms: Sequence[Atom]) -> Past | None:
        """The longest beginning of a prompt that was read before, at least its last token left out.

        Args:
            owner: What KV caches belong to.
            atoms: The prompt, see `atoms_of`.
        """
        if not atoms or not isinstance(atoms[-1], int):
            return None  # both halves need a token to go on with
        begun = atoms[:-1]
        with self._lock:
            mine = [(number, kept) for number, kept in self._kept.items() if kept.owner is owner]
        matches = [(agreement(kept.atoms, begun), number, kept) for number, kept in reversed(mine)]
        for n, number, kept in sorted(matches, key=lambda match: -match[0]):
            past = _cut(kept, n) if n else None
            if past is not None:
                with self._lock:
                    if number in self._kept:
                        self._kept.move_to_end(number)
                return past
        return None

    def keep(
        self, owner: object, atoms: Sequence[Atom], caches: tuple[Any, ...], *, instead: int | None = None
    ) -> int | None:
        """Keep what was read; earlier prompts that it goes on with are given up for it.

        Args:
            owner: What the caches belong to.
            atoms: What was read.
            caches: Of just these; they may go on growing.
            instead: The number of what it goes on with, where that is known; nothing is kept if that has gone.

        Returns:
            Its number; None if it is not kept.
        """
        own = tuple(map(fork_cache, caches))
        concepts = sum(atom.concepts.nbytes for atom in atoms if not isinstance(atom, int))
        kept = _Kept(owner, atoms, own, sum(map(_nbytes, own)) + concepts)
        with self._lock:
            if instead is not None:
                if self._kept.pop(instead, None) is None:
                    return None
            else:
                for number, other in list(self._kept.items()):
                    if other.owner is owner and agreement(other.atoms, atoms) == len(other.atoms):
                        del self._kept[number]
            if kept.nbytes > self.max_bytes:
                return None
            self._next += 1
            self._kept[self._next] = kept
            while len(self._kept) > self.prompts or sum(k.nbytes for k in self._kept.values()) > self.max_bytes:
                self._kept.popitem(last=False)
            return self._next


class ReusingForward:
    """One prompt, read from where it differs from what was read before.

    Args:
        inner: The prompt alone in its batch.
        plan: The same prompt.
        prefixes: What was read before; what is read now is kept there.

    Attributes:
        reused: Positions that were not read again; known after the prefill.
    """

    def __init__(self, inner: WholeForward | SplitForward, plan: PromptPlan, prefixes: PrefixCache) -> None:
        self._inner, self._atoms, self._prefixes = inner, atoms_of(plan), prefixes
        # Behind passages an answer is of no use to the next prompt, which will have other passages.
        self._follow = not plan.passages
        self._number: int | None = None
        self.reused = 0

    @property
    def inner(self) -> WholeForward | SplitForward:
        """The prompt alone in its batch."""
        return self._inner

    def prefill(self) -> torch.Tensor:
        """Read the prompt; logits (1, vocab_size) of the first new token.

        Where memory is short, what was kept is given up and the prompt is read from its start.
        """
        return last_of(self.prefill_parts())

    def prefill_parts(self, *, most: int | None = None) -> Iterator[torch.Tensor | None]:
        """See `Forward.prefill_parts`, and `prefill`."""
        past = self._prefixes.find(self._inner.owner, self._atoms)
        logits = None
        try:
            for logits in self._read(past, most):
                if logits is None:
                    yield None
        except (RuntimeError, MemoryError) as error:
            if not len(self._prefixes) or memory_trouble(error) is None:
                raise
            past = None
            self._prefixes.clear()
            release_unused(self._inner.device)
            for logits in self._read(None, most):
                if logits is None:
                    yield None
        self.reused = past.slots if past else 0
        self._number = self._prefixes.keep(self._inner.owner, self._atoms, self._inner.caches)
        yield logits

    def extend(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Forward.extend`; where memory runs short, what was kept is given up for the next answer."""
        try:
            logits = self._inner.extend(ids)
        except (RuntimeError, MemoryError) as error:
            if memory_trouble(error) is not None:
                self._prefixes.clear()
            raise
        if self._follow and self._number is not None:
            self._atoms = [*self._atoms, *ids[0].tolist()]
            self._number = self._prefixes.keep(self._inner.owner, self._atoms, self._inner.caches, instead=self._number)
        return logits

    def fork(self) -> WholeForward | SplitForward:
        """See `Forward.fork`; what a fork reads is not kept."""
        return self._inner.fork()

    def _read(self, past: Past | None, most: int | None) -> Iterator[torch.Tensor | None]:
        if past is None:
            past = Past(0, 0, tuple(map(remembering_cache, self._inner.empty_caches())))
        return self._inner.prefill_parts(past, most=most)


def reused_of(forward: object) -> int:
    """Positions of a prompt that was read which were not read again."""
    return forward.reused if isinstance(forward, ReusingForward) else 0


def atoms_of(plan: PromptPlan) -> list[Atom]:
    """A prompt as what two prompts are compared by."""
    out: list[Atom] = []
    for span in plan.spans:
        if isinstance(span, TextSpan):
            out.extend(span.ids)
        else:
            out.append(span)
    return out


def agreement(one: Sequence[Atom], other: Sequence[Atom]) -> int:
    """How many atoms two prompts have in common, from the start."""
    n = 0
    for a, b in zip(one, other, strict=False):
        if not (a == b if isinstance(a, int) or isinstance(b, int) else _same(a, b)):
            break
        n += 1
    return n


def _same(a: ConceptSpan, b: ConceptSpan) -> bool:
    """Whether two spans of concepts are the same to an LLM."""
    return a.n_tokens == b.n_tokens and _equal(a.concepts, b.concepts) and _equal(a.places, b.places)


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))


def _cut(kept: _Kept, n: int) -> Past | None:
    """The first atoms of what was kept; None where its caches cannot be cut there."""
    atoms = kept.atoms[:n]
    tokens = sum(isinstance(atom, int) for atom in atoms)
    slots = tokens + sum(len(atom) for atom in atoms if not isinstance(atom, int))
    if not tokens:
        return None  # a lower half that has read nothing
    sizes = (tokens, slots) if len(kept.caches) == 2 else (slots,)
    cut = tuple(cropped_cache(cache, size) for cache, size in zip(kept.caches, sizes, strict=True))
    return None if any(cache is None for cache in cut) else Past(tokens, slots, cut)


def _nbytes(cache: Any) -> int:
    tensors = [each for layer in cache.layers for each in (layer.keys, layer.values) if each is not None]
    return sum(each.nbytes for each in tensors)

"""Queries and conversations over the same passages, as prompts made of named parts, and the cache of their prefixes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.ttft.case import QUESTION
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.library import ConceptLibrary
from compllm_rag.prompt import QAPrompt
from compllm_rag.store import MemoryStore

BLOCK = 16
ANSWER = 24  # positions of an answer that a conversation goes on from


@dataclass(frozen=True)
class Sizes:
    """Positions of the parts of a prompt.

    Attributes:
        text: Of each passage as text.
        concepts: Of each passage as concepts.
        head: In front of the passages.
        marker: Around each passage, which is text in any case.
        question: Behind the passages.
    """

    text: tuple[int, ...]
    concepts: tuple[int, ...]
    head: int
    marker: int
    question: int


def sizes_of(compressor: ConceptCompressor, chunks: list[str], rate: float) -> Sizes:
    """Positions in the default prompt; concepts as many as there are, not as many as the rate promises."""
    library = ConceptLibrary(compressor, MemoryStore(compressor.spec.width), rate=rate)
    prompt = QAPrompt(compressor.llm.tokenizer)
    passages = [library.passage(text) for text in chunks]
    return Sizes(
        tuple(len(passage.ids) for passage in passages),
        tuple(sum(passage.n_concepts) for passage in passages),
        sum(map(len, prompt.prefix([]))),
        sum(map(len, prompt.template.passage(1, "", []))),
        len(prompt.suffix(f"Question: {QUESTION}")),
    )


Prompt = list[tuple[str, int]]  # what stands there, and which passage (-1: none)


def zipf_stream(n: int, k: int, exponent: float, seed: int) -> Iterator[Prompt]:
    """Prompts of independent queries, each over k of n passages; every question is new."""
    rng = random.Random(seed)
    order = rng.sample(range(n), n)
    weights = [1 / (rank + 1) ** exponent for rank in range(n)]
    for number in itertools.count():
        drawn: list[int] = []
        while len(drawn) < k:
            passage = rng.choices(order, weights)[0]
            drawn += [passage] if passage not in drawn else []
        yield [("head", -1), *((f"p{p}", p) for p in drawn), (f"q{number}", -1)]


def conversation_stream(n: int, k: int, exponent: float, seed: int, turns: int) -> Iterator[Prompt]:
    """Prompts of conversations: k passages and a question, then each turn one more passage and question."""
    source = zipf_stream(n, k + turns - 1, exponent, seed)
    for number in itertools.count():
        passages = next(source)[1:-1]
        prompt: Prompt = [("head", -1), *passages[:k], (f"q{number}.0", -1)]
        yield prompt
        for turn in range(1, turns):
            prompt = [*prompt, (f"a{number}.{turn}", -1), passages[k + turn - 1], (f"q{number}.{turn}", -1)]
            yield prompt


def positions(prompt: Prompt, sizes: Sizes, passages: tuple[int, ...]) -> list[tuple[str, int]]:
    """Parts with their prompt positions, `passages` being those of the passages themselves."""
    fixed = {"h": sizes.head, "q": sizes.question, "a": ANSWER}
    return [(name, fixed[name[0]] if p < 0 else passages[p] + sizes.marker) for name, p in prompt]


def own_tokens(prompt: Prompt, sizes: Sizes, parts: list[tuple[str, int]], first: int) -> float:
    """Tokens of a prompt's own among its first positions: all that is no passage, and the markers of passages.

    Args:
        prompt: The prompt.
        sizes: Positions of the parts.
        parts: Of the prompt with their positions, see `positions`.
        first: How many positions to look at; of a passage that is cut there, its markers count in proportion.
    """
    total, at = 0.0, 0
    for (_, passage), (_, size) in zip(prompt, parts, strict=True):
        within = max(0, min(size, first - at))
        total += within if passage < 0 else within * sizes.marker / size
        at += size
    return total


class PrefixCache:
    """Prefixes that were prefilled; nothing is evicted, which favours it.

    Attributes:
        positions: Whose keys and values it keeps by now.
        passages: How many passages are among them.
        of_passages: Positions of these, markers and all.
    """

    def __init__(self) -> None:
        self._known: set[tuple[str, ...]] = set()
        self.positions = self.passages = self.of_passages = 0

    def hit(self, parts: list[tuple[str, int]]) -> int:
        """Positions of the longest known prefix, in whole blocks; the prompt is known afterwards."""
        names, best, total = [name for name, _ in parts], 0, 0
        for at, (_, size) in enumerate(parts, 1):
            total += size
            prefix = tuple(names[:at])
            if prefix in self._known:
                best = total
            else:
                self._known.add(prefix)
                self.positions += size
                if names[at - 1].startswith("p"):
                    self.passages, self.of_passages = self.passages + 1, self.of_passages + size
        return best // BLOCK * BLOCK

"""Passages as whatever a rate policy chose for them: concepts of so many units each, or text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from compllm_rag.compression.rate_policies.budget import kept_at, least_price
from compllm_rag.compression.rate_policies.choosing import Choice, RateChooser
from compllm_rag.compression.rate_policies.policies import PricedRate
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.evaluation.bodies import Segmented
from compllm_rag.library import unpacked
from compllm_rag.prompt import ConceptSpan, Span, TextSpan

_KEPT = 256


class ChosenBodies:
    """Spans of passages as a chooser wants them; see `PassageBodies`.

    Args:
        compressor: Makes concepts.
        chooser: Chooses for each passage by its text alone.
        segmented: Shared by the settings of a run.
    """

    def __init__(self, compressor: ConceptCompressor, chooser: RateChooser, segmented: Segmented) -> None:
        self._compressor, self._chooser, self._segmented = compressor, chooser, segmented
        self._choices: dict[str, Choice] = {}
        self._made: dict[str, Span] = {}

    def choice(self, text: str) -> Choice:
        """What was chosen for a passage."""
        if text not in self._choices:
            self._choices[text] = self._chooser.choose(self._segmented(text))
        return self._choices[text]

    def size(self, text: str) -> int:
        """Prompt positions of a passage."""
        choice = self.choice(text)
        return sum(choice.n_concepts[0]) if choice.reason is None else self._segmented.n_tokens(text)

    def cost(self, text: str) -> float:
        """What a passage costs at prefill, in tokens of text."""
        n, choice = self._segmented.n_tokens(text), self.choice(text)
        if choice.reason is not None or not n:
            return float(n)
        return n * self._compressor.spec.prefill_cost(n / self.size(text))

    def prepare(self, texts: Iterable[str]) -> None:
        """Make what these passages need, in one call of the compressor."""
        wanted = dict.fromkeys(texts)
        missing = [text for text in wanted if text not in self._made]
        spare = len(self._made) + len(missing) - _KEPT
        for text in [text for text in self._made if text not in wanted][: max(0, spare)]:
            del self._made[text]
        pressed = [text for text in missing if self.choice(text).reason is None]
        for text in set(missing) - set(pressed):
            self._made[text] = TextSpan(tuple(token for unit in self._segmented(text) for token in unit))
        units = [unit for text in pressed for unit in self._segmented(text)]
        rows = iter(self._compressor.compress(units, [k for t in pressed for k in self.choice(t).n_concepts[0]]))
        for text in pressed:
            own = self._segmented(text)
            joined = torch.cat([next(rows) for _ in own])  # (n_concepts, width) of one text
            if self._compressor.config.deep:
                states, places = unpacked(joined, own, self.choice(text).n_concepts[0])
                self._made[text] = ConceptSpan(states, 0, places, sum(map(len, own)))
            else:
                self._made[text] = ConceptSpan(joined, 0)

    def spans(self, text: str, passage: int) -> list[Span]:
        """The spans of a passage that was prepared."""
        return [replace(self._made[text], passage=passage)]


def priced(policy: PricedRate, segmented: Segmented, texts: Sequence[str], share: float) -> float:
    """Give a policy the price at which different passages keep a share of their tokens together; gives the price."""
    units = [unit for text in dict.fromkeys(texts) for unit in segmented(text)]
    sizes = [len(unit) for unit in units]
    lost = policy.table(units)
    policy.price = least_price(lost, kept_at(sizes, policy.choices), int(share * sum(sizes)))
    return float(np.float64(policy.price))

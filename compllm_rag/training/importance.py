"""Which tokens are worth keeping: informative ones, and those that answers are made of.

Unigram information alone drops digits, which are frequent and carry dates and numbers. How much likelier a token is in
an answer than in the passage it stands in is counted from the training questions, with no model in it.
"""

from __future__ import annotations

import torch

from compllm_rag.training.material import Material

# Passages are taken to hold this many of every token, in the mean proportion, so that rare ones are not overrated.
_PRIOR = 20.0


def answer_odds(material: Material, vocabulary: int) -> torch.Tensor:
    """Log of how many times likelier each token is in an answer than in its passage.

    Args:
        material: Its questions are counted; answers that are not words of their passages do not count.
        vocabulary: Number of tokens.

    Returns:
        Tensor (vocabulary,) in nats; 0 for tokens that were not seen.
    """
    passages, answers = torch.zeros(vocabulary), torch.zeros(vocabulary)
    for group in material.groups:
        shown = [passage for passage in group.passages if passage.supporting]
        for passage in shown:
            _count(passages, list(material.body(passage.text).ids))
        joined = "\n".join(passage.text for passage in shown)
        for question in group.questions:
            if question.answers[0] in joined:
                _count(answers, material.prompt.template.plain(" " + question.answers[0]))
    if not float(answers.sum()):
        return torch.zeros(vocabulary)
    mean = answers.sum() / passages.sum()
    return torch.log((answers + _PRIOR * mean) / (passages + _PRIOR) / mean)


def _count(counts: torch.Tensor, ids: list[int]) -> None:
    if ids:
        counts.index_add_(0, torch.tensor(ids), torch.ones(len(ids)))

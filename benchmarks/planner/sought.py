"""Questions over four passages each that a retriever found, and the sentences there that say the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.planner.candidates import found
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.errors import ConfigurationError
from compllm_rag.evaluation.questions import Question
from compllm_rag.evaluation.runner import in_seeded_order
from compllm_rag.training.gold_sentences import Sought, chunked, saying, sought_in
from compllm_rag.training.material import Group


def sought(
    groups: Sequence[Group], segmenter: Segmenter, embedder: Any, *, limit: int, n_passages: int
) -> list[Sought]:
    """Questions that can be answered word by word from a sentence, one of each group before a second of any.

    The passages that say the answer are there in any case; the others are the nearest to the question among the
    passages of all groups. All stand in the retriever's order.

    Args:
        groups: Questions by the passages they share.
        segmenter: Cuts passages into chunks and these into sentences.
        embedder: The retriever's.
        limit: Questions at most.
        n_passages: Of each question.

    Raises:
        ConfigurationError: There is no such question.
    """
    chosen = list[tuple[int, Question]]()
    turns = [in_seeded_order(group.questions) for group in groups]
    for turn in range(max(map(len, turns), default=0)):
        for number in in_seeded_order(range(len(groups))):
            if turn < len(turns[number]) and len(chosen) < limit:
                question = chunked(turns[number][turn], segmenter)
                if 0 < len(saying(question)) <= n_passages:
                    chosen.append((number, question))
    if not chosen:
        raise ConfigurationError(
            "no question is answered by the words of a passage",
            got=f"{len(groups)} groups of questions",
            expected="questions whose answer stands in a passage they rest on",
            next_step="name other data",
        )
    questions = [question for _, question in chosen]
    pool = list(
        dict.fromkeys(p for group in groups for q in group.questions[:1] for p in chunked(q, segmenter).passages)
    )
    out = []
    # Every passage of the pool, in the retriever's order.
    for (group, question), order in zip(
        chosen, found(questions, [pool] * len(questions), embedder, len(pool)), strict=True
    ):
        own = saying(question)
        others = [pool[i] for i in order if pool[i] not in own][: n_passages - len(own)]
        one = sought_in(question, [pool[i] for i in order if pool[i] in own or pool[i] in others], segmenter, group)
        if one is not None:
            out.append(one)
    return out

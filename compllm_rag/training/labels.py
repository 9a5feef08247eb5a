"""Answers of the target LLM's own, made ahead of training and kept: the paper's label-free way (CompLLM, section 3).

For the compressor, the LLM's answers to the training questions with the passages as text; for the reader, its answers
to other prompts, before it was changed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from compllm_rag.config import GenerationConfig
from compllm_rag.evaluation.journal import Journal
from compllm_rag.evaluation.questions import Question
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import Message, PromptPlan, TextSpan
from compllm_rag.training.material import Group, Material, shown_of
from compllm_rag.training.run_config import Progress

_BATCH = 16
REQUESTS = (
    "Summarize this text in one sentence:",
    "Write a title for this text:",
    "List the names that occur in this text:",
    "Explain this text to a child:",
    "What is this text about?",
    "Rewrite this text in simpler words:",
    "Write one question that this text answers:",
    "Continue this text:",
)


def own_answers(
    llm: TargetLLM, groups: Sequence[Group], material: Material, path: Path, progress: Progress | None = None
) -> dict[Question, str]:
    """Greedy answers to the questions of some groups.

    Args:
        llm: The target, reader merged.
        groups: Whose questions are answered, with their supporting passages as text.
        material: Knows the prompt.
        path: A `Journal` of answers by LLM and prompt; what is there is not answered again, so the work can be
            interrupted.
        progress: Called with a message and the share that is done.
    """
    asked: list[Question] = []
    plans: list[PromptPlan] = []
    for group in groups:
        bodies = [(p.title, [TextSpan(material.body(p.text).ids, i)]) for i, p in enumerate(shown_of(group))]
        asked += group.questions
        plans += [material.prompt.plan(question.question, bodies) for question in group.questions]
    return dict(zip(asked, _answers(llm, plans, path, 24, progress), strict=True))


def own_instructions(
    llm: TargetLLM, material: Material, path: Path, *, number: int = 160, progress: Progress | None = None
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Other prompts over pieces of plain text with the LLM's own answers, as token ids.

    Args:
        llm: The LLM before it is changed.
        material: Whose texts are used.
        path: Keeps the answers, see `own_answers`.
        number: How many.
        progress: Called with a message and the share that is done.
    """
    rng = random.Random(0)
    plans: list[PromptPlan] = []
    for _ in range(number if material.texts else 0):
        text = rng.choice(material.texts)
        begin = rng.randrange(max(1, len(text) - 600))
        request = f"{rng.choice(REQUESTS)}\n\n{text[begin : begin + rng.randrange(150, 600)].strip()}"
        plans.append(PromptPlan(tuple(material.prompt.template.spans([Message("user", (request,))], []))))
    out = []
    for plan, told in zip(plans, _answers(llm, plans, path, 48, progress), strict=True):
        answer = material.prompt.template.plain(told)
        if answer:
            out.append((_ids(plan), tuple(answer)))
    return out


def _answers(
    llm: TargetLLM, plans: Sequence[PromptPlan], path: Path, limit: int, progress: Progress | None
) -> list[str]:
    """An answer to each prompt, from the journal where one is there that this LLM gave to that very prompt."""
    journal, generator = Journal(path), LocalGenerator(llm, GenerationConfig(max_new_tokens=limit))
    facts = [{"llm": llm.identity, "prompt": _ids(plan), "limit": limit} for plan in plans]
    missing = [index for index, each in enumerate(facts) if journal.get(each) is None]
    missing.sort(key=lambda index: plans[index].positions)
    for begin in range(0, len(missing), _BATCH):
        some = missing[begin : begin + _BATCH]
        for index, answer in zip(some, generator.generate([plans[index] for index in some]), strict=True):
            journal.put(facts[index], answer.text.strip())
        if progress:
            done = begin + len(some)
            progress(f"own answers: {done} of {len(missing)}", done / len(missing))
    return [str(journal.get(each)) for each in facts]


def _ids(plan: PromptPlan) -> tuple[int, ...]:
    return tuple(token for span in plan.spans if isinstance(span, TextSpan) for token in span.ids)

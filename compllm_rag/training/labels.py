"""Answers of the target LLM's own, made ahead of training and kept: the paper's label-free way (CompLLM, section 3).

For the compressor, the LLM's answers to the training questions with the passages as text; for the reader, its answers
to other prompts, before it was changed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from compllm_rag.config import GenerationConfig
from compllm_rag.evaluation.questions import read_rows
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import Message, PromptPlan, TextSpan
from compllm_rag.training.material import Group, Material
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
) -> dict[str, str]:
    """Greedy answers to the questions of some groups, by question id.

    Args:
        llm: The target, reader merged.
        groups: Whose questions are answered, with their supporting passages as text.
        material: Knows the prompt.
        path: JSON lines `{"id", "answer"}`; what is there is not answered again, so the work can be interrupted.
        progress: Called with a message and the share that is done.
    """
    known = {str(row["id"]): str(row["answer"]) for _, row in read_rows(path)} if path.exists() else {}
    todo: list[tuple[str, PromptPlan]] = []
    for group in groups:
        shown = [p for p in group.passages if p.supporting] or list(group.passages[:1])
        for question in group.questions:
            if question.id not in known:
                bodies = [(p.title, [TextSpan(material.body(p.text).ids, i)]) for i, p in enumerate(shown)]
                todo.append((question.id, material.prompt.plan(question.question, bodies)))
    return known | _answer(llm, todo, path, 24, progress)


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
    prompts: dict[str, PromptPlan] = {}
    for count in range(number if material.texts else 0):
        text = rng.choice(material.texts)
        begin = rng.randrange(max(1, len(text) - 600))
        request = f"{rng.choice(REQUESTS)}\n\n{text[begin : begin + rng.randrange(150, 600)].strip()}"
        prompts[str(count)] = PromptPlan(tuple(material.prompt.template.spans([Message("user", (request,))], [])))
    known = {str(row["id"]): str(row["answer"]) for _, row in read_rows(path)} if path.exists() else {}
    made = known | _answer(llm, [(k, p) for k, p in prompts.items() if k not in known], path, 48, progress)
    out = []
    for index, plan in prompts.items():
        answer = material.prompt.template.plain(made.get(index, ""))
        if answer:
            ids = tuple(token for span in plan.spans if isinstance(span, TextSpan) for token in span.ids)
            out.append((ids, tuple(answer)))
    return out


def _answer(
    llm: TargetLLM, todo: Sequence[tuple[str, PromptPlan]], path: Path, limit: int, progress: Progress | None
) -> dict[str, str]:
    generator = LocalGenerator(llm, GenerationConfig(max_new_tokens=limit))
    made: dict[str, str] = {}
    ordered = sorted(todo, key=lambda item: item[1].positions)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for begin in range(0, len(ordered), _BATCH):
            some = ordered[begin : begin + _BATCH]
            for (name, _), answer in zip(some, generator.generate([plan for _, plan in some]), strict=True):
                made[name] = answer.text.strip()
                file.write(json.dumps({"id": name, "answer": made[name]}) + "\n")
            file.flush()
            if progress:
                progress(f"own answers: {len(made)} of {len(ordered)}", len(made) / len(ordered))
    return made

"""KV pruning by NVIDIA's `kvpress`, at the KV size that a prompt with concepts has.

The prompt up to the question is prefilled whole and then pruned, so what it saves is memory and decoding, not TTFT.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.rivals.base import Outcome, Outside, Task
from benchmarks.rivals.folders import export
from benchmarks.rivals.process import Runner
from compllm_rag.evaluation.metrics import exact_match, f1, subspan_match
from compllm_rag.evaluation.questions import Question
from compllm_rag.evaluation.statistics import Record
from compllm_rag.generation.text import Detokenizer
from compllm_rag.prompt import QAPrompt, TextSpan

# Questions that are also asked with nothing removed: the runner must then score as text does here.
_CHECKED = 4


@dataclass(frozen=True)
class Group:
    """Questions that share the prompt in front of the question: its token ids, and the rest of each prompt."""

    prefix: tuple[int, ...]
    kept: int
    places: list[int] = field(default_factory=list)
    suffixes: list[tuple[int, ...]] = field(default_factory=list)


class KVPruning(Outside):
    """One press.

    Args:
        press: See `run_kvpress.PRESSES`.
        title: In tables.
        environments: See `Outside`.
        runner: See `Outside`.
    """

    def __init__(self, press: str, title: str, environments: Path | None, runner: tuple[str, ...] = ()) -> None:
        super().__init__(f"kvpress_{press}", title, "kvpress", environments, runner)
        self.press = press

    def prefill_cost(self, task: Task, achieved_rate: float | None) -> float | None:
        """All of the passage is prefilled; what is saved is memory."""
        return 1.0

    def settings(self) -> dict[str, Any]:
        """Press and pins."""
        return {"press": self.press, "pins": self.pins()}

    def ask(self, task: Task, rate: float) -> Outcome:
        """See `Baseline.ask`."""
        start = self.runner()
        prompt = QAPrompt(task.compressor.llm.tokenizer)
        groups = _groups(task, prompt, rate)
        records: dict[int, Record] = {}
        notes: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as scratch:
            folder = export(task.compressor.llm, Path(scratch) / "target")
            dtype = str(task.compressor.llm.dtype).removeprefix("torch.")
            with Runner([*start, "--model", str(folder), "--dtype", dtype]) as runner:
                notes["versions"] = runner.versions
                notes["check"] = _check(runner, task, prompt, groups)
                begun = time.perf_counter()
                for number, group in enumerate(groups, 1):
                    reply = runner.ask(**_request(task, prompt, group, self.press))
                    for place, suffix, found in zip(group.places, group.suffixes, reply["answers"], strict=True):
                        records[place] = _record(task, prompt, task.questions[place], group, suffix, found, rate)
                    if number % 10 == 0:
                        task.progress(f"{self.name}: {number} of {len(groups)} prompts")
                notes["seconds"] = time.perf_counter() - begun
        whole = sum(len(group.prefix) + len(s) for group in groups for s in group.suffixes) / len(task.questions)
        return Outcome([records[i] for i in range(len(task.questions))], whole, None, notes)


def _groups(task: Task, prompt: QAPrompt, rate: float) -> list[Group]:
    """Prompts cut in front of the question, those with the same passages together.

    As much of the text prompt is kept as stands in front of the question where passages are concepts.
    """
    groups: dict[tuple[int, ...], Group] = {}
    for place, question in enumerate(task.questions):
        bodies = [
            (p.title, [TextSpan(tuple(t for s in task.segmented(p.text) for t in s), i)])
            for i, p in enumerate(question.passages)
        ]
        *before, last = prompt.plan(question.question, bodies).spans
        prefix = tuple(t for span in before if isinstance(span, TextSpan) for t in span.ids)
        saved = sum(
            len(body) - task.budget(p.text, rate) for p, (_, [body]) in zip(question.passages, bodies, strict=True)
        )
        group = groups.setdefault(prefix, Group(prefix, len(prefix) - saved))
        group.places.append(place)
        group.suffixes.append(last.ids if isinstance(last, TextSpan) else ())
    return list(groups.values())


def _target(task: Task, prompt: QAPrompt, question: Question) -> tuple[int, ...]:
    return (*prompt.template.plain(question.answers[0]), int(task.compressor.llm.tokenizer.eos_token_id))


def _request(task: Task, prompt: QAPrompt, group: Group, press: str | None) -> dict[str, Any]:
    golds = [_target(task, prompt, task.questions[place]) for place in group.places]
    return {
        "press": press if group.kept < len(group.prefix) else None,
        "prefix": group.prefix,
        "kept": group.kept if press else len(group.prefix),
        "questions": [{"suffix": s, "gold": g} for s, g in zip(group.suffixes, golds, strict=True)],
        "max_new_tokens": task.generation.max_new_tokens,
        "stop": sorted(task.compressor.llm.stop_ids()),
    }


def _check(runner: Runner, task: Task, prompt: QAPrompt, groups: list[Group]) -> dict[str, float]:
    """Nats per gold token of the first questions, nothing removed, there and here."""
    from compllm_rag.evaluation.scoring import ScoringGenerator
    from compllm_rag.prompt import PromptPlan

    generator = ScoringGenerator(task.compressor.llm, task.generation)
    here = there = 0.0
    tokens = 0
    for group in groups[:_CHECKED]:
        first = Group(group.prefix, len(group.prefix), group.places[:1], group.suffixes[:1])
        gold = _target(task, prompt, task.questions[first.places[0]])
        there -= runner.ask(**_request(task, prompt, first, None))["answers"][0]["log_likelihood"]
        plan = PromptPlan((TextSpan((*first.prefix, *first.suffixes[0])),))
        here -= generator.run([plan], answer=False)[1].log_likelihoods([gold])[0]
        tokens += len(gold)
    return {"nll_here": here / tokens, "nll_there": there / tokens}


def _record(
    task: Task,
    prompt: QAPrompt,
    question: Question,
    group: Group,
    suffix: tuple[int, ...],
    found: dict[str, Any],
    rate: float,
) -> Record:
    decoder = Detokenizer(task.compressor.llm.tokenizer)
    for token in found["ids"]:
        decoder.push(token)
    decoder.finish()
    gold, texts = _target(task, prompt, question), [passage.text for passage in question.passages]
    return Record(
        id=question.id,
        question=question.question,
        golds=question.answers,
        answer=decoder.text,
        em=exact_match(decoder.text, question.answers),
        f1=f1(decoder.text, question.answers),
        subspan_em=subspan_match(decoder.text, question.answers),
        option=None,
        correct=None,
        nll=-found["log_likelihood"] / len(gold),
        n_tokens=len(gold),
        positions=group.kept + len(suffix),
        source_tokens=sum(map(task.segmented.n_tokens, texts)),
        concepts=sum(task.budget(text, rate) for text in texts),
    )

"""The evaluation: the same questions with passages as text, as concepts, pruned, or without any.

Whatever is measured is compared with text and with no passages on the same questions (docs/design.md
section 7), so these two are run once and serve every setting.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

from compllm_rag import __version__
from compllm_rag.compression.rate_policies.shares import shares_identity
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import GenerationConfig, Narrowing
from compllm_rag.errors import ConfigurationError, PromptTooLongError
from compllm_rag.evaluation.asking import Asker
from compllm_rag.evaluation.bodies import Segmented, Setting
from compllm_rag.evaluation.journal import Journal
from compllm_rag.evaluation.questions import Question, QuestionFile
from compllm_rag.evaluation.read_policies import QuestionBodies
from compllm_rag.evaluation.results import METRICS, EvalConfig, EvalResult
from compllm_rag.evaluation.statistics import Record, statistics
from compllm_rag.generation.base import Generator
from compllm_rag.reading.budgeted import BudgetedReadPolicy
from compllm_rag.reading.choice import ReadPolicy

T = TypeVar("T")
Progress = Callable[[str, float | None], None]
TEXT, NONE = Setting("text"), Setting("none")


def evaluate(
    compressor: ConceptCompressor,
    questions: Sequence[Question] | QuestionFile,
    *,
    mode: str = "concepts",
    rate: float | None = 2.0,
    config: EvalConfig | None = None,
    data: str = "",
    progress: Progress | None = None,
    journal: Journal | None = None,
    generator: Generator | None = None,
    read_policy: ReadPolicy | None = None,
    narrowing: Narrowing | None = None,
) -> EvalResult:
    """Ask questions in one setting, and in text and none for comparison.

    Args:
        compressor: With its target LLM.
        questions: As `read_questions` gives them.
        mode: `text`, `concepts`, `random`, `pruned`, `budgeted` or `none`; see `Setting`.
        rate: Source tokens per concept; text and none have none. `budgeted` may spend what concepts at this rate take.
        config: Which questions, and how they are asked.
        data: Where they came from; goes into the result.
        progress: Called with a message and a share from 0 to 1.
        journal: Keeps settings that are done; those that are there for the same compressor, questions and way of
            asking are not asked again.
        generator: Makes the answers; it must run the compressor's LLM. None runs it in this process.
        read_policy: What `budgeted` asks; None is a `BudgetedReadPolicy`.
        narrowing: From which layer on the LLM reads but a share of a prompt's deep concepts.

    Raises:
        ConfigurationError: Unknown mode, no question left, or nothing that can be narrowed.
        RateOutOfReachError: The compressor's segments are too short for the rate.
        PromptTooLongError: No question fits the window of the LLM.
    """
    return evaluate_many(
        compressor,
        questions,
        [Setting.of(mode, rate, narrowing=narrowing)],
        config=config,
        data=data,
        progress=progress,
        journal=journal,
        generator=generator,
        read_policy=read_policy,
    )[0]


def evaluate_many(
    compressor: ConceptCompressor,
    questions: Sequence[Question] | QuestionFile,
    settings: Sequence[Setting | tuple[str, float | None] | tuple[str, float | None, str]],
    *,
    config: EvalConfig | None = None,
    data: str = "",
    progress: Progress | None = None,
    journal: Journal | None = None,
    generator: Generator | None = None,
    read_policy: ReadPolicy | None = None,
) -> list[EvalResult]:
    """Ask the same questions in several settings; text and none are run once.

    Args:
        compressor: See `evaluate`.
        questions: See `evaluate`.
        settings: Each, or its mode and rate, and if wanted the encoding that concepts go through.
        config: See `evaluate`.
        data: See `evaluate`.
        progress: See `evaluate`.
        journal: See `evaluate`.
        generator: See `evaluate`.
        read_policy: See `evaluate`.

    Returns:
        One result per setting, in their order.

    Raises:
        ConfigurationError, RateOutOfReachError, PromptTooLongError: See `evaluate`.
    """
    config = config or EvalConfig()
    asked = [setting if isinstance(setting, Setting) else Setting.of(*setting) for setting in settings]
    segmented = Segmented(compressor)
    halves = compressor.halves.merged() if compressor.halves else None
    askers = {
        setting: Asker(
            compressor,
            setting,
            segmented,
            GenerationConfig(max_new_tokens=config.max_new_tokens),
            halves=halves,
            generator=generator,
            bodies=QuestionBodies(compressor, rate=setting.rate, policy=read_policy, narrowing=setting.narrowing)
            if setting.mode == "budgeted"
            else None,
        )
        for setting in dict.fromkeys([TEXT, NONE, *asked])
    }
    chosen, skipped = _choose(questions, config, askers[TEXT])
    journal = journal or Journal()
    run = {
        "version": __version__,
        "compressor": compressor.fingerprint,
        "dtype": str(compressor.llm.dtype),
        **({} if generator is None else {"generator": generator.name}),
        "asked": config.model_dump(include={"batch_size", "max_new_tokens"}),
        "questions": _digest(chosen),
    }
    runs: dict[Setting, tuple[list[Record], float]] = {}
    for setting, asker in askers.items():
        answer = config.generate and (setting in asked or setting == TEXT)
        what = run | {"setting": _named(setting), "answer": answer}
        if setting.mode == "budgeted":
            what["read_policy"] = repr(read_policy or BudgetedReadPolicy())
            what |= shares_identity(compressor.losses, compressor.fingerprint)
        known = journal.get(what)
        if known is not None:
            runs[setting] = [Record.from_dict(record) for record in known["records"]], known["seconds"]
            continue
        show = _share(progress, f"{setting}: {len(chosen)} questions", len(chosen))
        begun = time.perf_counter()
        records = asker.ask(chosen, batch_size=config.batch_size, answer=answer, progress=show)
        runs[setting] = records, time.perf_counter() - begun
        journal.put(what, {"records": [record.to_dict() for record in records], "seconds": runs[setting][1]})
    made = []
    for setting in asked:
        records, seconds = runs[setting]
        found = statistics(records, runs[TEXT][0], runs[NONE][0], seed=config.seed)
        values = found.values
        made.append(
            EvalResult(
                data=data,
                mode=setting.mode,
                rate=setting.rate,
                narrowing=None if setting.narrowing is None else str(setting.narrowing),
                llm=compressor.llm.source,
                seed=config.seed,
                n=len(records),
                **{name: values[name] for name in METRICS},
                positions=values["positions"] or 0.0,
                achieved_rate=values["achieved_rate"],
                prefill_cost=_prefill_cost(compressor, setting, values["achieved_rate"], records),
                intervals={name: found.intervals[name] for name in METRICS},
                paired=found.paired,
                skipped=tuple(skipped),
                seconds=seconds,
                records=tuple(records),
            )
        )
    return made


def _prefill_cost(
    compressor: ConceptCompressor, setting: Setting, achieved_rate: float | None, records: Sequence[Record]
) -> float | None:
    """What a token of a passage costs at prefill, text = 1; pruned tokens pass all layers."""
    if setting.mode == "none":
        return None
    if setting.mode == "budgeted":
        return sum(record.cost or 0.0 for record in records) / max(1, sum(record.source_tokens for record in records))
    if achieved_rate is None:
        return 1.0
    if setting.mode not in ("concepts", "random"):
        return 1 / achieved_rate
    return compressor.spec.prefill_cost(achieved_rate, setting.narrowing)


def _named(setting: Setting) -> dict[str, Any]:
    """A setting as a journal keeps it; what came later is not named while it is off, so that older ones still fit."""
    made = asdict(replace(setting, narrowing=None))
    del made["narrowing"]
    return made if setting.narrowing is None else made | {"narrowing": str(setting.narrowing)}


def in_seeded_order(questions: Sequence[T], *, seed: int = 0, limit: int | None = None) -> list[T]:
    """Questions, or what stands for them, in the order of a seed, the first `limit` of them."""
    order = list(questions)
    random.Random(seed).shuffle(order)  # noqa: S311 - an order, no secret
    return order[:limit]


def _choose(
    questions: Sequence[Question] | QuestionFile, config: EvalConfig, asker: Asker
) -> tuple[list[Question], list[tuple[str, str]]]:
    """The questions to ask, and who was left out and why.

    Whether a question fits the window is decided by its text prompt, the longest: all settings ask the same questions.
    """
    skipped = list(questions.skipped) if isinstance(questions, QuestionFile) else []
    given = questions.questions if isinstance(questions, QuestionFile) else questions
    chosen, window, too_long = [], asker.window, 0
    for question in in_seeded_order(given, seed=config.seed, limit=config.limit):
        if config.passages == "gold":
            question = replace(question, passages=tuple(p for p in question.passages if p.supporting))
            if not question.passages:
                skipped.append((question.id, "no supporting passage"))
                continue
        needed = asker.room(question)
        if needed > window:
            skipped.append((question.id, f"needs {needed} positions of {window}"))
            too_long += 1
        else:
            chosen.append(question)
    if chosen:
        return chosen, skipped
    error = PromptTooLongError if too_long else ConfigurationError
    raise error(
        "no question left to ask",
        got=f"{len(given)} questions" + (f", {skipped[-1][0]} {skipped[-1][1]}" if skipped else ""),
        expected=f"at least one that fits {window} positions",
        next_step="use other questions, fewer passages or an LLM with a longer window",
    )


def _digest(questions: Sequence[Question]) -> str:
    held: list[dict[str, Any]] = [asdict(question) for question in questions]
    return hashlib.sha256(json.dumps(held, default=str).encode()).hexdigest()


def _share(progress: Progress | None, message: str, total: int) -> Callable[[int], None]:
    def show(done: int) -> None:
        if progress is not None:
            progress(message, done / total)

    show(0)
    return show

"""Asking questions in one setting: prompts, batches, answers, likelihoods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import GenerationConfig
from compllm_rag.errors import ConfigurationError
from compllm_rag.evaluation.bodies import COMPRESSED, Bodies, PassageBodies, Segmented, Setting
from compllm_rag.evaluation.metrics import exact_match, f1, subspan_match
from compllm_rag.evaluation.questions import Question
from compllm_rag.evaluation.read_policies import QuestionBodies
from compllm_rag.evaluation.scoring import PrefilledParts, ScoringGenerator
from compllm_rag.evaluation.statistics import Record
from compllm_rag.generation.base import Generator
from compllm_rag.generation.local import kind_of
from compllm_rag.models.halves import Halves
from compllm_rag.prompt import ConceptSpan, PromptPlan, QAPrompt

# Prompt positions of one batch: 16 prompts of a long SQuAD paragraph; the embedded LLM caches them in under 1 GiB.
BATCH_POSITIONS = {"cpu": 16384, "cuda": 131072}


class Asker:
    """Asks questions in one setting.

    Args:
        compressor: With its target LLM.
        setting: How passages are read.
        segmented: Shared by the settings of a run.
        generation: Limits of an answer.
        bodies: What stands for passages in place of what the setting says, such as a rival's or a read policy's; its
            positions are counted as those of concepts are. None follows the setting.
        prompt: Lays out passages and question; None takes the default prompt.
        halves: Those of the compressor, merged already, so that several settings share them; None merges them here.
        generator: Makes the answers; it must run the same LLM. Likelihoods are taken in this process all the same: by a
            `ScoringGenerator` that is given, else by one of its own.

    Raises:
        ConfigurationError, RateOutOfReachError: The rate cannot be kept, or there are no deep concepts to narrow.
    """

    def __init__(
        self,
        compressor: ConceptCompressor,
        setting: Setting,
        segmented: Segmented,
        generation: GenerationConfig,
        bodies: PassageBodies | None = None,
        prompt: QAPrompt | None = None,
        halves: Halves | None = None,
        generator: Generator | None = None,
    ) -> None:
        if setting.narrowing is not None and compressor.halves is None:
            raise ConfigurationError(
                "only deep concepts can be narrowed",
                got=f"{setting} and concepts at the input embeddings",
                expected="a compressor of deep concepts",
                next_step="leave narrowing out",
            )
        self._llm, self._setting, self._segmented = compressor.llm, setting, segmented
        self._generator = (
            generator
            if isinstance(generator, ScoringGenerator)
            else ScoringGenerator(compressor.llm, generation, halves=halves or compressor.halves)
        )
        self._answers = generator or self._generator
        self._prompt = prompt or QAPrompt(compressor.llm.tokenizer)
        self._counted = bodies is not None or setting.mode in COMPRESSED
        if bodies is None and setting.mode == "budgeted":
            bodies = QuestionBodies(compressor, rate=setting.rate, prompt=self._prompt, narrowing=setting.narrowing)
        self._bodies: PassageBodies = bodies or Bodies(compressor, setting, segmented)
        self._concept_cost = compressor.spec.prefill_cost(1.0, setting.narrowing)
        self._end = int(compressor.llm.tokenizer.eos_token_id)

    @property
    def window(self) -> int:
        """Positions a prompt and what follows it may take together."""
        return self._generator.window

    def room(self, question: Question) -> int:
        """Positions that asking a question takes: its prompt, and the longest answer that follows it."""
        texts = self._texts(question)
        self._bodies.prepare(texts)
        longest = max(map(len, [self._target(question.answers[0]), *map(self._target, question.options)]))
        return self._plan(question).positions + max(self._generator.config.max_new_tokens, longest)

    def ask(
        self, questions: Sequence[Question], *, batch_size: int, answer: bool, progress: Callable[[int], None]
    ) -> list[Record]:
        """Ask questions, those of like length and of one passage together.

        Args:
            questions: That fit the window.
            batch_size: Most questions of one batch.
            answer: Also generate an answer; likelihoods are always taken.
            progress: Called with the number of questions done.

        Returns:
            One record per question, in the order given.
        """
        records: dict[int, Record] = {}
        order = sorted(range(len(questions)), key=lambda i: self._length(questions[i]))
        for begin in range(0, len(order), batch_size):
            indices = order[begin : begin + batch_size]
            self._bodies.prepare(text for i in indices for text in self._texts(questions[i]))
            plans = [(i, self._plan(questions[i])) for i in indices]
            limit = BATCH_POSITIONS["cpu" if self._llm.device.type == "cpu" else "cuda"]
            # A read policy may choose text alone for one question and concepts for the next: these are read apart.
            found = dict.fromkeys(kind_of(plan) for _, plan in plans)
            kinds = [[(i, plan) for i, plan in plans if kind_of(plan) == kind] for kind in found]
            for batch in (batch for kind in kinds for batch in _cut(kind, limit)):
                asked = [questions[i] for i, _ in batch]
                made = self._batch(asked, [plan for _, plan in batch], answer=answer)
                records |= {i: record for (i, _), record in zip(batch, made, strict=True)}
            progress(len(records))
        return [records[i] for i in range(len(questions))]

    def _batch(self, questions: list[Question], plans: list[PromptPlan], *, answer: bool) -> list[Record]:
        own = self._answers is self._generator
        answers, prefilled = self._generator.run(plans, answer=answer and own)
        if answer and not own:
            answers = [made.text for made in self._answers.generate(plans, self._generator.config)]
        golds = [self._target(question.answers[0]) for question in questions]
        likelihoods = prefilled.log_likelihoods(golds)
        options = self._options(questions, prefilled)
        rows = zip(questions, plans, answers, golds, likelihoods, options, strict=True)
        return [self._record(q, p, a, -total / len(g), len(g), o) for q, p, a, g, total, o in rows]

    def _options(self, questions: list[Question], prefilled: PrefilledParts) -> list[int | None]:
        """The option whose tokens, with the end token, are likeliest on average; of equals the first."""
        best: list[tuple[float, int] | None] = [None] * len(questions)
        for place in range(max(len(question.options) for question in questions)):
            # Questions that have no such option score their end token, which nobody looks at.
            targets = [self._target(q.options[place]) if place < len(q.options) else (self._end,) for q in questions]
            found = prefilled.log_likelihoods(targets)
            for row, (question, target, total) in enumerate(zip(questions, targets, found, strict=True)):
                known, mean = best[row], total / len(target)
                if place < len(question.options) and (known is None or mean > known[0]):
                    best[row] = mean, place
        return [None if found is None else found[1] for found in best]

    def _record(
        self, question: Question, plan: PromptPlan, answer: str | None, nll: float, n_tokens: int, option: int | None
    ) -> Record:
        golds, texts = question.answers, self._texts(question)
        return Record(
            id=question.id,
            question=question.question,
            golds=golds,
            answer=answer,
            em=None if answer is None else exact_match(answer, golds),
            f1=None if answer is None else f1(answer, golds),
            subspan_em=None if answer is None else subspan_match(answer, golds),
            option=option,
            correct=None if option is None else option == question.answer_index,
            nll=nll,
            n_tokens=n_tokens,
            positions=plan.positions,
            source_tokens=sum(map(self._segmented.n_tokens, texts)),
            concepts=self._positions(plan, texts) if self._counted else None,
            cost=sum(
                len(span) * (self._concept_cost if isinstance(span, ConceptSpan) else 1.0)
                for span in plan.spans
                if span.passage is not None or isinstance(span, ConceptSpan)
            ),
        )

    def _positions(self, plan: PromptPlan, texts: Sequence[str]) -> int:
        """Positions that stand for the text of the passages."""
        if isinstance(self._bodies, QuestionBodies):
            return sum(end - start for _, start, end in plan.passages)
        return sum(map(self._bodies.size, texts))

    def _target(self, answer: str) -> tuple[int, ...]:
        """Token ids of an answer and of the end of the turn."""
        return (*self._prompt.template.plain(answer), self._end)

    def _texts(self, question: Question) -> list[str]:
        return [] if self._setting.mode == "none" else [passage.text for passage in question.passages]

    def _plan(self, question: Question) -> PromptPlan:
        if isinstance(self._bodies, QuestionBodies):
            made = self._prompt.plan(question.question, self._bodies.read(question))
        else:
            shown = () if self._setting.mode == "none" else question.passages
            bodies = [(passage.title, self._bodies.spans(passage.text, i)) for i, passage in enumerate(shown)]
            made = self._prompt.plan(question.question, bodies)
        return replace(made, narrowing=self._setting.narrowing) if made.deep else made

    def _length(self, question: Question) -> tuple[int, list[str], int]:
        texts = self._texts(question)
        return sum(map(self._bodies.size, texts)), texts, len(question.question)


def _cut(plans: Sequence[tuple[int, PromptPlan]], limit: int) -> Iterator[Sequence[tuple[int, PromptPlan]]]:
    """Halves of a batch until each takes at most `limit` positions, padding counted, or is a single prompt."""
    if len(plans) > 1 and len(plans) * max(plan.positions for _, plan in plans) > limit:
        middle = len(plans) // 2
        yield from _cut(plans[:middle], limit)
        yield from _cut(plans[middle:], limit)
    else:
        yield plans

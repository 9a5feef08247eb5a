"""Where training examples come from: questions, and plain texts to copy and to continue.

Example number i of step s is drawn by a random generator seeded with (seed, s, i), so a run that was interrupted goes
on with the very examples it would have seen.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from compllm_rag.compression.segmentation import Segmenter, units_of
from compllm_rag.errors import DataFileError
from compllm_rag.evaluation.questions import Question, SourcePassage, read_questions, read_rows
from compllm_rag.prompt import QUESTION, QAPrompt, TextSpan
from compllm_rag.training.evaluation_guard import refuse_evaluation, without_evaluation
from compllm_rag.training.examples import Body, Branch, Example
from compllm_rag.training.job_options import MaterialConfig

_HELD_OUT = 40  # one group of passages in this many is never trained on
COPY = "Repeat the passage word for word."
_REMEMBERED = 20_000
_DISTRACTORS = 3  # that a question gets at least, before it is cut down to what fits


@dataclass(frozen=True)
class Group:
    """Questions that share their passages."""

    passages: tuple[SourcePassage, ...]
    questions: tuple[Question, ...]


class Material:
    """Training examples from files of questions and of texts.

    Args:
        question_files: See `compllm_rag.evaluation.questions.read_questions`.
        text_files: JSON lines with "text".
        segmenter: Cuts passages as ingestion does.
        config: The mix.
        answers: By question, answers of the target LLM's own (the paper's label-free way) in place of gold ones.
        unit_length: Cut passages into units of deep concepts, of at most so many tokens; None: into segments.
        window: Positions of the LLM; questions whose own passages are longer are left out.

    Attributes:
        held_out: Groups that are never drawn: about one in 40, by title, and at least one where there are several.
        skipped: Rows left out, each with its reason.

    Raises:
        EvaluationDataError: A file is one kept for evaluation, by its name or by what is in it.
        DataFileError: A file cannot be read, or there is nothing to train on.
    """

    def __init__(
        self,
        question_files: Sequence[Path],
        text_files: Sequence[Path],
        segmenter: Segmenter,
        config: MaterialConfig | None = None,
        *,
        answers: dict[Question, str] | None = None,
        unit_length: int | None = None,
        window: int | None = None,
    ) -> None:
        self.config, self.segmenter, self.answers = config or MaterialConfig(), segmenter, answers or {}
        self._unit_length = unit_length
        self.prompt = QAPrompt(segmenter.tokenizer)
        self.skipped: list[tuple[str, str]] = []
        self.files = [*question_files, *text_files]
        for path in self.files:
            refuse_evaluation(path)
        groups: list[Group] = []
        for path in question_files:
            found = read_questions(path)
            self.skipped += [(f"{path.name}: {name}", why) for name, why in found.skipped]
            kept, refused = without_evaluation(found.questions, path)
            self.skipped += [(f"{path.name}: {name}", "in an evaluation set") for name in refused]
            for passages, asked in groupby(kept, key=lambda question: question.passages):
                group = Group(passages, tuple(asked))
                if window is not None and (length := self._least(group, window)) > window:
                    why = f"passages of {length} tokens, beyond the LLM's window of {window}"
                    self.skipped += [(f"{path.name}: {question.id}", why) for question in group.questions]
                else:
                    groups.append(group)
        texts = [
            (f"{path.name}/{row.get('id', n)}", str(row["text"]))
            for path in text_files
            for n, row in read_rows(path)
            if len(str(row.get("text", ""))) > 200
        ]
        kept_out = _held_out_names([_name(group) for group in groups])
        self.groups = [group for group in groups if _name(group) not in kept_out]
        self.held_out = [group for group in groups if _name(group) in kept_out]
        self.texts = [text for name, text in texts if not is_held_out(name)]
        if not self.groups and not self.texts:
            raise DataFileError(
                "nothing to train on",
                got=f"{len(self.files)} files, {len(self.skipped)} rows left out",
                expected="questions with passages, or texts of more than 200 characters",
                next_step="name a folder with --data-dir, files with --questions and --texts, or datasets with --hub",
            )
        self.eos = (int(segmenter.tokenizer.eos_token_id),)
        # A passage with more questions teaches more at the same cost.
        self._group_weights = [min(len(group.questions), self.config.max_branches) for group in self.groups]
        # The longer a text, the more often a window of it.
        self._text_weights = [len(text) for text in self.texts]
        self._bodies: dict[str, Body] = {}
        self._by_title: dict[str, list[Group]] = {}
        for group in self.groups:
            if group.passages[0].title:
                self._by_title.setdefault(group.passages[0].title, []).append(group)

    @staticmethod
    def files_of(folder: Path) -> tuple[list[Path], list[Path]]:
        """All of `folder/train` as questions and all of `folder/text` as texts.

        Raises:
            DataFileError: There is nothing.
        """
        questions = sorted((folder / "train").glob("*.jsonl*"))
        texts = sorted((folder / "text").glob("*.jsonl*"))
        if not questions and not texts:
            raise DataFileError(
                "data folder is empty",
                got=str(folder),
                expected="train/*.jsonl(.gz) with questions, text/*.jsonl(.gz) with texts",
                next_step="check --data-dir",
            )
        return questions, texts

    def looked_at(self, number: int) -> list[Example]:
        """What a run looks at to tell which of its weights are best: held-out questions with their own passages.

        Args:
            number: Most groups. Of a single document nothing can be held out; its questions are looked at then.

        Raises:
            DataFileError: There are no questions: by texts alone no weights would be better than others.
        """
        groups = self.held_out or self.groups[:number]
        if not groups:
            raise DataFileError(
                "nothing to judge a run by",
                got=f"{len(self.texts)} texts, and no questions",
                expected="questions with passages, beside texts",
                next_step="name some with --questions, --data-dir or --hub",
            )
        rng = random.Random(0)
        return [self.questions(g, rng, 0, extras=False) for g in rng.sample(groups, min(number, len(groups)))]

    def _least(self, group: Group, window: int) -> int:
        """Tokens that every example of a group has; not counted where there are surely few enough."""
        shown = shown_of(group)
        characters = sum(len(p.title) + len(p.text) for p in shown)
        return characters if characters <= window else sum(len(self.segmenter.tokenize(p.text).ids) for p in shown)

    def draw(self, rng: random.Random) -> Example:
        """One training example."""
        budget = round(math.exp(rng.uniform(math.log(20), math.log(self.config.max_context))))
        if self.groups and (not self.texts or rng.random() < self.config.qa):
            group = self.draw_group(rng)
            return self.questions(group, rng, self.config.max_context if self.config.max_passages else max(budget, 60))
        return self.window(rng, budget)

    def draw_group(self, rng: random.Random) -> Group:
        """One group of questions, the more of them it has the more often."""
        return rng.choices(self.groups, self._group_weights)[0]

    def questions(self, group: Group, rng: random.Random, budget: int, *, extras: bool = True) -> Example:
        """Passages with their questions.

        Args:
            group: Which.
            rng: Decides order, distractors and the questions asked.
            budget: Source tokens, all in all, up to which distractors may come along.
            extras: Whether distractors and a copying branch may come along.
        """
        shown = shown_of(group)
        others = [p for p in group.passages if not p.supporting]
        if extras and not others and rng.random() < self.config.distractors:
            others = self._distractors(group, rng)
        used = sum(len(self.body(p.text)) for p in shown)
        rng.shuffle(others)
        if extras and self.config.max_passages is not None:
            spare = self.config.max_passages - len(shown)
            others = others[: rng.randint(1, spare)] if spare > 0 else []
        for passage in others if extras else ():
            used += len(self.body(passage.text))
            if used > budget:
                break
            shown.append(passage)
        rng.shuffle(shown)
        asked = rng.sample(group.questions, min(len(group.questions), self.config.max_branches))
        branches = [self._ask(question) for question in asked]
        if extras and len(shown) == 1 and rng.random() < self.config.copy_share:
            branches.append(self._copy(self.body(shown[0].text)))
        return self._example([(p.title, self.body(p.text)) for p in shown], branches)

    def _distractors(self, group: Group, rng: random.Random) -> list[SourcePassage]:
        """Up to as many passages of other groups as a prompt has room for; some of the same document."""
        number = _DISTRACTORS if self.config.max_passages is None else max(_DISTRACTORS, self.config.max_passages - 1)
        same = self._by_title.get(group.passages[0].title, []) if self.config.near else []
        found = [
            rng.choice(rng.choice(same if same and rng.random() < self.config.near else self.groups).passages)
            for _ in range(number)
        ]
        return [p for p in dict.fromkeys(found) if p not in group.passages]

    def body(self, text: str) -> Body:
        """A text cut into segments; remembered."""
        if text not in self._bodies:
            if len(self._bodies) >= _REMEMBERED:
                self._bodies.clear()
            self._bodies[text] = Body(tuple(map(tuple, self._cut(text))))
        return self._bodies[text]

    def _cut(self, text: str) -> list[list[int]]:
        if self._unit_length is None:
            return self.segmenter.split(text)
        return units_of(self.segmenter.tokenize(text), self._unit_length)

    def _ask(self, question: Question) -> Branch:
        answer = self.answers.get(question, question.answers[0])
        prompt = self.prompt.suffix(QUESTION + question.question).ids
        return Branch(prompt, (*self.prompt.template.plain(answer), *self.eos), "qa")

    def _copy(self, body: Body) -> Branch:
        prompt, ids = self.prompt.suffix(COPY).ids, body.ids
        whole = len(ids) <= self.config.copy_length
        return Branch(prompt, (*ids[: self.config.copy_length], *(self.eos if whole else ())), "copy")

    def window(self, rng: random.Random, budget: int) -> Example:
        """A run of segments of up to `budget` tokens from a plain text, to be copied, to be continued, or both."""
        text = rng.choices(self.texts, self._text_weights)[0]
        # About 5 characters a token; room for the continuation and for a first sentence that is thrown away.
        span = (budget + self.config.continue_length + 30) * 7
        begin = rng.randrange(max(1, len(text) - span))
        piece = text[begin : begin + span]
        if begin:
            piece = piece[max(0, piece.find(" ")) :].lstrip()
        segments = self._cut(piece if piece.strip() else text[:span])
        kept: list[tuple[int, ...]] = []
        for segment in segments:
            if kept and sum(map(len, kept)) + len(segment) > budget:
                break
            kept.append(tuple(segment))
        body = Body(tuple(kept))
        rest = tuple(token for segment in segments[len(kept) :] for token in segment)[: self.config.continue_length]
        branches = [self._copy(body)]
        if len(rest) >= 8:
            # Nothing between the passage and what follows it: the LLM goes on reading.
            *prefix, _ = self.prompt.prefix([("", [body])])
            going_on = Example(tuple(prefix), (Branch((), rest, "continue"),))
            if rng.random() < 0.5:
                return going_on
        return self._example([("", body)], branches)

    def _example(self, passages: Sequence[tuple[str, Body]], branches: Sequence[Branch]) -> Example:
        prefix: list[TextSpan | Body] = self.prompt.prefix([(title, [body]) for title, body in passages])
        return Example(tuple(prefix), tuple(branches))


def shown_of(group: Group) -> list[SourcePassage]:
    """The passages of a group that every example of it shows."""
    return [p for p in group.passages if p.supporting] or list(group.passages[:1])


def _name(group: Group) -> str:
    return group.passages[0].title or group.passages[0].text


def _held_out_names(names: Sequence[str]) -> set[str]:
    """Names of groups that are kept out of training; of several at least one, the same one each time."""
    found = {name for name in names if is_held_out(name)}
    if not found and len(set(names)) > 1:
        found = {min(names, key=lambda name: (hashlib.sha256(name.encode()).digest(), name))}
    return found


def is_held_out(name: str) -> bool:
    """Whether a group of questions (by title) or a text (by `FILE/ID`) is kept out of training; one in 40 is."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % _HELD_OUT == 0

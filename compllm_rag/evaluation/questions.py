"""Questions over passages: rows of a data file, as evaluation and training read them."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compllm_rag.errors import DataFileError


@dataclass(frozen=True)
class SourcePassage:
    """A passage as it comes in a data file; `supporting` is False for a distractor."""

    title: str
    text: str
    supporting: bool = True


@dataclass(frozen=True)
class Question:
    """One question over passages.

    Attributes:
        id: Of the row; made up from the row's number where it has none.
        passages: In the order in which they are shown.
        question: What is asked.
        answers: Gold answers, best first; never empty.
        options: Choices, empty where there are none.
        answer_index: Which option is right, None where there are no options.
    """

    id: str
    passages: tuple[SourcePassage, ...]
    question: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    answer_index: int | None = None


@dataclass
class QuestionFile:
    """Questions of one file, and the rows that could not be used, each with its reason."""

    questions: list[Question] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def read_questions(path: Path) -> QuestionFile:
    """Read questions from JSON lines, gzipped or not.

    Rows: grouped (`{"id", "title"?, "context", "qas": [{"id", "question", "answers", "options"?, "answer_index"?}]}`),
    flat (`{"context", "question", "answers", "options"?}`) or of several documents (`{"question", "answers",
    "documents": [{"title", "text", "is_supporting"}]}`). One without context, question or answer is left out and named.

    Raises:
        DataFileError: The file cannot be read, a line is no JSON object, or no row can be used.
    """
    found = QuestionFile()
    for number, row in read_rows(path):
        name = str(row.get("id", f"line {number}"))
        passages = _passages(row)
        grouped = isinstance(row.get("qas"), list)
        for place, item in enumerate(row["qas"] if grouped else [row]):
            usable = isinstance(item, dict)
            label = str((item if usable else {}).get("id", f"{name}#{place}" if grouped else name))
            made = _question(label, passages, item) if usable else "not an object"
            if isinstance(made, Question):
                found.questions.append(made)
            else:
                found.skipped.append((label, made))
    if not found.questions:
        raise DataFileError(
            "data file has no usable question",
            got=f"{path}, {len(found.skipped)} rows left out" + (f": {found.skipped[0][1]}" if found.skipped else ""),
            expected='rows with "context" (or "documents"), "question" and "answers"',
            next_step="check the format of the file",
        )
    return found


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a JSON lines file, gzipped or not.

    Raises:
        DataFileError: The file cannot be read, or a line is no JSON object.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, dict(json.loads(line))
    except (OSError, EOFError, ValueError, TypeError, zlib.error) as error:
        raise DataFileError(
            "data file cannot be read",
            got=f"{path}, after line {number} ({type(error).__name__})",
            expected="JSON lines, one object a line, gzipped if the name ends in .gz",
            next_step="check the path and the file",
        ) from error


def _passages(row: dict[str, Any]) -> tuple[SourcePassage, ...]:
    if isinstance(row.get("documents"), list):
        return tuple(
            SourcePassage(str(d.get("title") or ""), str(d["text"]), bool(d.get("is_supporting", True)))
            for d in row["documents"]
            if isinstance(d, dict) and str(d.get("text") or "").strip()
        )
    text = row.get("context")
    return (SourcePassage(str(row.get("title") or ""), text),) if isinstance(text, str) and text.strip() else ()


def _question(name: str, passages: tuple[SourcePassage, ...], item: dict[str, Any]) -> Question | str:
    """The question, or why it cannot be used."""
    answers = [answer.strip() for answer in _texts(item.get("answers")) if answer.strip()]
    options = tuple(_texts(item.get("options")))
    index = item.get("answer_index")
    index = index if isinstance(index, int) and not isinstance(index, bool) else None
    if index is None and options and answers and answers[0] in options:
        index = options.index(answers[0])
    if not answers and options and index is not None and 0 <= index < len(options):
        answers = [options[index]]
    if not passages:
        return "no context"
    if not str(item.get("question") or "").strip():
        return "no question"
    if not answers:
        return "no answer"
    if options and (index is None or not 0 <= index < len(options)):
        return "no right option"
    return Question(name, passages, str(item["question"]).strip(), tuple(dict.fromkeys(answers)), options, index)


def _texts(given: Any) -> list[str]:
    """One answer or several, numbers among them, as texts; nothing for what is neither."""
    if isinstance(given, str | int | float):
        return [str(given)]
    return [str(text) for text in given if isinstance(text, str | int | float)] if isinstance(given, list) else []

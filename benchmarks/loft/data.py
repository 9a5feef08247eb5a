"""The RAG sets of LOFT (Lee et al. 2024, arXiv 2406.13121) in their official layout, and our reconstruction of one.

Official: a folder `rag/SET/SIZE` with corpus.jsonl ({"pid", "title_text", "passage_text"}) and SPLIT_queries.jsonl
({"qid", "query_text", "answers"}), SIZE being 32k, 128k or 1m. Ours, of the corpus that LOFT's own example prompt
prints: a folder with corpus.jsonl.gz ({"id", "title", "text"}) and queries.jsonl.gz ({"id", "question", "answers",
"gold_doc_ids"}).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compllm_rag.errors import ConfigurationError, DataFileError
from compllm_rag.evaluation.questions import Question, SourcePassage, read_rows

SETS = ("nq", "hotpotqa", "musique", "qampari", "quest", "topiocqa")
SIZES = ("32k", "128k", "1m")
# Sets whose answer is a list; all of it counts.
MULTI_VALUE = ("qampari", "quest")
RECONSTRUCTED = (
    "The questions are a reconstruction, not LOFT's query list: questions of the NQ dev set whose gold paragraph is in "
    "the corpus, which is the one that LOFT's example prompt prints."
)


SQUAD = "eval/squad_dev.jsonl.gz"


@dataclass(frozen=True)
class Query:
    """One question, or one turn of a conversation.

    Attributes:
        id: Of the row; a turn has `#TURN` behind it.
        question: With the turns before it and their gold answers where there are any.
        answers: Gold answers: alternatives, or in a multi-value set all the values that are asked for.
        gold: Ids of the documents that hold the answer, empty where the file does not say.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    gold: tuple[str, ...] = ()


@dataclass
class LoftSet:
    """Documents by id, queries, and what has to be said about them."""

    name: str
    documents: dict[str, SourcePassage] = field(default_factory=dict)
    queries: list[Query] = field(default_factory=list)
    note: str = ""

    @property
    def multi_value(self) -> bool:
        """Whether an answer is a list of values."""
        return self.name in MULTI_VALUE

    def ask(self, query: Query, passages: list[SourcePassage], request: str = "") -> Question:
        """A question over passages; a list of values is one gold answer, as the likelihood sees it.

        Args:
            query: What is asked.
            passages: In the order in which they are shown.
            request: Stands behind the question, such as how to answer.
        """
        answers = (", ".join(query.answers),) if self.multi_value else query.answers
        return Question(query.id, tuple(passages), f"{query.question} {request}".rstrip(), answers)


def load(folder: Path, split: str = "dev") -> LoftSet:
    """Read a set from its folder.

    Args:
        folder: `.../rag/SET/SIZE` in LOFT's layout, or the folder of our reconstruction.
        split: dev, few_shot or test; LOFT's layout only.

    Raises:
        ConfigurationError: The folder has no corpus, or a set that is none of LOFT's six RAG sets.
        DataFileError: A file cannot be read, or a row lacks a field.
    """
    if (folder / "corpus.jsonl").exists():
        name = folder.parent.name if folder.name in SIZES else folder.name
        if name not in SETS:
            raise ConfigurationError(
                "no RAG set of LOFT", got=name, expected=f"rag/SET/SIZE with a SET of {', '.join(SETS)}",
                next_step="pass the folder of a size, such as data/rag/nq/128k",
            )  # fmt: skip
        made = LoftSet(name)
        for row in _rows(folder / "corpus.jsonl", "pid", "title_text", "passage_text"):
            made.documents[str(row["pid"])] = SourcePassage(str(row["title_text"]), str(row["passage_text"]).strip())
        for row in _rows(folder / f"{split}_queries.jsonl", "qid", "query_text", "answers"):
            made.queries += _writing(row)
        return made
    if (folder / "corpus.jsonl.gz").exists():
        made = LoftSet("nq", note=RECONSTRUCTED)
        for row in _rows(folder / "corpus.jsonl.gz", "id", "title", "text"):
            made.documents[str(row["id"])] = SourcePassage(str(row["title"]), str(row["text"]))
        for row in _rows(folder / "queries.jsonl.gz", "id", "question", "answers"):
            gold = tuple(map(str, row.get("gold_doc_ids", ())))
            made.queries.append(Query(str(row["id"]), str(row["question"]), tuple(map(str, row["answers"])), gold))
        return made
    raise ConfigurationError(
        "no LOFT corpus there", got=str(folder), expected="corpus.jsonl and dev_queries.jsonl, or corpus.jsonl.gz",
        next_step="download a set of google-deepmind/loft and pass data/rag/SET/SIZE",
    )  # fmt: skip


def _writing(row: dict[str, Any]) -> Iterator[Query]:
    """One query, or one a turn: those before it are told with their gold answers."""
    qrels = (row.get("metadata") or {}).get("qrels") or []
    if not isinstance(row["query_text"], list):
        yield Query(str(row["qid"]), str(row["query_text"]).strip(), _answers(row["answers"]), _gold(qrels))
        return
    told: list[str] = []
    for number, (text, answers) in enumerate(zip(row["query_text"], row["answers"], strict=True)):
        # Each turn of a conversation has a list of its own.
        known, gold = _answers(answers), _gold(qrels[number]) if number < len(qrels) else ()
        yield Query(f"{row['qid']}#{number}", " ".join([*told, str(text).strip()]), known, gold)
        told.append(f"{str(text).strip()} {known[0]}.")


def _answers(answers: Any) -> tuple[str, ...]:
    return tuple(map(str, answers)) if isinstance(answers, list) else (str(answers),)


def _gold(qrels: Sequence[Any]) -> tuple[str, ...]:
    """Documents of [pid, relevance] pairs."""
    return tuple(str(pair[0]) for pair in qrels if isinstance(pair, list) and pair)


def _rows(path: Path, *fields: str) -> Iterator[dict[str, Any]]:
    for number, row in read_rows(path):
        missing = [name for name in fields if name not in row]
        if missing:
            raise DataFileError(
                f"row without {', '.join(missing)}", got=f"{path.name}, line {number}", expected=", ".join(fields),
                next_step="pass a folder in LOFT's layout",
            )  # fmt: skip
        yield row


def squad(path: Path, every: int = 6) -> LoftSet:
    """Paragraphs of SQuAD dev as a corpus: many are about one article, so that one document is often not the right one.

    Args:
        path: squad_dev.jsonl.gz.
        every: Take every so manyth paragraph.
    """
    made = LoftSet("SQuAD dev", note=f"A corpus made here: every {every}th paragraph of SQuAD dev, all its questions.")
    for number, row in read_rows(path):
        if number % every:
            continue
        made.documents[str(number)] = SourcePassage(str(row.get("title", "")), str(row["context"]))
        for asked in row["qas"]:
            answers = tuple(dict.fromkeys(map(str, asked["answers"])))
            made.queries.append(Query(str(asked["id"]), str(asked["question"]), answers, (str(number),)))
    return made

"""Rows of data files, good and bad, and the default prompt without LlamaIndex."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llama_index.core.schema import NodeWithScore, TextNode

import toy
from compllm_rag.compression.compressor import Compressor
from compllm_rag.errors import DataFileError
from compllm_rag.evaluation.questions import read_questions
from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.planner import Planner
from compllm_rag.prompt import QAPrompt, TextSpan
from compllm_rag.store import MemoryStore


def read(tmp_path: Path, *rows: object):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return read_questions(path)


def test_three_layouts_of_rows(tmp_path: Path) -> None:
    grouped = {
        "id": "g",
        "title": "T",
        "context": "C.",
        "qas": [{"id": "q", "question": "Q?", "answers": ["a", "a", "b"]}],
    }
    flat = {"context": "C.", "question": "Q?", "answers": "a", "options": ["b", "a"]}
    several = {
        "id": "m",
        "question": "Q?",
        "answers": ["a"],
        "documents": [
            {"title": "X", "text": "x", "is_supporting": False},
            {"title": "Y", "text": "y", "is_supporting": True},
        ],
    }
    one, two, three = read(tmp_path, grouped, flat, several).questions
    assert (one.id, one.answers, one.passages[0].title) == ("q", ("a", "b"), "T")
    assert (two.id, two.options, two.answer_index) == ("line 2", ("b", "a"), 1)
    assert [(p.title, p.supporting) for p in three.passages] == [("X", False), ("Y", True)]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"question": "Q?", "answers": ["a"]}, "no context"),
        ({"context": " ", "question": "Q?", "answers": ["a"]}, "no context"),
        ({"context": "C.", "answers": ["a"]}, "no question"),
        ({"context": "C.", "question": "Q?", "answers": []}, "no answer"),
        ({"context": "C.", "question": "Q?", "answers": {"text": "a"}}, "no answer"),
        ({"context": "C.", "question": "Q?", "answers": ["a"], "options": ["b", "c"]}, "no right option"),
        (
            {"context": "C.", "question": "Q?", "answers": ["a"], "options": ["a", "b"], "answer_index": 7},
            "no right option",
        ),
        ({"context": "C.", "qas": ["Q?"]}, "not an object"),
        ({"documents": ["x"], "question": "Q?", "answers": ["a"]}, "no context"),
    ],
)
def test_bad_rows_are_named_and_not_fatal(tmp_path: Path, row: dict, why: str) -> None:
    good = {"context": "C.", "question": "Q?", "answers": [3]}
    found = read(tmp_path, row, good)
    assert [reason for _, reason in found.skipped] == [why]
    assert [q.answers for q in found.questions] == [("3",)]
    with pytest.raises(DataFileError, match=why):
        read(tmp_path, row)


def test_a_line_that_is_no_object_is_fatal(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="after line"):
        read(tmp_path, {"context": "C.", "question": "Q?", "answers": ["a"]}, 3)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_prompt_is_that_of_the_synthesizer(architecture: str) -> None:
    llm = toy.llm(architecture)
    compressor = Compressor(llm)
    library = ConceptLibrary(compressor, MemoryStore(llm.hidden_size))
    texts = [("Gull Rock", "The lighthouse was built in 1871."), ("", "Gulls nest there. <|end|>")]
    nodes = [NodeWithScore(node=TextNode(text=text, metadata={"title": title})) for title, text in texts]
    theirs = Planner(library, mode="text").plan("Who built it?", nodes, 1000).plan
    bodies = [(title, [TextSpan(library.passage(text).ids, i)]) for i, (title, text) in enumerate(texts)]
    mine = QAPrompt(llm.tokenizer).plan("Who built it?", bodies)
    ids = [[token for span in plan.spans for token in span.ids] for plan in (theirs, mine)]
    assert ids[0] == ids[1]

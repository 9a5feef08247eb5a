"""The relevance benchmark on a toy model: whom it asks, what counts as found, and its section."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import loft_corpus
import toy
import toy_embedder
from benchmarks.planner import relevance_page
from benchmarks.planner.relevance import COLUMNS, _row, hit
from benchmarks.planner.sought import sought
from compllm_rag.compression.late_interaction import LateInteraction
from compllm_rag.compression.loading import untrained_deep
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.errors import ConfigurationError
from compllm_rag.evaluation.questions import Question, SourcePassage
from compllm_rag.models.llm import TargetLLM
from compllm_rag.reading.signals import SIGNALS
from compllm_rag.training.material import Group, is_held_out
from toy_embedder import HashEmbedder

PARTS = [part.strip() for part in toy.TEXT.split("\n\n")]


def group(number: int, *answers: str, extra: tuple[SourcePassage, ...] = ()) -> Group:
    """Questions about a part, by their answers."""
    passage = SourcePassage(f"T{number}", PARTS[number])
    asked = [
        Question(f"q{number}.{i}", (passage, *extra), f"What is said of {answer}?", (answer,))
        for i, answer in enumerate(answers)
    ]
    return Group((passage, *extra), tuple(asked))


def test_questions_come_with_their_passages_and_near_ones() -> None:
    segmenter = Segmenter(toy.tokenizer(), 20)
    words = [[word for word in part.split() if word.isalpha() and len(word) > 4] for part in PARTS]
    distractor = SourcePassage("D", f"Nothing but {words[0][0]}.", supporting=False)
    groups = [group(0, words[0][0], words[0][3], "unheard of", extra=(distractor,)), group(1, words[1][0], "is")]
    found = sought(groups, segmenter, HashEmbedder(), limit=9, n_passages=2)
    assert {one.id.split(".")[0] for one in found[:2]} == {"q0", "q1"}, "one of each group before a second of any"
    assert {one.id for one in found} <= {"q0.0", "q0.1", "q1.0"}
    for one in found:
        number = int(one.id[1])
        assert len(one.passages) == 2 and one.group == number and one.n_sentences == sum(map(len, one.sentences))
        [own] = [p for p, passage in enumerate(one.passages) if passage.text == PARTS[number]]
        answer = one.question.removeprefix("What is said of ").removesuffix("?")
        assert one.gold and {p for p, _ in one.gold} == {own}, "what a distractor says is no answer"
        assert all(answer in one.sentences[p][s].text for p, s in one.gold)
    with pytest.raises(ConfigurationError, match="no question is answered by the words"):
        sought([group(0, "unheard of")], segmenter, HashEmbedder(), limit=9, n_passages=2)


def test_what_a_signal_holds_alike_is_found_by_chance() -> None:
    gold = frozenset({(0, 1)})
    assert [hit([[0.1, 0.9], [0.5]], gold, k) for k in (1, 2)] == [1, 1]
    assert [hit([[0.5, 0.4], [0.6]], gold, k) for k in (1, 2, 3)] == [0, 0, 1]
    assert hit([[0, 0], [0, 0]], gold, 1) == pytest.approx(1 / 4)
    assert hit([[0, 0], [0, 0]], gold, 2) == pytest.approx(1 / 2)
    assert hit([[0, 0], [0, 7]], frozenset({(0, 1), (0, 0)}), 2) == pytest.approx(2 / 3)
    assert hit([[0, 0], [0, 0]], frozenset({(0, 1), (0, 0)}), 2) == pytest.approx(1 - (2 / 4) * (1 / 3))


def test_intervals_are_over_groups() -> None:
    values = np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    one = _row(values, np.zeros_like(values), np.array([0, 0, 0]))
    assert one["recall@1"] == pytest.approx(200 / 3) and one["recall@1 interval"] == pytest.approx([200 / 3] * 2)
    several = _row(values, values, np.array([0, 1, 2]))
    low, high = several["recall@1 interval"]
    assert low < 200 / 3 < high and several["recall@1 over BM25"] == {"difference": 0, "interval": [0, 0]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("relevance")
    titles = [title for title in map("T{}".format, range(2000)) if is_held_out(title)]
    rows = [
        {"id": f"s{i}", "title": titles[i], "context": f"{part} It is part {i}.",
         "qas": [{"id": f"q{i}", "question": " ".join(part.split()[1:6]), "answers": [part.split()[3]]}]}
        for i, part in enumerate(PARTS)
    ]  # fmt: skip
    rows.append({**rows[0], "id": "trained on", "title": "T0"})
    loft_corpus.write(folder / "train/squad.jsonl.gz", rows)
    toy_embedder.save_sentence_transformer(folder / "embedder", toy.TEXT)
    return folder


def test_it_runs_and_has_its_section(data: Path, toy_folder: Path, tmp_path: Path) -> None:
    words = ["--llm", toy_folder, "--data-dir", data, "--embedder", data / "embedder" / "model", "--passages", 2]
    record, _ = loft_corpus.run("relevance", tmp_path / "relevance.json", *words)
    assert 1 <= record["n"] <= len(PARTS) and record["groups"] == record["n"] and record["entry_layer"] > 0
    assert set(SIGNALS) - {"learned"} < set(record["rows"])
    for name, row in record["rows"].items():
        for column in COLUMNS if name in SIGNALS else COLUMNS[:2]:
            assert 0 <= row[column] <= 100 and row[f"{column} interval"][0] <= row[column]
        assert row["recall@1"] <= row["recall@2"]
    assert record["rows"]["bm25"]["recall@1 over BM25"]["difference"] == 0
    page = "\n".join(relevance_page.tables(record))
    assert "| max-sim |" in page and "| BM25 and max-sim |" in page and "max-sim of int4 states" in page
    assert "* max-sim: recall@1 " in page and "* BM25 and max-sim: recall@1 " in page
    apart = {f"{column} over BM25": {"difference": 9.0, "interval": [2.0, 16.0]} for column in COLUMNS}
    page = "\n".join(
        relevance_page.tables({**record, "rows": {**record["rows"], "maxsim": record["rows"]["bm25"] | apart}})
    )
    assert "recall@1 better than BM25's (+9.0 [+2.0, +16.0])" in page


def test_what_was_learned_has_its_row(data: Path, toy_folder: Path, tmp_path: Path) -> None:
    made = untrained_deep(TargetLLM.from_pretrained(str(toy_folder)), 1)
    made.interaction = LateInteraction(made.hidden_size, 8)
    made.interaction.compressor = made.fingerprint
    words = ["--llm", toy_folder, "--data-dir", data, "--embedder", data / "embedder" / "model", "--passages", 2]
    words += ["--reader", "none", "--compressor", made.save_pretrained(tmp_path / "compressor")]
    record, _ = loft_corpus.run("relevance", tmp_path / "relevance.json", *words)
    row = record["rows"]["learned"]
    assert all(0 <= row[column] <= 100 for column in COLUMNS)
    page = "\n".join(relevance_page.tables(record))
    assert "| learned |" in page and "* learned: recall@1 " in page

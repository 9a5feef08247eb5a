"""Equal cost: settings, pairs, and the benchmark on a toy corpus."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.loft import equal_cost_page
from benchmarks.loft.data import squad
from benchmarks.loft.equal_cost import pairs, settings
from loft_corpus import options, reconstructed, run, write


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reconstructed(tmp_path_factory.mktemp("loft"))


def test_paragraphs_of_squad_are_a_corpus(tmp_path: Path) -> None:
    rows = [
        {"title": f"T{n}", "context": f"Text {n}.", "qas": [{"id": f"q{n}", "question": "Who?", "answers": ["A", "A"]}]}
        for n in range(5)
    ]
    write(tmp_path / "squad.jsonl.gz", rows)
    made = squad(tmp_path / "squad.jsonl.gz", every=2)
    assert list(made.documents) == ["2", "4"], "lines are counted from 1"
    assert made.documents["2"].title == "T1" and made.documents["2"].text == "Text 1."
    assert [(q.id, q.answers, q.gold) for q in made.queries] == [("q1", ("A",), ("2",)), ("q3", ("A",), ("4",))]


def test_as_many_documents_as_concepts_as_cost_what_text_costs() -> None:
    positions = {(None, k): 60.0 + 120 * k for k in range(1, 17)} | {(4.0, k): 60.0 + 42 * k for k in range(1, 17)}
    made = settings([1, 2, 4], [4.0], positions)
    assert [k for mode, _, k in made if mode == "text"] == [1, 2, 4]
    assert [k for _, rate, k in made if rate == 4.0] == [1, 2, 3, 4, 6, 11]
    full = {at: cost if at[0] is None else cost / 2 for at, cost in positions.items()}
    both = settings([1, 2], [4.0], positions, full)
    assert [k for _, rate, k in both if rate == 4.0] == [1, 2, 3, 6, 7, 13], "nearest in positions, and in prefill"
    beside = settings([2], [4.0], positions, full, ["pruned", "random"])
    assert [(mode, k) for mode, _, k in beside if mode not in ("text", "concepts")] == [("pruned", 6), ("random", 13)]


def test_pairs_are_of_the_nearest_cost_and_paired_by_question() -> None:
    text = {"mode": "text", "rate": None, "k": 1, "positions": 100, "f1": 50, "f1_by_question": {"a": 100, "b": 0}}
    near = {"mode": "concepts", "rate": 2.0, "k": 2, "positions": 105, "f1": 75, "f1_by_question": {"b": 50, "a": 100}}
    far = near | {"k": 1, "positions": 55}
    (pair,) = pairs([text, far, near], "positions")
    assert (pair["concepts_k"], pair["difference"], pair["cost_ratio"]) == (2, 25, 1.05)
    assert pair["interval"] == [0, 50]


def test_equal_cost_runs_resumes_and_has_its_section(data: Path, toy_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "equal_cost.json"
    words = [
        *options(data, toy_folder),
        "--loft",
        data / "eval/loft_nq_128k",
        "--text-ks",
        1,
        "--rates",
        2,
        "--most",
        2,
        "--repeats",
        1,
        "--timed",
        2,
        "--rivals",
        "pruned",
        "random",
    ]
    record, _ = run("equal_cost", out, *words)
    rivals = [row for row in record["rows"] if row["mode"] in ("pruned", "random")]
    assert [row["mode"] for row in rivals] == ["pruned", "random"] and all("ttft_s" not in row for row in rivals)
    assert (
        rivals[0]["full_positions"] == rivals[0]["positions"] and rivals[1]["full_positions"] < rivals[1]["positions"]
    )
    assert [pair["mode"] for pair in record["equal_prefill"]] == ["concepts", "pruned", "random"]
    rows = [row for row in record["rows"] if row not in rivals]
    assert [(row["mode"], row["k"]) for row in rows] == [("text", 1), ("concepts", 1), ("concepts", 2)]
    assert all(len(row["ttft_all_s"]) == 2 and row["ttft_s"] > 0 for row in rows)
    assert [pair["text_k"] for pair in record["equal_positions"] + record["equal_ttft"]] == [1] * 4
    assert record["entry_layer"] == 1
    text, one, two = rows
    assert text["full_positions"] == text["positions"] and one["full_positions"] < one["positions"]
    assert one["full_positions"] < two["full_positions"]
    again, log = run("equal_cost", out, *words)
    assert "text, 1 documents: done before" in log and log.count("done before") == 5
    assert again["rows"][0]["f1_by_question"] == record["rows"][0]["f1_by_question"]
    page = "\n".join(equal_cost_page.tables(record))
    assert "At the most equal prefill" in page and "## Equal cost of deep concepts" in page
    assert "| read as | text, top |" in page and "| pruned | 1 |" in page
    assert "At the most equal TTFT" in page and "| TTFT / text |" in page
    assert len(equal_cost_page.plot(record).axes[0].get_legend().get_texts()) == 2

"""LOFT: its layout, its metrics, and both benchmarks on a toy corpus."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

import toy
import toy_embedder
from benchmarks.equal_cost import pairs, settings
from benchmarks.loft import in_context
from benchmarks.loft_data import RECONSTRUCTED, LoftSet, Query, load, squad
from benchmarks.loft_metrics import multi_value, parse_values, single_value
from benchmarks.pages import equal_cost as equal_cost_page
from benchmarks.pages import loft as loft_page
from compllm_rag.compressor import Compressor
from compllm_rag.errors import ConfigurationError, DataFileError
from compllm_rag.evaluation.results import EvalConfig
from compllm_rag.questions import SourcePassage

ROOT = Path(__file__).parents[2]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(row) for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def official(folder: Path, name: str, queries: list[dict]) -> Path:
    made = folder / "rag" / name / "32k"
    corpus = [{"pid": f"p{i}", "title_text": f"T{i}", "passage_text": f"Text {i}. ", "metadata": {}} for i in range(3)]
    write(made / "corpus.jsonl", corpus)
    write(made / "dev_queries.jsonl", queries)
    return made


def test_the_official_layout(tmp_path: Path) -> None:
    row = {"qid": "q", "query_text": " Who? ", "answers": ["Ada", "A."], "metadata": {"qrels": [["p1", 1]]}}
    found = load(official(tmp_path, "nq", [row]))
    assert found.name == "nq" and not found.note and not found.multi_value
    assert found.documents["p1"].title == "T1" and found.documents["p1"].text == "Text 1."
    (query,) = found.queries
    assert (query.question, query.answers, query.gold) == ("Who?", ("Ada", "A."), ("p1",))


def test_turns_of_a_conversation_hear_those_before(tmp_path: Path) -> None:
    row = {"qid": "c", "query_text": ["Who?", "When?"], "answers": [["Ada"], ["1843", "in 1843"]], "metadata": {}}
    first, second = load(official(tmp_path, "topiocqa", [row])).queries
    assert first.question == "Who?" and first.answers == ("Ada",)
    assert second.id == "c#1" and second.question == "Who? Ada. When?" and second.answers == ("1843", "in 1843")


def test_lists_are_one_gold_answer_for_the_likelihood(tmp_path: Path) -> None:
    row = {"qid": "q", "query_text": "Which?", "answers": ["Rome", "Paris"], "metadata": {}}
    found = load(official(tmp_path, "quest", [row]))
    assert found.multi_value
    assert found.ask(found.queries[0], []).answers == ("Rome, Paris",)


def test_folders_that_are_no_loft_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no LOFT corpus"):
        load(tmp_path)
    with pytest.raises(ConfigurationError, match="no RAG set"):
        load(official(tmp_path, "fever", []))
    with pytest.raises(DataFileError, match="row without answers"):
        load(official(tmp_path, "nq", [{"qid": "q", "query_text": "Who?"}]))


@pytest.mark.parametrize(
    ("answer", "values"),
    [
        ("Rome, Paris and Bern", ["Rome", "Paris", "Bern"]),
        ("Final Answer: ['Rome', 'Paris']", ["Rome", "Paris"]),
        ("[Rome, Paris]", ["Rome", "Paris"]),
        ("Rome\nParis", ["Rome"]),
        ("", []),
    ],
)
def test_values_of_an_answer(answer: str, values: list[str]) -> None:
    assert parse_values(answer) == values


def test_paragraphs_of_squad_are_a_corpus(tmp_path: Path) -> None:
    rows = [
        {"title": f"T{n}", "context": f"Text {n}.", "qas": [{"id": f"q{n}", "question": "Who?", "answers": ["A", "A"]}]}
        for n in range(5)
    ]
    write(tmp_path / "squad.jsonl.gz", rows)
    made = squad(tmp_path / "squad.jsonl.gz", every=2)
    assert list(made.documents) == ["0", "2", "4"] and made.documents["2"].title == "T2"
    assert [(q.id, q.answers, q.gold) for q in made.queries][1] == ("q2", ("A",), ("2",))


def test_lists_are_paired_one_to_one() -> None:
    golds = ["Rome", "New York"]
    assert multi_value("Rome, New York", golds) == {"em": 100, "coverage": 100, "subspan_em": 100}
    # Containment either way counts as a match, each answered value only once.
    assert multi_value("Rome in Italy, York", golds) == {"em": 0, "coverage": 0, "subspan_em": 100}
    assert multi_value("Rome", golds) == {"em": 0, "coverage": 50, "subspan_em": 0}
    assert multi_value("Rome, Rome", ["Rome", "Roma"])["subspan_em"] == 0
    assert multi_value("R, Y", ["r", "y"])["em"] == 100
    assert multi_value("", golds) == {"em": 0, "coverage": 0, "subspan_em": 0}


def test_single_values_are_the_best_over_the_alternatives() -> None:
    assert single_value("The Café.", ["cafe\u0301", "x"]) == {"em": 100, "subspan_em": 100, "f1": 100}
    assert single_value("in old Rome", ["Rome"]) == {"em": 0, "subspan_em": 100, "f1": pytest.approx(50)}


def test_as_many_documents_as_concepts_as_cost_what_text_costs() -> None:
    positions = {(None, k): 60.0 + 120 * k for k in range(1, 17)} | {(4.0, k): 60.0 + 42 * k for k in range(1, 17)}
    made = settings([1, 2, 4], [4.0], positions)
    assert [k for mode, _, k in made if mode == "text"] == [1, 2, 4]
    assert [k for _, rate, k in made if rate == 4.0] == [1, 2, 3, 4, 6, 11]


def test_a_corpus_that_fits_as_concepts_alone_is_read_as_concepts() -> None:
    documents = {str(i): SourcePassage(f"T{i}", toy.TEXT) for i in range(3)}
    found = LoftSet("nq", documents, [Query("q", "Who?", ("Ada",), ("0",))])
    compressor = Compressor(toy.llm(window=700))
    text, concepts = in_context(
        found, compressor, found.queries, [("text", None), ("concepts", 4.0)], EvalConfig(max_new_tokens=4)
    )
    assert str(text["positions"]) in text["left_out"] and concepts["positions"] <= 700 and "loft" in concepts


def test_turns_have_gold_documents_of_their_own(tmp_path: Path) -> None:
    metadata = {"qrels": [[["p1", 1]], [["p2", 1], ["p0", 1]]]}
    row = {"qid": "c", "query_text": ["Who?", "When?"], "answers": ["Ada", "1843"], "metadata": metadata}
    assert [q.gold for q in load(official(tmp_path, "topiocqa", [row])).queries] == [("p1",), ("p2", "p0")]


def test_the_list_of_a_final_answer_counts() -> None:
    assert single_value("TITLE: T | ID: 3\nFinal Answer: ['Ada', 'x']", ["Ada"])["em"] == 100
    assert single_value("[1] Ada", ["1 Ada"])["em"] == 100, "a citation is no list"
    golds = ["Trinidad and Tobago", "the devil's sleep"]
    assert multi_value("Trinidad and Tobago, the devil's sleep", golds)["em"] == 100
    assert multi_value("Final Answer: ['Trinidad and Tobago', 'the devil's sleep']", golds)["em"] == 100


def test_pairs_are_of_the_nearest_cost_and_paired_by_question() -> None:
    text = {"mode": "text", "rate": None, "k": 1, "positions": 100, "f1": 50, "f1_by_question": {"a": 100, "b": 0}}
    near = {"mode": "concepts", "rate": 2.0, "k": 2, "positions": 105, "f1": 75, "f1_by_question": {"b": 50, "a": 100}}
    far = near | {"k": 1, "positions": 55}
    (pair,) = pairs([text, far, near], "positions")
    assert (pair["concepts_k"], pair["difference"], pair["cost_ratio"]) == (2, 25, 1.05)
    assert pair["interval"] == [0, 50]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loft")
    parts = [toy.TEXT[i * 60 : i * 60 + 60] for i in range(6)]
    corpus = [{"id": str(i), "title": f"T{i}", "text": part} for i, part in enumerate(parts)]
    queries = [
        {"id": f"q{i}", "question": " ".join(parts[i].split()[1:5]), "answers": ["Ada"], "gold_doc_ids": [str(i)]}
        for i in range(4)
    ]
    write(folder / "eval/loft_nq_128k/corpus.jsonl.gz", corpus)
    write(folder / "eval/loft_nq_128k/queries.jsonl.gz", queries)
    toy_embedder.save_sentence_transformer(folder / "embedder", toy.TEXT)
    return folder


def run(name: str, out: Path, *words: object) -> tuple[dict, str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(out), *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stderr


def common(data: Path, toy_folder: Path) -> list[object]:
    return ["--llm", toy_folder, "--data-dir", data, "--embedder", data / "embedder" / "model", "--storage", data / "s"]


def test_loft_runs_resumes_and_has_its_section(data: Path, toy_folder: Path, tmp_path: Path) -> None:
    options = [*common(data, toy_folder), "--max-new-tokens", 4, "--rates", 2]
    run("loft", tmp_path / "loft.json", *options, "--ks", 1)
    record, log = run("loft", tmp_path / "loft.json", *options, "--ks", 1, 2)
    assert record["note"] == RECONSTRUCTED and record["n"] == 4 and record["documents"] == 6
    assert "text: 4 questions" in log and log.count("text: 4 questions, 0 %") == 1, "top 1 is not asked again"
    assert 0 <= record["recall"]["1"] <= record["recall"]["5"] <= record["recall"]["10"] == 100
    text, concepts, none = record["top"]["2"]
    assert text["positions"] > concepts["positions"] > none["positions"]
    page = loft_page.section(tmp_path, tmp_path)
    assert page is not None and RECONSTRUCTED in page and "### Top 2" in page
    assert f"| text | – | {text['positions']:,.0f} |" in page
    assert (tmp_path / "loft.png").read_bytes()[:4] == b"\x89PNG"


def test_a_corpus_that_does_not_fit_is_said_to(data: Path, toy_folder: Path, tmp_path: Path) -> None:
    options = [*common(data, toy_folder), "--max-new-tokens", 4, "--rates", 2, "--in-context"]
    record, _ = run("loft", tmp_path / "loft.json", *options)
    text, concepts = record["in_context"]
    assert text["positions"] > concepts["positions"]
    for row in (text, concepts):
        assert ("left_out" in row) == (row["positions"] > row["window"])
        assert "left_out" in row or row["loft"]["f1"]["value"] >= 0
    assert "what came of it" in (loft_page.section(tmp_path, tmp_path) or "")


def test_equal_cost_runs_resumes_and_has_its_section(data: Path, toy_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "equal_cost.json"
    options = [
        *common(data, toy_folder),
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
    ]
    record, _ = run("equal_cost", out, *options)
    assert [(row["mode"], row["k"]) for row in record["rows"]] == [("text", 1), ("concepts", 1), ("concepts", 2)]
    assert all(len(row["ttft_all_s"]) == 2 and row["ttft_s"] > 0 for row in record["rows"])
    assert [pair["text_k"] for pair in record["equal_positions"] + record["equal_ttft"]] == [1, 1]
    again, log = run("equal_cost", out, *options)
    assert "questions" not in log
    assert again["rows"][0]["f1_by_question"] == record["rows"][0]["f1_by_question"]
    page = equal_cost_page.section(tmp_path, tmp_path)
    assert page is not None and "At the most equal TTFT" in page
    assert (tmp_path / "equal_cost.png").stat().st_size > 1000

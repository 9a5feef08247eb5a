"""LOFT: its layout, its metrics, and both benchmarks on a toy corpus."""

from __future__ import annotations

from pathlib import Path

import pytest

import toy
from benchmarks.loft import passages
from benchmarks.loft_data import RECONSTRUCTED, LoftSet, Query, load
from benchmarks.loft_in_context import in_context
from benchmarks.loft_metrics import multi_value, parse_values, single_value
from benchmarks.loft_prompts import ALL_OF_THEM, CorpusPrompt, examples
from benchmarks.pages import loft as loft_page
from compllm_rag.compression.compressor import Compressor
from compllm_rag.errors import ConfigurationError, DataFileError
from compllm_rag.evaluation.questions import SourcePassage
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import TextSpan
from loft_corpus import official, options, reconstructed, run

QUERIES = [
    {"qid": f"q{i}", "query_text": "Who?", "answers": ["Ada"], "metadata": {"qrels": [[f"p{i}", 1]]}} for i in (0, 1)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reconstructed(tmp_path_factory.mktemp("loft"))


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


def test_a_corpus_that_fits_as_concepts_alone_is_read_as_concepts() -> None:
    documents = {str(i): SourcePassage(f"T{i}", toy.TEXT) for i in range(3)}
    found = LoftSet("nq", documents, [Query("q", "Who?", ("Ada",), ("0",))])
    compressor = Compressor(toy.llm(window=700))
    text = in_context(found, compressor, found.queries, ("text", None), 4)
    concepts = in_context(found, compressor, found.queries, ("concepts", 4.0), 4)
    assert str(text["positions"]) in text["left_out"] and concepts["positions"] <= 700 and "loft" in concepts


def test_the_prompt_of_a_corpus_in_context(llm: TargetLLM) -> None:
    documents = {"a": SourcePassage("Italy", "Rome."), "b": SourcePassage("", "Ada.")}
    shot = Query("s", "Which?", ("Rome", "Roma"), ("b", "gone"))
    prompt = CorpusPrompt(llm.tokenizer, examples(LoftSet("nq", documents), [shot]))
    bodies = [(p.title, [TextSpan(tuple(prompt.template.plain(p.text)))]) for p in documents.values()]
    plan = prompt.plan("Who?", bodies)
    shown = llm.tokenizer.decode([token for span in plan.spans for token in span.ids])
    at = [
        shown.index(words)
        for words in (
            "ID: 1 | TITLE: Italy | CONTENT: Rome. | END ID: 1",
            "ID: 2 | TITLE: None | CONTENT: Ada. | END ID: 2",
            "query: Which?",
            "TITLE:  | ID: 2",
            "Final Answer: ['Rome']",
            "query: Who?",
        )
    ]
    assert at == sorted(at) and "gone" not in shown
    assert "['Rome', 'Roma']" in examples(LoftSet("quest", documents), [shot])
    assert examples(LoftSet("nq", documents), []) == ""
    assert examples(LoftSet("nq", documents), [shot] * 9).count("Example") == 5


def test_a_set_of_lists_asks_for_all_values(tmp_path: Path) -> None:
    row = {"qid": "q", "query_text": "Which?", "answers": ["Rome", "Paris"], "metadata": {}}
    for name, asks in (("qampari", True), ("nq", False)):
        found = load(official(tmp_path, name, [row]))
        (question,) = passages(found, found.queries, {"q": ["p0", "p1"]}, 1)
        assert (ALL_OF_THEM in question.question) == asks and [p.title for p in question.passages] == ["T0"]


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


def test_loft_runs_resumes_and_has_its_section(data: Path, toy_folder: Path, tmp_path: Path) -> None:
    words = [*options(data, toy_folder), "--max-new-tokens", 4, "--rates", 2]
    run("loft", tmp_path / "loft.json", *words, "--ks", 1)
    record, log = run("loft", tmp_path / "loft.json", *words, "--ks", 1, 2)
    assert record["note"] == RECONSTRUCTED and record["n"] == 4 and record["documents"] == 6
    assert "text: 4 questions" in log and log.count("text: 4 questions, 0 %") == 1, "top 1 is not asked again"
    assert 0 <= record["recall"]["1"] <= record["recall"]["5"] <= record["recall"]["10"] == 100
    text, concepts, none = record["top"]["2"]
    assert text["positions"] > concepts["positions"] > none["positions"]
    page = loft_page.section(tmp_path, tmp_path)
    assert page is not None and RECONSTRUCTED in page and "### Top 2" in page
    assert f"| text | – | {text['positions']:,.0f} |" in page
    assert (tmp_path / "loft.png").read_bytes()[:4] == b"\x89PNG"


def test_a_corpus_in_context_runs_resumes_and_is_on_the_page(data: Path, toy_folder: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "loft_in_context.json", official(tmp_path, "nq", QUERIES)
    (folder / "few_shot_queries.jsonl").write_text((folder / "dev_queries.jsonl").read_text())
    words = ["--llm", toy_folder, "--loft", folder, "--max-new-tokens", 4, "--in-context"]
    run("loft", out, *words, "--rates", 2)
    record, log = run("loft", out, *words, "--rates", 2, 4)
    assert record["examples"] == 2 and record["split"] == "dev" and "embedder" not in record
    assert [(row["mode"], row["rate"]) for row in record["in_context"]] == [
        ("text", None), ("concepts", 2.0), ("concepts", 4.0),
    ]  # fmt: skip
    assert all("left_out" in row or row["loft"]["f1"]["value"] >= 0 for row in record["in_context"])
    assert "text: " not in log, "text is not asked again"
    page = loft_page.section(tmp_path, tmp_path)
    assert page is not None and "### Corpus in context" in page and "2 answered examples" in page


def test_a_corpus_that_does_not_fit_is_said_to(data: Path, toy_folder: Path, tmp_path: Path) -> None:
    words = ["--llm", toy_folder, "--data-dir", data, "--max-new-tokens", 4000, "--rates", 2, "--in-context"]
    record, _ = run("loft", tmp_path / "loft_in_context.json", *words)
    assert record["note"] == RECONSTRUCTED and record["examples"] == 0
    for row in record["in_context"]:
        assert row["positions"] > row["window"] and str(row["window"]) in row["left_out"]
    assert "the LLM reads" in (loft_page.section(tmp_path, tmp_path) or "")

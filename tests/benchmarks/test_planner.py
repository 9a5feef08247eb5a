"""The planner's benchmark on a toy model: sets, contenders at equal cost, resuming, and its section."""

from __future__ import annotations

from pathlib import Path

import pytest

import loft_corpus
import toy
import toy_embedder
from benchmarks.planner import planner_page
from benchmarks.planner.candidates import asked, found, with_passages
from benchmarks.planner.contenders import CONTENDERS, LEARNED, InOrder
from compllm_rag.compression.late_interaction import LateInteraction
from compllm_rag.compression.loading import untrained_deep
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.evaluation.questions import Question, SourcePassage
from compllm_rag.evaluation.read_policies import QuestionBodies
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import QAPrompt, TextSpan
from toy_embedder import HashEmbedder
from trained import information

PARTS = [part.strip() for part in toy.TEXT.split("\n\n")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planner")
    one = [
        {"id": f"s{i}", "title": f"T{i}", "context": f"{part} It is part {i}.",
         "qas": [{"id": f"q{i}", "question": " ".join(part.split()[1:6]), "answers": [part.split()[3]]}]}
        for i, part in enumerate(PARTS * 2)
    ]  # fmt: skip
    several = [
        {"id": f"h{i}", "question": " ".join(PARTS[i].split()[2:8]), "answers": [PARTS[i].split()[4]],
         "documents": [{"title": f"D{n}", "text": part, "is_supporting": n == i} for n, part in enumerate(PARTS)]}
        for i in range(3)
    ]  # fmt: skip
    loft_corpus.write(folder / "eval/squad_dev.jsonl.gz", one)
    loft_corpus.write(folder / "eval/musique_dev.jsonl.gz", several)
    toy_embedder.save_sentence_transformer(folder / "embedder", toy.TEXT)
    return folder


def test_passages_are_looked_for_among_those_of_all_questions_or_its_own(data: Path) -> None:
    segmenter, embedder = Segmenter(toy.tokenizer(), 20), HashEmbedder()
    options = {"limit": 2, "segmenter": segmenter}
    chosen, among = asked(data / "eval/squad_dev.jsonl.gz", pool=5, pooled=True, **options)
    assert len(chosen) == 2 and len(among[0]) >= 5 and among[0] == among[1]
    places = found(chosen, among, embedder, 3)
    read = with_passages(chosen, among, places)
    assert [len(question.passages) for question in read] == [3, 3]
    assert all(len({p.text for p in question.passages}) == 3 for question in read)
    chosen, among = asked(data / "eval/musique_dev.jsonl.gz", pool=5, pooled=False, **options)
    assert {p.title for p in among[0]} == {"D0", "D1", "D2"}
    assert any(p.supporting for p in among[0]) and not all(p.supporting for p in among[0])


def test_it_runs_resumes_and_has_its_section(data: Path, toy_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "planner.json"
    words = ["--llm", toy_folder, "--data-dir", data, "--embedder", data / "embedder" / "model", "--limit", 3]
    words += ["--sets", "squad", "musique", "--top-k", 3, "--pool", 4, "--max-new-tokens", 3]
    made = untrained_deep(TargetLLM.from_pretrained(str(toy_folder)), 1)
    made.interaction = LateInteraction(made.hidden_size, 8)
    made.interaction.compressor = made.fingerprint
    words += ["--reader", "none", "--compressor", made.save_pretrained(tmp_path / "compressor")]
    record, _ = loft_corpus.run("planner", out, *words)
    assert record["rates"] == {"0.25": 2.0, "0.125": 4.0}
    for each in record["sets"].values():
        rows = {(row["contender"], row["cost"]): row for row in each["rows"]}
        assert set(rows) == {("text", None), ("none", None)} | {(c, p) for c in CONTENDERS for p in (0.25, 0.125)}
        assert rows["text", None]["prefill_cost"] == 1 and rows["none", None]["prefill_cost"] == 0
        for cost in (0.25, 0.125):
            fixed = rows["concepts", cost]["prefill_tokens"]
            assert abs(rows["concepts", cost]["prefill_cost"] - cost) < 0.02
            for name in CONTENDERS:
                assert rows[name, cost]["prefill_tokens"] <= fixed + 1e-6, name
            over = rows["planner", cost]["over"]
            assert set(over) == {"BM25 sentences", "concepts", "fewer text", "random"}
            low, high = over["concepts"]["f1"]["interval"]
            assert low <= over["concepts"]["f1"]["difference"] <= high
    again, log = loft_corpus.run("planner", out, *words)
    assert again["sets"] == record["sets"] and log.count("done before") == 2 * (3 + 2 * len(CONTENDERS))
    page = "\n".join(planner_page.tables(record))
    assert (
        "| BM25 sentences | 0.125 |" in page
        and "Against the best of" in page
        and "### MuSiQue dev" in page
        and "planner.png" in page
    )
    assert len(planner_page.plot(record).axes) == 2


def test_all_of_them_narrowed(data: Path, tmp_path: Path) -> None:
    words = ["--llm", toy.save(tmp_path / "llm", layers=4), "--data-dir", data, "--limit", 2, "--sets", "squad"]
    words += ["--embedder", data / "embedder" / "model", "--top-k", 3, "--pool", 4, "--max-new-tokens", 3]
    words += ["--narrow", "3:0.1", "--costs", 0.2, "--contenders", "planner", LEARNED, "concepts"]
    record, log = loft_corpus.run("planner", tmp_path / "narrowed.json", *words)
    assert f"{LEARNED}: no relevance is learned" in log and LEARNED not in str(record["sets"])
    assert record["narrowing"] == "3:0.1" and record["rates"]["0.2"] == pytest.approx(0.275 / 0.2)
    rows = {row["contender"]: row for row in record["sets"]["squad"]["rows"]}
    assert rows["concepts"]["prefill_cost"] == pytest.approx(0.2, abs=0.02)
    assert rows["planner"]["prefill_tokens"] <= rows["concepts"]["prefill_tokens"] + 0.5


def test_sentences_that_do_not_fit_are_passed_over_or_cut_off() -> None:
    llm = toy.llm(layers=2)
    compressor = untrained_deep(llm, 1, information=information(llm))
    question = Question("q", (SourcePassage("", PARTS[0]),), "Which gull?", ("x",))
    whole = QuestionBodies(compressor, rate=3.0, policy=InOrder(by_words=True), mode="text")
    cut = QuestionBodies(compressor, rate=3.0, policy=InOrder(by_words=True, cut=True), mode="text")
    around = sum(map(len, QAPrompt(llm.tokenizer).template.passage(1, "", [])))
    left = whole.budget(question) - around
    read = {}
    for name, bodies in (("whole", whole), ("cut", cut)):
        [(_, spans)] = bodies.read(question) or [("", [])]
        assert all(isinstance(span, TextSpan) for span in spans)
        read[name] = sum(map(len, spans))
    assert read["whole"] < read["cut"] <= left < read["cut"] + 1

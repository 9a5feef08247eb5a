"""Rivals on a toy model: the protocol with a fake process, LLMLingua-2 with a toy classifier, JSON, resuming, page."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

import pytest
import torch

import toy
from benchmarks.rivals import alike_page, environments, rivals, run_kvpress
from benchmarks.rivals.base import LeftOutError, ask_with
from benchmarks.rivals.folders import for_transformers_4
from benchmarks.rivals.inside import inside
from benchmarks.rivals.kv_pruning import KVPruning, _groups, _request
from benchmarks.rivals.lingua import Lingua
from benchmarks.rivals.matching import match
from benchmarks.rivals.process import Runner, RunnerError
from benchmarks.rivals.rivals_page import ALIKE, PUBLISHED, plot, tables
from benchmarks.rivals.run_llmlingua import even_window
from benchmarks.rivals.sentences import best_first, chosen
from compllm_rag.compression.compressor import Compressor
from compllm_rag.config import CompressorConfig
from compllm_rag.errors import ConfigurationError
from compllm_rag.evaluation.bodies import Setting
from compllm_rag.evaluation.journal import Journal
from compllm_rag.evaluation.questions import Question, SourcePassage
from compllm_rag.prompt import QAPrompt
from loft_corpus import run

FAKE = (sys.executable, "-m", "tests.benchmarks.fake_runner")
ASKED = ("Who?", "When was it built?", "Where?")


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return [
        Question(f"{i}-{j}", (SourcePassage(f"Rock {i}", toy.TEXT[60 * i : 60 * i + 300]),), asked, ("Ada",))
        for i in range(3)
        for j, asked in enumerate(ASKED)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.save(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def task(questions: list[Question], folder: Path):
    compressor = Compressor(toy.llm(), CompressorConfig())
    return rivals.prepared(compressor, str(folder), rivals.choose(questions, 6, 2), 4)


def fakes(folder: Path) -> list:
    return [
        *inside(),
        Lingua(folder, runner=(*FAKE, "lingua")),
        KVPruning("knorm", "KV pruning, Knorm", folder, runner=(*FAKE, "kv")),
        KVPruning("snapkv", "KV pruning, SnapKV", folder),
        Lingua(folder, classifier="toy", runner=(*FAKE, "refuses")),
    ]


def test_questions_of_a_passage_stay_together(questions: list[Question]) -> None:
    chosen = rivals.choose(questions, 5, 2)
    passages = [q.passages[0].text for q in chosen]
    assert passages[0] == passages[1] != passages[2] == passages[3] != passages[4]
    assert chosen == rivals.choose(questions, 5, 2) != rivals.choose(questions, 5, 2, seed=1)


def test_all_rivals_are_measured_on_the_same(task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.rivals.lingua.Lingua._classifier", lambda self: Path(task.llm))
    parts = tmp_path / "rivals.records.jsonl"
    same = {"questions": "these"}
    made = rivals.measure(task, fakes(tmp_path), [2.0, 4.0], Journal(parts, same))
    rows = {(row["name"], row["rate"]): row for row in made["rivals"]}
    names = ["concepts", "truncation", "pruning", "anchors", "mean", "bm25_sentences", "llmlingua", "kvpress_knorm"]
    assert list(rows) == [("none", None), ("text", None), *((n, r) for r in (2.0, 4.0) for n in names)]
    for rate in (2.0, 4.0):
        ours = rows["concepts", rate]
        for name in names:
            row = rows[name, rate]
            if name == "bm25_sentences":  # whole sentences, as far as they fit
                assert row["achieved_rate"] >= ours["achieved_rate"] and row["kv_positions"] <= ours["kv_positions"]
                continue
            assert row["achieved_rate"] == pytest.approx(ours["achieved_rate"], rel=0.05)
            assert row["prefill_cost"] == pytest.approx(
                1.0 if "kvpress" in name else 1 / row["achieved_rate"], abs=1e-3
            )
            if name != "llmlingua":
                assert row["kv_positions"] == ours["kv_positions"]
            assert set(row["to_text"]) == set(row["to_concepts"]) == {"f1", "em", "nll"}
        assert ours["to_concepts"]["nll"]["difference"] == 0
        # An untrained compressor is pruning to its anchors, which are the most informative tokens.
        assert ours["nll"] == pytest.approx(rows["pruning", rate]["nll"], abs=1e-3)
        assert rows["truncation", rate]["nll"] != rows["mean", rate]["nll"]
        pressed = rows["kvpress_knorm", rate]
        assert pressed["prefilled_positions"] == rows["text", None]["kv_positions"] > pressed["kv_positions"]
        assert (pressed["f1"], pressed["nll"]) == (100, 0.5)
        assert rows["llmlingua", rate]["notes"]["scorer_check"]["nll_there"] == 2.5
    assert made["left_out"] == {
        "kvpress_snapkv": {
            "title": "KV pruning, SnapKV",
            "why": "package kvpress has no environment",
            "how": "python -m benchmarks.rivals.environments make kvpress --folder DIR",
        },
        "llmlingua2": {
            "title": "LLMLingua-2",
            "why": "runner reports an error: ValueError: cannot compress this",
            "how": None,
        },
    }
    lines = parts.read_text().splitlines()
    assert len(lines) == 1 + len(made["rivals"]), "the run, and a line for each"
    again = rivals.measure(task, fakes(tmp_path), [2.0, 4.0], Journal(parts, same))
    assert again == made and parts.read_text().splitlines() == lines
    with pytest.raises(ConfigurationError, match="of another run"):
        Journal(parts, {"questions": "others"})
    assert parts.read_text().splitlines() == lines

    head = {"command": "compllm-rag bench rivals", "environment": {"commit": "0123456789"}, "llm": "toy"}
    head |= {"trained": False, "data": "squad_dev.jsonl.gz", "n": 6, "passages": 3, "rates": [2.0, 4.0]}
    page = "\n".join(tables(head | made))
    assert "### Rate 4" in page and "| mean of embeddings | " in page
    assert f"| {rows['truncation', 4.0]['nll']:.2f} |" in page
    assert "KV pruning, SnapKV was left out" in page and "environments make kvpress" in page
    ours, published = page.split("### Published by others")
    assert f"is the row `lingua2` of *{ALIKE}*" in ours and f"*{ALIKE}*" in published
    assert f"## {ALIKE}" in alike_page.about()
    assert "| LLMLingua-2 | 4 | 47.53 |" in published and "47.53" not in ours
    assert len(plot(head | made).axes) == 2


def test_command_line(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "eval").mkdir()
    qas = [{"id": str(j), "question": asked, "answers": ["Ada"]} for j, asked in enumerate(ASKED)]
    with gzip.open(tmp_path / "eval" / rivals.FILE, "wt") as file:
        file.write(json.dumps({"id": "a", "context": toy.TEXT[:200], "qas": qas}))
    out = tmp_path / "o.json"
    words = ["--llm", folder, "--data-dir", tmp_path, "--llmlingua2", "none", "--rivals", "truncation", "llmlingua"]
    words = [*words[:2], "--codec", "input", "--rates", 2, *words[2:]]
    record, _ = run("rivals", out, *words)
    assert (record["n"], record["passages"], record["trained"]) == (2, 1, False)
    assert [row["name"] for row in record["rivals"]] == ["none", "text", "concepts", "truncation"]
    assert record["left_out"]["llmlingua"]["how"] == "python -m benchmarks.rivals.environments make llmlingua"
    assert record["command"].startswith("compllm-rag bench rivals --llm") and record["environment"]["commit"]
    with pytest.raises(SystemExit):
        run("rivals", out, *words[:-1], "none-such")


def test_deep_concepts_are_compared_at_equal_positions_and_at_equal_prefill(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "eval").mkdir()
    qas = [{"id": str(j), "question": asked, "answers": ["Ada"]} for j, asked in enumerate(ASKED)]
    with gzip.open(tmp_path / "eval" / rivals.FILE, "wt") as file:
        file.write(json.dumps({"id": "a", "context": toy.TEXT[:300], "qas": qas}))
    words = ["--llm", folder, "--data-dir", tmp_path, "--llmlingua2", "none"]
    chosen = ["random", "input_concepts", "truncation", "pruning", "anchors", "mean", "bm25_sentences"]
    record, _ = run("rivals", tmp_path / "o.json", *words, "--rivals", *chosen)
    rows = {(row["name"], row["rate"]): row for row in record["rivals"]}
    among = [name for name in chosen if name != "input_concepts"]  # no such compressor ships for a toy
    assert set(rows) == {("none", None), ("text", None), ("concepts", 1.0)} | {
        (name, rate) for rate in (2.0, 4.0) for name in ("concepts", *among)
    }
    assert "no compressor of input concepts ships" in record["left_out"]["input_concepts"]["why"]
    assert rows["concepts", 1.0]["prefill_cost"] == 0.5 and rows["text", None]["prefill_cost"] == 1
    assert rows["random", 4.0]["prefill_cost"] == rows["concepts", 4.0]["prefill_cost"] < 0.14
    assert rows["anchors", 2.0]["kv_positions"] == rows["concepts", 2.0]["kv_positions"]
    pairs = {(pair["concepts_rate"], pair["name"], pair["rate"]) for pair in record["equal_prefill"]}
    assert {(1.0, "truncation", 2.0), (2.0, "truncation", 4.0), (2.0, "random", 2.0)} <= pairs
    assert not any(pair == (2.0, "truncation", 2.0) for pair in pairs)
    page = "\n".join(tables(record))
    assert "## Rivals of deep concepts" in page and "### At equal prefill cost" in page and "rivals_deep.png" in page
    assert "Published by others" not in page and len(plot(record).axes) == 2


def test_sentences_with_the_words_of_the_question_are_kept(task) -> None:
    text = "Gulls nest. The lamp burned oil. Stairs are closed. A boat came."
    question = Question("q", (SourcePassage("", text),), "Which oil did the lamp burn?", ("oil",))
    bm25s = pytest.importorskip("bm25s")
    kept = task.compressor.llm.tokenizer.decode(chosen(bm25s, task, question, text, 2.0))
    assert "The lamp burned oil." in kept and len(kept) < len(text)
    assert best_first(bm25s, ["a b", "c d"], "nothing here") == [0, 1]
    short = chosen(bm25s, task, question, "The lamp burned oil all night long in the tower.", 4.0)
    assert 0 < len(short) <= task.budget("The lamp burned oil all night long in the tower.", 4.0)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("fails", "OSError: no such model"),
        ("refuses", "ValueError: cannot compress this"),
        ("dies", "out of memory"),
        ("babbles", "does not keep to the protocol"),
        ("sleeps", "no answer"),
    ],
)
def test_a_runner_that_goes_wrong_is_told(kind: str, said: str) -> None:
    slow = 0.5 if kind == "sleeps" else 60.0
    with pytest.raises(RunnerError, match=said), Runner((*FAKE, kind), start_s=slow) as runner:
        assert runner.versions["torch"]
        runner.ask(op="compress")


def test_a_runner_that_is_not_there() -> None:
    with pytest.raises(RunnerError, match="does not start"), Runner(("/no/such/python",)):
        pass


@pytest.mark.parametrize("share", [lambda r: r, lambda r: min(1, 0.25 + r * 0.7), lambda r: r * r])
def test_rates_are_asked_for_until_the_tokens_match(share) -> None:
    def compress(rate: float) -> tuple[int, ...]:
        return tuple(range(round(200 * share(rate))))

    for budget in (60, 100, 160):
        found = match(compress, 200, budget)
        assert found.off(budget) <= 0.02 and found.tries <= 8
    # What cannot be reached is met as closely as it goes.
    assert len(match(lambda rate: tuple(range(90)), 200, 50).ids) == 90
    assert match(lambda rate: (), 200, 50).ids == ()


def test_windows_are_even() -> None:
    for n in (1, 30, 200, 201, 399, 401, 1000):
        size = even_window(n)
        windows = -(-n // 200)
        assert size <= 200 and windows * size <= n < windows * (size + 1)


def test_a_folder_that_transformers_4_reads(folder: Path, tmp_path: Path) -> None:
    config = json.loads((for_transformers_4(folder, tmp_path, "Other") / "config.json").read_text())
    assert config["rope_theta"] == 10000.0 and "rope_parameters" not in config
    assert config["torch_dtype"] == "float32" and config["architectures"] == ["LlamaForCausalLM"]
    tokenizer = json.loads((tmp_path / folder.name / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_kv_runner_reads_as_text_does_when_nothing_is_removed(
    task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task.compressor.llm.model.save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_kvpress", "--model", str(tmp_path)])
    answer = run_kvpress.load()
    text = {r.id: r for r in ask_with(task, Setting("text"))}
    prompt = QAPrompt(task.compressor.llm.tokenizer)
    groups = _groups(task, prompt, 2.0)
    assert len(groups) == 3 and all(group.kept < len(group.prefix) for group in groups)
    for group in groups:
        found = answer(_request(task, prompt, group, None))["answers"]
        for place, one in zip(group.places, found, strict=True):
            record = text[task.questions[place].id]
            assert -one["log_likelihood"] / record.n_tokens == pytest.approx(record.nll, abs=1e-4)
            decoded = task.compressor.llm.tokenizer.decode(one["ids"], skip_special_tokens=True)
            assert decoded == record.answer


def test_environments_are_known_by_their_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert environments.python_of("kvpress", tmp_path) is None
    python = tmp_path / "kvpress" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    (tmp_path / "kvpress" / "made-from.sha256").write_text(environments._digest("kvpress"))
    if os.name != "nt":
        assert environments.python_of("kvpress", tmp_path) == python
    (tmp_path / "kvpress" / "made-from.sha256").write_text("other pins")
    assert environments.python_of("kvpress", tmp_path) is None
    for name in environments.NAMES:
        lines = environments.pins(name).read_text().split()
        assert all("==" in line for line in lines) and any(line.startswith(f"{name}==") for line in lines)
        assert not any(line.startswith("nvidia") for line in lines)
    monkeypatch.setattr(sys, "argv", ["environments", "list", "--folder", str(tmp_path)])
    environments.main()
    assert capsys.readouterr().out == "llmlingua: not made\nkvpress: not made\n"


def test_published_numbers_name_their_source() -> None:
    known = json.loads(PUBLISHED.read_text())
    for entry in [*known["quality"], *known["speed"]]:
        assert all(entry[field] for field in ("model", "source", "place"))
    for table in known["quality"]:
        assert all(len(row["values"]) == len(table["columns"]) for row in table["rows"])


def save_classifier(folder: Path) -> Path:
    """A random token classifier with word pieces, named as LLMLingua-2 wants it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(prefix="##")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    core.train_from_iterator([toy.TEXT], trainer)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForTokenClassification(BertConfig(vocab_size=200, num_labels=2, initializer_range=0.5, **sizes))
    target = folder / "toy-bert-base-multilingual-cased"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def test_llmlingua_2_with_a_toy_classifier(task, tmp_path: Path) -> None:
    pytest.importorskip("llmlingua")
    here = (sys.executable, "-m", "benchmarks.rivals.run_llmlingua")
    rival = Lingua(tmp_path, classifier=str(save_classifier(tmp_path)), runner=here)
    outcome = rival.ask(task, 2.0)
    notes = outcome.notes
    assert notes["versions"]["llmlingua"] and notes["classifier"] == "toy-bert-base-multilingual-cased"
    assert notes["farthest_off"] < 0.1
    assert len(outcome.records) == len(task.questions) and all(r.answer is not None for r in outcome.records)
    with pytest.raises(LeftOutError, match="no such classifier"):
        Lingua(tmp_path, classifier=task.llm, runner=here).ask(task, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("rival", ["llmlingua", "kvpress"])
def test_packages_in_their_environments(task, rival: str) -> None:
    folder = Path(os.environ.get("COMPLLM_ENVIRONMENTS", "/nonexistent"))
    if environments.python_of(rival, folder) is None:
        pytest.skip(f"COMPLLM_ENVIRONMENTS names no folder with {rival}")
    chosen = [r for r in rivals.baselines(folder, None) if r.name.startswith(rival)]
    for one in chosen:
        notes = one.ask(task, 2.0).notes
        check = notes.get("check") or notes["scorer_check"]
        assert check["nll_there"] == pytest.approx(check["nll_here"], abs=1e-3)

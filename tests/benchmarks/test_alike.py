"""Rivals that are trained, on a toy model: each learns, takes the positions it claims, and is asked and resumed."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import toy
import toy_embedder
from benchmarks.rivals.alike_page import about, plot, tables
from benchmarks.rivals.base import LeftOutError
from benchmarks.rivals.trained.about import KINDS
from benchmarks.rivals.trained.fitting import Fit, HeldOut, Schedule
from benchmarks.rivals.trained.kv_distill import KVDistill, _KeptForward, _Whole
from benchmarks.rivals.trained.row import Cost, Projector, Row, Setup, middles, pooling
from benchmarks.rivals.trained.rows import DEFAULT, named
from compllm_rag.compression.loading import untrained_deep
from compllm_rag.compression.spec import embedding_rms, state_rms
from compllm_rag.config import CompressorConfig, GenerationConfig
from compllm_rag.errors import ConfigurationError
from compllm_rag.evaluation.bodies import Segmented
from compllm_rag.evaluation.questions import Question, SourcePassage
from compllm_rag.prompt import PromptPlan, TextSpan
from compllm_rag.training.examples import targets_of
from compllm_rag.training.objective import log_probabilities
from loft_corpus import run
from training_samples import write_world

LEARNED = [name for name in KINDS if name != "untrained"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("data"), rows=40)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_embedder.save_sentence_transformer(tmp_path_factory.mktemp("embedder"), toy.TEXT)


@pytest.fixture(scope="module")
def setup(world: Path, embedder: Path) -> Setup:
    return Setup(toy.llm(layers=3), world, entry_layer=1, rank=4, embedder=str(embedder))


def made(setup: Setup, word: str) -> Row:
    torch.manual_seed(0)
    return named(word).make(setup)


@pytest.mark.parametrize("name", LEARNED)
def test_it_learns_what_it_says_and_nothing_else(name: str, setup: Setup) -> None:
    row = made(setup, name)
    before = {n: p.detach().clone() for n, p in setup.llm.model.named_parameters()}
    fit = Fit(row, Schedule(1.0, batch=2), Path("nowhere"), {}, lambda line: None)
    examples = fit.examples(0)
    assert examples == fit.examples(0) != fit.examples(1)
    learned, first = row.learned(), row.loss(examples)
    optimizer = torch.optim.Adam(learned.values(), lr=3e-3)
    touched = set()
    for _ in range(6):
        optimizer.zero_grad()
        row.loss(examples).total.backward()
        touched |= {n for n, p in learned.items() if p.grad is not None and bool(p.grad.abs().any())}
        optimizer.step()
    # With LoRA's second factor at zero the first one has no gradient in the first step; later everything has.
    missed = {n for n in set(learned) - touched if not n.endswith("slots.embeddings")}
    assert not missed
    assert row.loss(examples).parts["loss"] < first.parts["loss"]
    assert all(torch.equal(p, before[n]) for n, p in setup.llm.model.named_parameters()), "the LLM stays as it is"


@pytest.mark.parametrize("word", [*KINDS, "deep@1", "icae@4", "encoder_deep@1"])
def test_it_takes_the_positions_that_it_claims(word: str, setup: Setup) -> None:
    row, text = made(setup, word), toy.TEXT[:700]
    body = row.material.body(text)
    [span] = row.spans(text, 3)
    k = row.size(text)
    n, rate = len(body), named(word).rate
    if word == "xrag":
        assert k == len(body.segments)
    else:
        assert n / rate <= k <= n / rate + len(body.segments)
    cost = row.cost(n / k)
    if isinstance(row, KVDistill):
        assert isinstance(span, TextSpan) and len(row.kept(body)) == k and span.ids == body.ids
        assert (cost.prefill, cost.kv) == (0, pytest.approx(k / n)) and cost.stored == pytest.approx(96 * k / n)
        return
    assert len(span) == k and span.passage == 3
    if isinstance(span, TextSpan):
        assert cost == Cost(k / n, k / n, k / n, 0)
        return
    assert not span.concepts.requires_grad
    assert span.deep == (row.halves is not None) and span.extent == (n if span.deep else k)
    assert cost.prefill == cost.kv == pytest.approx((2 / 3 if span.deep else 1) * k / n)
    here = CompressorConfig(entry_layer=1, opening=setup.opening)
    scale = state_rms(setup.llm, here) if span.deep else embedding_rms(setup.llm)
    assert 0.4 < float(span.concepts.square().mean().sqrt()) / scale < 2.5, (
        "to begin with, it is of the size of the rest"
    )
    if span.deep:
        places = span.places.tolist()
        assert places == sorted(set(places)) and places[-1] < n


def test_rows_that_start_alike_read_alike(setup: Setup) -> None:
    held_out = [HeldOut(made(setup, word), 2).look() for word in ("deep@1", "untrained@1", "mean_deep@1")]
    # LoRA begins as nothing, and the mean of one state is the state.
    assert held_out[0] == pytest.approx(held_out[1]) == pytest.approx(held_out[2])
    fixed = [HeldOut(made(setup, word), 2).text() for word in ("deep", "compllm")]
    assert fixed[0] == pytest.approx(fixed[1]), "segments and chunks of the same questions"


def test_keys_and_values_that_are_removed_are_those_that_training_hides(setup: Setup) -> None:
    row = made(setup, "kv_distill@2")
    assert isinstance(row, KVDistill)
    with torch.no_grad():
        for name, parameter in row.learned().items():
            if "lora_up" in name:
                parameter.normal_(std=0.2)
    example = Fit(row, Schedule(1.0, batch=1), Path("nowhere"), {}, lambda line: None).examples(1)[0]
    example = replace(example, branches=example.branches[:1])
    [branch], n = example.branches, len(example.bodies)
    assert n >= 1 and branch.prompt
    targets = targets_of([example], prompt_weight=0.0, kind_weights={}, device=setup.llm.device)
    with torch.no_grad():
        logp = log_probabilities(setup.llm, row.read([example])[0][targets.is_answer])
    trained = float(logp.gather(1, targets.ids[targets.is_answer][:, None]).sum())
    spans = [part if isinstance(part, TextSpan) else _Whole(part.ids, 0, part) for part in example.prefix]
    forward = _KeptForward(row, PromptPlan((*spans, TextSpan(branch.prompt))))
    logits = [forward.prefill()[:, None], forward.fork().extend(torch.tensor([branch.target[:-1]]))]
    said = torch.cat(logits, 1).log_softmax(-1)
    assert float(said.gather(2, torch.tensor(branch.target)[None, :, None]).sum()) == pytest.approx(trained, abs=1e-3)
    dropped = sum(len(body) - len(row.kept(body)) for body in example.bodies)
    assert forward._cache.get_seq_length() == forward._at - dropped > 0


def test_windows_are_refused_before_training(world: Path, embedder: Path) -> None:
    sliding = Setup(toy.llm("mistral", layers=3), world, 1, 4, str(embedder))
    with pytest.raises(LeftOutError, match="DynamicSlidingWindowLayer"):
        named("kv_distill").make(sliding)


def test_questions_are_asked_of_kept_keys_and_values(setup: Setup) -> None:
    compressor, text = untrained_deep(setup.llm, 1), toy.TEXT[:300]
    question = Question("q", (SourcePassage("Rock", text),), "Who?", ("Ada",))
    found = {}
    for word in ("kv_distill@1", "kv_distill@2"):
        asker = made(setup, word).asker(compressor, Segmented(compressor), GenerationConfig(max_new_tokens=4))
        [found[word]] = asker.ask([question], batch_size=1, answer=True, progress=lambda n: None)
    whole, half = found.values()
    n = whole.source_tokens
    assert whole.concepts == n and half.concepts == (n + 1) // 2 and whole.nll != half.nll
    plan = setup.units.prompt.plan("Who?", [("Rock", [TextSpan(setup.units.body(text).ids, 0)])])
    assert whole.positions == plan.positions == half.positions + n - half.concepts
    assert whole.answer and whole.cost == 0


def test_pooling_covers_everything_once() -> None:
    for n, k in ((7, 3), (5, 5), (240, 120), (9, 1)):
        weights = pooling(n, k)
        assert weights.shape == (k, n) and torch.allclose(weights.sum(1), torch.ones(k))
        assert bool(((weights > 0).sum(0) == 1).all()), "no state in two runs, none in no run"
        assert middles(n, k) == sorted(set(middles(n, k))) and middles(n, k)[-1] < n
    assert pooling(2, 5).argmax(1).tolist() == [0, 0, 0, 1, 1], "with fewer states than places they are repeated"
    assert middles(4, 4) == [0, 1, 2, 3]
    out = Projector(8, 16, 0.25)(torch.randn(5, 8))
    assert out.shape == (5, 16) and float(out.detach().square().mean().sqrt()) == pytest.approx(0.25, rel=0.01)


def test_a_run_goes_on_where_it_stood(setup: Setup, tmp_path: Path) -> None:
    schedule = Schedule(0.01, batch=1, looks=2, validation=2)

    def fit(schedule: Schedule = schedule) -> Fit:
        return Fit(made(setup, "xrag"), schedule, tmp_path / "xrag", {"rank": 4}, lambda line: None)

    begun = fit()
    found = begun.go()
    assert found["minutes"] >= 0.01 and found["steps"] > 2 and found["learned"] > 0
    assert found["curve"][0]["minutes"] == 0 and len(found["curve"]) >= 3
    again = fit()
    assert all(torch.equal(p, begun.weights[name]) for name, p in again.weights.items())
    assert again.go() == found, "nothing is left to do"
    with pytest.raises(
        ConfigurationError, match=r"trained with other settings: got minutes 0.1, expected minutes 0.01"
    ):
        fit(replace(schedule, minutes=0.1))


def test_rates_rise_and_fall_with_time() -> None:
    schedule = Schedule(10.0)
    rates = [schedule.rate(60 * minute) for minute in (0, 0.25, 0.5, 5, 10, 11)]
    assert rates == pytest.approx([0.02, 0.52 * 0.975, 0.95, 0.5, 0.02, 0.02])


def test_rows_are_named() -> None:
    assert named("deep") == named("deep@2.0") and named("deep").word == "deep@2" and named("xrag").word == "xrag"
    assert named("xrag").title == "xRAG" and named("icae@4").title == "ICAE-like slots, rate 4"
    assert {word.partition("@")[0] for word in DEFAULT} == set(KINDS)
    for wrong in ("gist", "deep@0.5", "deep@many", "xrag@2"):
        with pytest.raises(ConfigurationError, match="unknown row"):
            named(wrong)
    assert all(f"| `{name}` |" in "\n".join(about()) for name in KINDS)


def test_the_command(world: Path, embedder: Path, tmp_path: Path) -> None:
    folder = toy.save(tmp_path / "llm", layers=3)
    (world / "eval").mkdir(exist_ok=True)
    rows = [
        {"id": f"{i}", "title": f"Rock {i}", "context": toy.TEXT[60 * i : 60 * i + 300],
         "qas": [{"id": f"{i}-0", "question": "Who built it?", "answers": ["Ada Marsh"]}]}
        for i in range(3)
    ]  # fmt: skip
    with gzip.open(world / "eval" / "squad_dev.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, rows)))
    words: list[Any] = ["--llm", folder, "--data-dir", world, "--embedder", embedder, "--entry-layer", 1, "--limit", 3]
    words += ["--minutes", 0.002, "--validation", 2, "--rank", 2]
    chosen = ["untrained@2", "deep@2", "xrag", "kv_distill@2"]
    record, _ = run("alike", tmp_path / "o.json", *words, "--rows", *chosen)
    found = {row["name"]: row for row in record["rows"]}
    assert list(found) == chosen and (record["n"], record["entry_layer"], record["depth"]) == (3, 1, 3)
    assert found["untrained@2"]["steps"] == found["untrained@2"]["learned"] == 0 < found["deep@2"]["steps"]
    assert found["deep@2"]["to_ours"] is None and set(found["xrag"]["to_ours"]) == {"f1", "recovered"}
    text = record["text"]["positions"]
    saved = {name: text - row["positions"] for name, row in found.items()}
    assert saved["deep@2"] == saved["untrained@2"] == saved["kv_distill@2"] > 0 and saved["xrag"] > saved["deep@2"]
    assert len({row["nll"] for row in found.values()}) == 4
    _, told = run("alike", tmp_path / "o.json", *words, "--rows", "untrained", *chosen)
    assert told.count("done before") == 2 + len(chosen)
    more, _ = run("alike", tmp_path / "o.json", *words, "--rows", "lingua2", "deep@2")
    assert more["rows"][1] == found["deep@2"], "a row can be added"
    for row in record["rows"]:  # random weights gain nothing from text: give them something to draw
        row["recovered"], row["intervals"]["recovered"] = 50.0, [40.0, 60.0]
    record["left_out"] = {"icae@2": "loss is not finite"}
    page = "\n".join(tables(record))
    assert "* `icae@2` was left out: loss is not finite" in page
    assert "| KV-Distill, rate 2 |" in page and "(alike.png)" in page
    assert len(plot(record).axes) == 2
    with pytest.raises(ConfigurationError, match="is of another run"):
        run("alike", tmp_path / "o.json", *words, "--rows", "deep@2", "--seed", 1)
    with pytest.raises(SystemExit):
        run("alike", tmp_path / "o.json", "--data-dir", world, "--limit", "many")

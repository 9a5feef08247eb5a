"""What is asked, in which order, and what each mode reads."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import toy
import trained
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.rate_policies.losses import RATES
from compllm_rag.errors import ConfigurationError, PromptTooLongError, RateOutOfReachError
from compllm_rag.evaluation import asking, bodies
from compllm_rag.evaluation.journal import Journal
from compllm_rag.evaluation.questions import QuestionFile, read_questions
from compllm_rag.evaluation.results import METRICS, EvalConfig, EvalResult
from compllm_rag.evaluation.runner import evaluate, evaluate_many
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.reading.choice import FixedReadPolicy
from tests.evaluation.evaluation_samples import PARTS, questions
from tests.reading import read_samples

QUICK = EvalConfig(max_new_tokens=4)


def without_time(result: EvalResult) -> EvalResult:
    return replace(result, seconds=0.0)


def test_pruned_is_what_an_untrained_compressor_makes(compressor: Compressor) -> None:
    settings = [(mode, rate) for rate in (2.0, 4.0) for mode in ("concepts", "pruned")]
    found = evaluate_many(compressor, questions(), settings, config=QUICK)
    for concepts, pruned in zip(found[::2], found[1::2], strict=True):
        assert [r.answer for r in concepts.records] == [r.answer for r in pruned.records]
        assert concepts.nll == pytest.approx(pruned.nll, abs=1e-4)
        assert concepts.positions == pruned.positions
    assert found[0].positions > found[2].positions


def test_a_trained_compressor_keeps_the_rate_and_changes_the_rest(compressor: Compressor) -> None:
    made = trained.trained(compressor.llm)
    concepts, pruned, text = evaluate_many(
        made, questions(), [("concepts", 2), ("pruned", 2), ("text", None)], config=QUICK
    )
    tokens = segments = 0
    for question in questions():
        for passage in question.passages:
            cut = made.segmenter.split(passage.text)
            tokens += sum(map(len, cut))
            segments += sum(-(-len(segment) // 2) for segment in cut)
    assert concepts.achieved_rate == pruned.achieved_rate == tokens / segments
    assert text.achieved_rate is None
    assert concepts.positions == pruned.positions == text.positions - (tokens - segments) / 9
    assert abs((concepts.nll or 0) - (pruned.nll or 0)) > 1e-3


def test_many_is_one_by_one(compressor: Compressor) -> None:
    settings = [("none", None), ("pruned", 2.0), ("text", None)]
    together = evaluate_many(compressor, questions(), settings, config=QUICK, data="toy")
    for (mode, rate), result in zip(settings, together, strict=True):
        alone = evaluate(compressor, questions(), mode=mode, rate=rate, config=QUICK, data="toy")
        assert without_time(alone) == without_time(result)
        assert (result.mode, result.rate, result.data, result.n) == (mode, rate, "toy", 9)
    none, _, text = together
    assert none.positions < text.positions
    assert text.agreement == 100
    assert text.paired["f1"] == {"difference": 0, "interval": [0, 0]}


def test_any_generator_makes_the_answers_and_likelihoods_stay(compressor: Compressor) -> None:
    class Upper(LocalGenerator):
        def generate(self, plans, config=None):
            return [replace(made, text=made.text.upper()) for made in super().generate(plans, config)]

    own = evaluate(compressor, questions(), mode="pruned", rate=2.0, config=QUICK)
    other = evaluate(compressor, questions(), mode="pruned", rate=2.0, config=QUICK, generator=Upper(compressor.llm))
    assert [r.answer for r in other.records] == [r.answer.upper() for r in own.records]
    assert other.nll == pytest.approx(own.nll)


def test_order_and_limit(compressor: Compressor) -> None:
    expected = [q.id for q in questions()]
    random.Random(3).shuffle(expected)
    result = evaluate(compressor, questions(), mode="none", config=EvalConfig(limit=4, seed=3, max_new_tokens=2))
    assert [r.id for r in result.records] == expected[:4]
    assert (result.n, result.seed) == (4, 3)


def test_gold_passages_only(compressor: Compressor) -> None:
    asked = [questions()[7], replace(questions()[0], passages=(replace(questions()[0].passages[0], supporting=False),))]
    every = evaluate(compressor, asked, mode="text", config=QUICK)
    gold = evaluate(compressor, asked, mode="text", config=EvalConfig(passages="gold", max_new_tokens=4))
    assert [r.id for r in gold.records] == ["q7"]
    assert gold.skipped == (("q0", "no supporting passage"),)
    assert gold.records[0].source_tokens == len(compressor.segmenter.tokenize(PARTS[1]).ids)
    assert every.n == 2
    assert next(r for r in every.records if r.id == "q7").source_tokens == sum(
        len(compressor.segmenter.tokenize(part).ids) for part in PARTS
    )


def test_what_does_not_fit_is_named() -> None:
    llm = toy.llm(window=300)
    small = Compressor(llm, information=trained.information(llm))
    result = evaluate(small, QuestionFile(questions(), [("bad", "no answer")]), mode="pruned", config=QUICK)
    assert result.n == 8
    assert "q7" not in {r.id for r in result.records}
    shown = result.to_dict()["skipped"]
    assert shown["count"] == 2
    assert shown["first"][0] == "bad: no answer"
    assert shown["first"][1].startswith("q7: needs ")
    with pytest.raises(PromptTooLongError, match="q7 needs"):
        evaluate(small, [questions()[7]], mode="none")


def test_bad_rows_are_named(compressor: Compressor, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"id": "a", "context": "Ada built it.", "question": "Who?", "answers": ["Ada"]}\n'
        '{"id": "b", "context": "Ada built it.", "question": "Who?", "answers": []}\n'
        '{"id": "c", "question": "Who?", "answers": ["Ada"]}\n'
    )
    result = evaluate(compressor, read_questions(path), mode="text", config=QUICK)
    assert result.skipped == (("b", "no answer"), ("c", "no context"))
    assert [r.id for r in result.records] == ["a"]


def test_settings_that_make_no_sense(compressor: Compressor) -> None:
    with pytest.raises(ConfigurationError, match="unknown mode: got summary"):
        evaluate(compressor, questions(), mode="summary")
    with pytest.raises(ConfigurationError, match="needs a rate"):
        evaluate(compressor, questions(), mode="pruned", rate=None)
    with pytest.raises(RateOutOfReachError):
        evaluate(compressor, questions(), mode="concepts", rate=8)
    with pytest.raises(ConfigurationError, match="no question left"):
        evaluate(compressor, [], mode="text")


def test_small_caches_and_small_batches_change_nothing(compressor: Compressor, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = evaluate(compressor, questions(), mode="concepts", config=QUICK)
    monkeypatch.setattr(bodies, "_KEPT", 1)
    monkeypatch.setitem(asking.BATCH_POSITIONS, "cpu", 1)
    strained = evaluate(compressor, questions(), mode="concepts", config=QUICK)
    assert [r.answer for r in strained.records] == [r.answer for r in usual.records]
    assert strained.nll == pytest.approx(usual.nll, abs=1e-4)


def test_a_passage_is_compressed_once(compressor: Compressor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    compress = compressor.compress

    def counted(segments, n_concepts):
        seen.extend(map(tuple, segments))
        return compress(segments, n_concepts)

    monkeypatch.setattr(compressor, "compress", counted)
    evaluate(compressor, questions(), mode="concepts", config=EvalConfig(batch_size=2, max_new_tokens=2))
    assert sorted(seen) == sorted({tuple(s) for part in PARTS for s in compressor.segmenter.split(part)})


def test_progress_ends_at_one(compressor: Compressor) -> None:
    shown: list[tuple[str, float | None]] = []
    evaluate(
        compressor,
        questions(),
        mode="pruned",
        config=QUICK,
        progress=lambda message, share: shown.append((message, share)),
    )
    assert list(dict.fromkeys(message for message, _ in shown)) == [
        "text: 9 questions",
        "none: 9 questions",
        "pruned at rate 2: 9 questions",
    ]
    assert shown[-1] == ("pruned at rate 2: 9 questions", 1.0)


def test_json_is_round_and_short(compressor: Compressor) -> None:
    shown = evaluate(compressor, questions(), mode="pruned", config=QUICK).to_dict()
    assert list(shown) == [name for name in EvalResult.__dataclass_fields__ if name != "records"]
    assert shown["nll"] == round(shown["nll"], 4)
    assert list(shown["intervals"]) == list(METRICS)


def test_concepts_can_go_through_the_encoding_of_a_storage(compressor: Compressor) -> None:
    settings = [("concepts", 2.0), ("concepts", 2.0, "fp16"), ("concepts", 2.0, "int8"), ("concepts", 2.0, "int4")]
    made, fp16, int8, int4 = evaluate_many(trained.trained(compressor.llm), questions(), settings, config=QUICK)
    assert made.positions == fp16.positions == int4.positions
    losses = [result.nll for result in (made, fp16, int8, int4)]
    assert len(set(losses)) == 4 and losses == pytest.approx([made.nll] * 4, rel=0.05)
    again = evaluate_many(trained.trained(compressor.llm), questions(), settings[3:], config=QUICK)[0]
    assert without_time(again) == without_time(int4)
    with pytest.raises(ConfigurationError, match="int3"):
        evaluate_many(compressor, questions(), [("concepts", 2.0, "int3")], config=QUICK)


def test_a_run_that_was_interrupted_goes_on(
    compressor: Compressor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [("text", None), ("pruned", 2.0), ("pruned", 4.0)]
    whole = evaluate_many(compressor, questions(), settings, config=QUICK)
    asked: list[str] = []
    real = asking.Asker.ask

    def ask(self: asking.Asker, *args: Any, **more: Any) -> Any:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(str(self._setting))
        return real(self, *args, **more)

    monkeypatch.setattr(asking.Asker, "ask", ask)
    path = tmp_path / "kept" / "run.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate_many(compressor, questions(), settings, config=QUICK, journal=Journal(path))
    first = asked[:]
    with path.open("ab") as file:
        file.write(b'{"key": "torn')
    asked.clear()
    again = evaluate_many(compressor, questions(), settings, config=QUICK, journal=Journal(path))
    assert len(first) == 3 and len(asked) == 1 and not set(first) & set(asked)
    assert list(map(without_time, again)) == list(map(without_time, whole))
    asked.clear()
    evaluate_many(compressor, questions(), settings, config=QUICK, journal=Journal(path))
    assert not asked
    with pytest.raises(KeyboardInterrupt):  # other questions: all four settings are asked again
        evaluate_many(compressor, questions()[:3], settings, config=QUICK, journal=Journal(path))
    assert len(asked) == 3


@pytest.mark.parametrize("text", ["my notes\nmore\n", "a line without an end", '{"id": 1}'])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"line 1 of .*notes.txt is no finished part"):
        Journal(path)
    assert path.read_text() == text


@pytest.mark.parametrize("codec", ["deep", "input"])
def test_a_read_policy_is_a_mode_within_the_cost_of_its_rate(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compressor = read_samples.compressor(codec)
    config = EvalConfig(max_new_tokens=4)
    settings = [("budgeted", 2.0), ("concepts", 2.0), ("budgeted", 4.0)]
    journal = Journal()
    asked = questions()
    two, fixed, four = evaluate_many(compressor, asked, settings, config=config, journal=journal)
    assert (two.mode, two.rate) == ("budgeted", 2.0)
    share = (compressor.spec.depth - compressor.spec.config.entry_layer) / compressor.spec.depth
    for record, theirs in zip(two.records, fixed.records, strict=True):
        assert theirs.cost == theirs.concepts * share
        around = 40 * len(asked[0].passages)  # what is not spent on titles may go to sentences
        assert 0 < record.cost <= theirs.cost + around
        assert record.source_tokens == theirs.source_tokens and record.f1 is not None
    assert two.prefill_cost == sum(r.cost for r in two.records) / sum(r.source_tokens for r in two.records)
    assert four.prefill_cost < two.prefill_cost
    again = evaluate(compressor, asked, mode="budgeted", rate=2.0, config=config, journal=journal)
    assert again.records == two.records
    if codec == "deep":  # other losses are another run: here all concepts are predicted to lose all
        losing = trained.rising_losses(compressor, gain=2.0).model_copy(update={"offsets": (9.0,) * len(RATES)})
        monkeypatch.setattr(compressor, "losses", losing)
        other = evaluate(compressor, asked, mode="budgeted", rate=2.0, config=config, journal=journal)
        assert [r.concepts for r in other.records] != [r.concepts for r in two.records]
        monkeypatch.undo()
    policy = FixedReadPolicy("text")
    options = {"mode": "budgeted", "rate": 2.0, "config": config, "journal": journal}
    text = evaluate(compressor, asked, **options, read_policy=policy)
    assert text.records != two.records
    assert any(r.positions < t.positions for r, t in zip(text.records, two.records, strict=True))

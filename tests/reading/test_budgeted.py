"""The budgeted policy: within every budget, the likeliest first, and the least that would do."""

from __future__ import annotations

import pytest

from compllm_rag.errors import ConfigurationError, NotCalibratedError, ReadBudgetError
from compllm_rag.generation.costs import CostModel, Curve
from compllm_rag.prompt import ConceptSpan, TextSpan
from compllm_rag.reading.budget import ReadBudget
from compllm_rag.reading.budgeted import BudgetedReadPolicy
from compllm_rag.reading.kept import DEEP, checked_table, kept_at
from compllm_rag.reading.relevance import Weights
from tests.reading.read_samples import PARTS, library, read

COSTS = CostModel("toy", "i", 2, 4, "float32", "cpu", 1, Curve(0.01, 0.001, 0), Curve(0.005, 0.0005, 0),
                  Curve(0.005, 0.0005, 0), 0.0006, 512)  # fmt: skip


def taken(made, around: int = 5) -> tuple[int, int]:
    """Text tokens and concepts that were read."""
    read_ = [p for p in made if not p.reading.left_out]
    text = sum(len(s) for p in read_ for s in p.spans if isinstance(s, TextSpan)) + around * len(read_)
    return text, sum(len(s) for p in read_ for s in p.spans if isinstance(s, ConceptSpan))


@pytest.mark.parametrize("codec", ["deep", "input"])
@pytest.mark.parametrize("also", [(), (2.0, 4.0)])
@pytest.mark.parametrize("share", [0.12, 0.25, 0.5, 0.8])
def test_every_budget_is_kept_and_used(codec: str, also: tuple[float, ...], share: float) -> None:
    of = library(codec, also=also)
    size = sum(len(of.passage(text).ids) for text in PARTS)
    limit = share * size
    for name in ("positions", "prefill"):
        made, told = read(of, BudgetedReadPolicy(), {name: limit})
        text, concepts = taken(made)
        cost = text + concepts / (2 if codec == "deep" and name == "prefill" else 1)
        assert cost <= limit and [*told.values()] == [pytest.approx(cost)]
        assert cost > 0.7 * limit, "what is left is less than a sentence"
    made, told = read(of, BudgetedReadPolicy(), {"positions": limit, "prefill": limit / 2})
    text, concepts = taken(made)
    assert text + concepts <= limit and told["prefill_budget"] <= limit / 2


def test_what_answers_the_question_is_read_first() -> None:
    made, _ = read(library(), BudgetedReadPolicy(), {"prefill": 22})
    parts = [part for passage in made for part in passage.reading.parts]
    read_parts = [part for part in parts if part.used != "left out"]
    assert read_parts and all(part.why == "says marsh" for part in read_parts)
    assert all(part.why.endswith("; others are worth more") for part in parts if part not in read_parts)
    left_out = [passage.reading for passage in made if passage.reading.left_out]
    assert {reading.why for reading in left_out} == {"sentences of other passages were worth more within the budget"}


def test_with_room_for_all_everything_is_read_as_text() -> None:
    of = library()
    size = sum(len(of.passage(text).ids) for text in PARTS)
    made, _ = read(of, BudgetedReadPolicy(), {"prefill": size + 15})
    assert {part.used for p in made for part in p.reading.parts} == {"text"}
    made, _ = read(of, BudgetedReadPolicy(text=False), {"prefill": size + 15})
    assert {(part.used, part.rate) for p in made for part in p.reading.parts} == {("concepts", 1.0)}
    made, _ = read(of, BudgetedReadPolicy(), {"prefill": size + 15}, mode="text")
    assert {part.used for p in made for part in p.reading.parts} == {"text"}


def test_rates_that_are_stored_are_chosen_from_and_others_are_not() -> None:
    several = library(also=(2.0, 4.0))
    rates = {part.rate for p in read(several, BudgetedReadPolicy(), {"prefill": 60})[0] for part in p.reading.parts}
    assert {2.0, 4.0} & rates
    for policy in (BudgetedReadPolicy(), BudgetedReadPolicy(rates=(1.0, 3.0))):
        made, _ = read(library(), policy, {"prefill": 60})
        assert {part.rate for p in made for part in p.reading.parts if part.used == "concepts"} == {1.0}
    made, _ = read(several, BudgetedReadPolicy(rates=(4.0,), text=False), {"prefill": 60})
    assert {part.rate for p in made for part in p.reading.parts if part.used == "concepts"} == {4.0}


def test_a_table_of_ones_own_decides() -> None:
    of = library(also=(2.0,))
    made, _ = read(of, BudgetedReadPolicy(text=False, kept={1: 0.9, 2: 0.0}), {"prefill": 60})
    assert {part.rate for p in made for part in p.reading.parts if part.used == "concepts"} == {1.0}


@pytest.mark.parametrize("codec", ["deep", "input"])
@pytest.mark.parametrize("name", ["position_budget", "prefill_budget"])
def test_the_least_that_would_do_is_told_and_does(codec: str, name: str) -> None:
    field = name.removesuffix("_budget").replace("position", "positions")
    with pytest.raises(ReadBudgetError, match="smallest piece") as caught:
        read(library(codec), BudgetedReadPolicy(), {field: 2})
    least = int(str(caught.value).split(f"{name} of at least ")[1].split(":")[0])
    made, _ = read(library(codec), BudgetedReadPolicy(), {field: least})
    assert sum(not p.reading.left_out for p in made) == 1
    with pytest.raises(ReadBudgetError):
        read(library(codec), BudgetedReadPolicy(), {field: least - 1})


def test_a_time_is_kept_by_the_cost_model() -> None:
    of = library()
    for seconds in (0.08, 0.12):
        made, told = read(of, BudgetedReadPolicy(), {"ttft_s": seconds, "costs": COSTS})
        text, concepts = taken(made)
        assert told["ttft_budget_s"] == pytest.approx(1.05 * COSTS.prefill_s(30 + text, concepts))
        assert 0.8 * seconds < told["ttft_budget_s"] <= seconds
    with pytest.raises(ReadBudgetError, match=r"ttft_budget_s of at least 0\.\d+ s") as caught:
        read(of, BudgetedReadPolicy(), {"ttft_s": 0.02, "costs": COSTS})
    least = float(str(caught.value).split("at least ")[1].split(" s")[0])
    made, _ = read(of, BudgetedReadPolicy(), {"ttft_s": least, "costs": COSTS})
    assert sum(not p.reading.left_out for p in made) == 1


def test_with_a_time_nothing_is_compressed_that_text_is_sooner_than() -> None:
    made, _ = read(library(fill=False), BudgetedReadPolicy(), {"ttft_s": 0.12, "costs": COSTS})
    assert not any(isinstance(span, ConceptSpan) for p in made for span in p.spans)
    assert any(p.bypassed for p in made)
    quick = CostModel(**{**vars(COSTS), "compress_s_per_token": 1e-6})
    of = library(rate=4.0, fill=False)
    made, told = read(of, BudgetedReadPolicy(), {"ttft_s": 0.12, "costs": quick})
    assert any(isinstance(span, ConceptSpan) for p in made for span in p.spans)
    in_line = 1e-6 * sum(len(of.passage(text).ids) for text in PARTS)
    text, concepts = taken(made)
    assert told["ttft_budget_s"] == pytest.approx(in_line + 1.05 * quick.prefill_s(30 + text, concepts))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"positions": 0}, "position_budget makes no sense"),
        ({"positions": -3}, "above 0"),
        ({"prefill": 0.25}, "it is no share"),
        ({"prefill": float("nan")}, "above 0"),
        ({"ttft_s": "soon"}, "ttft_budget_s makes no sense"),
        ({"positions": True}, "above 0"),
    ],
)
def test_budgets_that_make_no_sense(options: dict, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        ReadBudget(**options)


def test_what_else_makes_no_sense() -> None:
    with pytest.raises(NotCalibratedError, match="compllm-rag calibrate"):
        ReadBudget(ttft_s=0.5)
    with pytest.raises(ConfigurationError, match="nothing to spend"):
        read(library(), BudgetedReadPolicy())
    with pytest.raises(ConfigurationError, match="at least 1"):
        BudgetedReadPolicy(rates=(0.5,))
    for table in ({}, {0.5: 1.0}, {2: 1.5}):
        with pytest.raises(ConfigurationError, match="what is kept"):
            BudgetedReadPolicy(kept=table)


def test_what_is_kept_falls_with_the_rate() -> None:
    table = checked_table(DEEP)
    rates = (1.0, 1.5, 2.0, 3.0, 4.0, 8.0)
    shares = [kept_at(rate, table) for rate in rates]
    assert shares == sorted(shares, reverse=True) and shares[0] == DEEP[1.0] and shares[4] == DEEP[4.0]
    assert shares[1] == pytest.approx((DEEP[1.0] + DEEP[2.0]) / 2) and shares[5] == DEEP[4.0] / 2


def test_weights_decide_what_is_likely() -> None:
    by_rank = BudgetedReadPolicy(weights=Weights(sentence=0, beside=0, passage=0, rank=5))
    made, _ = read(library(), by_rank, {"prefill": 18})
    assert not made[0].reading.left_out and made[1].reading.left_out


def test_what_is_far_behind_the_likeliest_is_left_out_though_there_is_room() -> None:
    of = library()
    size = sum(len(of.passage(text).ids) for text in PARTS)
    made, _ = read(of, BudgetedReadPolicy(weights=Weights(least=1.0)), {"prefill": size + 15})
    parts = [part for passage in made for part in passage.reading.parts]
    [best] = [part for part in parts if part.used != "left out"]
    assert best.used == "text" and best.why == "says marsh"
    assert all(part.why.endswith("; too far behind the likeliest") for part in parts if part is not best)
    [out, *_] = [passage.reading for passage in made if passage.reading.left_out]
    assert out.why == "all of it is too far behind the likeliest sentence"
    some, _ = read(of, BudgetedReadPolicy(weights=Weights(least=0.5)), {"prefill": size + 15})
    assert 1 < sum(part.used != "left out" for p in some for part in p.reading.parts) < len(parts)
    with pytest.raises(ReadBudgetError, match="at least"):
        read(of, BudgetedReadPolicy(weights=Weights(least=1.0)), {"prefill": 2})
    for least in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigurationError, match="relevance cutoff .* makes no sense"):
            Weights(least=least)

"""Policies that look at the text: dense texts keep more, predicted losses are minimised, tables stay text."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toy
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.rate_policies.asked import one_rate, options_of, rate_settings
from compllm_rag.compression.rate_policies.budget import chosen_at, kept_at, least_price
from compllm_rag.compression.rate_policies.choosing import Choice, RateChooser, chooser_of, described, resolved
from compllm_rag.compression.rate_policies.guard import EXACT_LIMIT, ExactGuard, LossGuard
from compllm_rag.compression.rate_policies.losses import RATES, InformationLosses, LossPredictor
from compllm_rag.compression.rate_policies.measures import FEATURES, TextMeasures, densest, dropped, surprisals
from compllm_rag.compression.rate_policies.policies import DENSITIES, InformationRate, LeastLossRate, PricedRate
from compllm_rag.compression.rates import FixedRate, concepts_at
from compllm_rag.config import IngestConfig, RateOptions
from compllm_rag.errors import BudgetError, ConfigurationError, RateOutOfReachError, UnsupportedFormatError
from compllm_rag.models.llm import TargetLLM

QUIET = settings(deadline=None, derandomize=True, database=None)
TABLE = "\n".join(
    f"{i},2024-03-{i:02d},{i * 7919 % 1000}.{i * 31 % 100},SKU_{i * 104729 % 9999}" for i in range(10, 28)
)
CODE = "def read_ids(rows: list[int]) -> dict[int, Row]:\n    return {row_id: self._rows[row_id] for row_id in rows}\n"


def measures_of(values: list[float]) -> TextMeasures:
    """Measures whose token i carries `values[i]` shares of ordinary text's information."""
    made = TextMeasures(lambda: pytest.fail("no compressor is needed"))
    made.__dict__["weight"] = np.array(values)
    return made


@pytest.fixture(scope="module")
def measures(llm: TargetLLM) -> TextMeasures:
    return TextMeasures(lambda: Compressor(llm))


def predictor(**changed: Any) -> LossPredictor:
    """Loss rises with the rate, and with the share of digits."""
    width = len(FEATURES)
    slope = [[0.0] * width for _ in RATES]
    for row, rate in zip(slope, RATES, strict=True):
        row[FEATURES.index("digits")] = rate
    fields = {
        "mean": (0.0,) * width,
        "scale": (1.0,) * width,
        "weights": tuple(map(tuple, slope)),
        "offsets": tuple(0.1 * (rate - 1) for rate in RATES),
        "units": 100,
    }
    return LossPredictor(**{**fields, **changed})


def test_dense_texts_get_low_rates_and_thin_ones_high_ones() -> None:
    dense, middle, thin = DENSITIES[0] + 0.1, sum(DENSITIES[1:3]) / 2, DENSITIES[3] - 0.1
    policy = InformationRate(measures_of([dense, middle, thin]), RateOptions(), 240)
    assert policy.rates([[0] * 100, [1] * 100, [2] * 100]) == pytest.approx([1.0, 2.25, 4.0])
    assert policy.n_concepts([[0] * 100, [1] * 100, [2] * 100]) == [100, 45, 25]
    article = InformationRate(measures_of([dense, middle, thin]), RateOptions(bands=(1.5, 2, 3, 4)), 240)
    assert article.rates([[0] * 50, [1] * 50, [2] * 50]) == pytest.approx([1.5, 2.5, 4.0])
    assert policy.rates([]) == [] and policy.n_concepts([]) == []


def test_a_unit_is_as_dense_as_its_densest_window() -> None:
    policy = InformationRate(measures_of([DENSITIES[3], DENSITIES[0]]), RateOptions(window=10), 240)
    mixed = [0] * 100 + [1] * 10 + [0] * 100
    assert policy.rates([[0] * 210, mixed]) == pytest.approx([4.0, 1.0])
    wide = InformationRate(measures_of([DENSITIES[3], DENSITIES[0]]), RateOptions(window=200), 240)
    assert wide.rates([mixed])[0] > 3
    assert densest(np.array([1.0, 5.0, 1.0]), 2) == 3.0 and densest(np.array([2.0]), 40) == 2.0


def test_bands_that_units_cannot_reach_are_refused() -> None:
    with pytest.raises(RateOutOfReachError, match="at most 3"):
        InformationRate(measures_of([1.0]), RateOptions(), 10)
    for bands in ((0.5, 1, 2, 3), (2, 1, 3, 4)):
        with pytest.raises(ValueError, match="rise from dense to thin"):
            RateOptions(bands=bands)


def test_surprisal_is_what_the_llm_says(llm: TargetLLM) -> None:
    compressor = Compressor(llm)
    unit = compressor.spec.units(toy.TEXT)[0]
    [found] = surprisals(compressor, [unit])
    end = llm.tokenizer.eos_token_id
    said = llm.model(input_ids=torch.tensor([[end, *unit]])).logits[0, :-1].log_softmax(-1)
    assert torch.allclose(found, -said[range(len(unit)), unit], atol=1e-5)
    by_llm = chooser_of(
        IngestConfig(rate="information", rate_options=RateOptions(measure="surprisal")),
        TextMeasures(lambda: compressor),
        20,
    )
    assert all(1 <= rate <= 4 for rate in by_llm.policy.rates([unit]))  # type: ignore[attr-defined]


@QUIET
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=60))
def test_what_is_dropped_falls_with_each_concept_by_less_and_less(values: list[float]) -> None:
    lost = [dropped(np.array(values), k) for k in range(len(values) + 1)]
    steps = [a - b for a, b in itertools.pairwise(lost)]
    assert lost[0] == pytest.approx(1) and lost[-1] == pytest.approx(0)
    assert all(step >= -1e-12 for step in steps)
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(steps))


def test_information_losses_are_none_at_rate_1_and_rise(measures: TextMeasures) -> None:
    units = [list(range(10, 30)), [11] * 7]
    lost = InformationLosses(measures).of(units, RATES)
    assert lost.shape == (2, len(RATES))
    assert lost[:, 0] == pytest.approx([0, 0])
    assert (np.diff(lost, axis=1) >= 0).all() and lost.max() < 1
    assert InformationLosses(measures).of([], RATES).shape == (0, len(RATES))


def test_features_are_finite_and_tell_kinds_of_text_apart(measures: TextMeasures, llm: TargetLLM) -> None:
    found = {}
    for name, text in {"prose": toy.TEXT, "table": TABLE, "code": CODE}.items():
        ids = llm.tokenizer(text, add_special_tokens=False)["input_ids"]
        row = measures.features(ids)
        assert row.shape == (len(FEATURES),) and np.isfinite(row).all()
        found[name] = dict(zip(FEATURES, row, strict=True)), measures.exact([ids])
    assert found["table"][0]["digits"] > 0.5 > found["prose"][0]["digits"]
    assert found["code"][0]["symbols"] > 5 * found["prose"][0]["symbols"]
    assert found["prose"][1] < EXACT_LIMIT < min(found["table"][1], found["code"][1])
    assert np.isfinite(measures.features([5])).all()


def test_a_predictor_is_written_and_read_and_its_losses_never_fall(tmp_path: Path) -> None:
    made = predictor()
    made.save(tmp_path)
    assert LossPredictor.load(tmp_path) == made
    assert LossPredictor.load(tmp_path / "elsewhere") is None
    features = np.zeros((2, len(FEATURES)))
    features[1, FEATURES.index("digits")] = 0.5
    lost = made.predict(features, [1, 1.75, 4])
    assert lost[0] == pytest.approx([0, 0.075, 0.3])
    assert lost[1] == pytest.approx([0.5, 0.95, 2.3])
    falling = predictor(offsets=tuple(-rate for rate in RATES))
    assert (falling.predict(features, RATES)[0] == 0).all()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 2}', '{"mean": [1]}'])
def test_a_damaged_predictor_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text(text)
    with pytest.raises(UnsupportedFormatError, match="train rates"):
        LossPredictor.load(tmp_path)


def test_a_predictor_of_other_features_is_refused() -> None:
    for changed in ({"features": FEATURES[:-1]}, {"offsets": (0.0,)}, {"mean": (0.0,)}, {"rates": RATES[::-1]}):
        with pytest.raises(ValueError, match=r"features|rise"):
            predictor(**changed)


class Table:
    """Losses by the first token of a unit."""

    def __init__(self, rows: dict[int, list[float]]) -> None:
        self.rows = rows

    def of(self, units: Any, rates: Any) -> Any:
        return np.array([[self.rows[unit[0]][RATES.index(rate)] for rate in rates] for unit in units])


EASY, HARD = [0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06], [0.2, 0.3, 0.5, 0.8, 1.2, 1.5, 2.0]


def test_the_highest_rate_below_the_limit_is_taken() -> None:
    policy = LeastLossRate(Table({1: EASY, 2: HARD, 3: [0, 0, 0, 0.2, 0.3, 0.4, 0.5]}), 0.1)
    assert policy.rates([[1] * 40, [2] * 40, [3] * 40]) == [4.0, 1.0, 1.5]
    assert policy.n_concepts([[1] * 40]) == [10]


def test_a_price_presses_what_loses_least_first() -> None:
    units = [[1] * 40, [2] * 40]
    free = PricedRate(Table({1: EASY, 2: HARD}))
    assert free.rates(units) == [1.0, 1.0]
    kept = []
    for price in (0.0, 0.1, 0.5, 1.0, 10.0, 1000.0):
        made = PricedRate(Table({1: EASY, 2: HARD}), price)
        easy, hard = made.rates(units)
        assert easy >= hard
        kept.append(sum(made.n_concepts(units)))
    assert kept == sorted(kept, reverse=True) and kept[0] == 80 and kept[-1] == 20
    assert PricedRate(Table({}), 1.0).rates([]) == []


@QUIET
@given(
    st.lists(st.lists(st.floats(0, 5), min_size=2, max_size=2), min_size=1, max_size=4),
    st.integers(0, 60),
)
def test_no_other_allocation_of_as_many_concepts_loses_less(steps: list[list[float]], spare: int) -> None:
    rates = (1.0, 2.0, 4.0)
    kept = kept_at([20] * len(steps), rates)
    lost = np.array([[0, first, first + second] for first, second in steps])
    least = int(kept.min(1).sum())
    price = least_price(lost, kept, least + spare)
    taken = chosen_at(price, lost, kept)
    units = range(len(steps))
    mine, used = sum(lost[i, j] for i, j in zip(units, taken)), sum(kept[i, j] for i, j in zip(units, taken))
    assert used <= least + spare
    for other in itertools.product(range(3), repeat=len(steps)):
        if sum(kept[i, j] for i, j in zip(units, other)) <= used:
            assert sum(lost[i, j] for i, j in zip(units, other)) >= mine - 1e-5
    assert price == 0 or sum(kept[:, 0]) > least + spare


def test_what_no_allocation_fits_says_the_least_that_would_do() -> None:
    kept = kept_at([20, 20], (1.0, 4.0))
    with pytest.raises(BudgetError, match="got 90 bytes, expected at least 100 bytes"):
        least_price(np.zeros((2, 2)), kept, 9, unit="bytes", size=10)
    assert least_price(np.zeros((0, 2)), kept_at([], (1.0, 4.0)), 0) == 0


def test_a_guard_leaves_tables_and_code_as_text(measures: TextMeasures, llm: TargetLLM) -> None:
    chooser = RateChooser(FixedRate(2, 20), [FixedRate(4, 20)], ExactGuard(measures))
    spec = Compressor(llm).spec
    kept, table = chooser.choose(spec.units(toy.TEXT)), chooser.choose(spec.units(TABLE))
    assert kept.rates == (2.0, 4.0) and kept.reason is None and kept.wished == 2.0
    assert len(kept.n_concepts) == 2 and kept.fits(spec.units(toy.TEXT)) and not kept.fits(spec.units(TABLE))
    assert (table.rates, table.n_concepts, table.reason) == ((), (), "guard")
    assert table.expected is not None and table.expected > EXACT_LIMIT and table.fits(spec.units(TABLE))
    assert chooser.choose([]).reason is None
    assert not chooser.plain and RateChooser(FixedRate(2, 20)).plain


def test_a_guard_by_loss_asks_at_the_rate_chosen() -> None:
    table = SimpleNamespace(of=lambda units, rates: np.array([[rates[0] - 1]]))
    guard = LossGuard(table, 0.5)
    assert guard.expected([[1] * 20], [20]) == 0
    assert guard.expected([[1] * 20, [1] * 20], [20, 10]) == pytest.approx(0.5)
    assert RateChooser(FixedRate(2, 240), (), guard).choose([[1] * 40]).reason == "guard"
    assert RateChooser(FixedRate(1, 240), (), guard).choose([[1] * 40]).reason is None


@pytest.mark.parametrize(
    "choice",
    [
        Choice((1.0,), ((3,),)),
        Choice((1.0,), ((0,),)),
        Choice((1.0,), ((1, 1),)),
        Choice((1.0, 2.0), ((1,),)),
        Choice((), ()),
        Choice((math.nan,), ((1,),)),
        Choice((1.0,), ((1,),), reason="guard"),
    ],
)
def test_a_choice_that_cannot_be_is_seen(choice: Choice) -> None:
    assert not choice.fits([[7, 8]])


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"rate": 2}, {"rate": 2.0}),
        ({"rate": "1.5"}, {"rate": 1.5}),
        ({"rate": "information"}, {"rate": "information"}),
        ({"rate": None, "rates": (1, 2, 4)}, {"rate": 1.0, "also_rates": (2.0, 4.0)}),
        ({"rate": None, "rates": ("auto", 4)}, {"rate": "auto", "also_rates": (4.0,)}),
        ({"rate": None, "budget": 5000}, {"rate": "budget", "budget_positions": 5000}),
        ({"rate": "auto", "budget": "40MB"}, {"rate": "budget", "budget_bytes": 40_000_000}),
        ({"rate": None, "budget": " 1.5 GiB"}, {"rate": "budget", "budget_bytes": 3 * 2**29}),
        ({"rate": None, "budget": "200_000"}, {"rate": "budget", "budget_positions": 200_000}),
        ({"rate": None, "budget": 200_000.0}, {"rate": "budget", "budget_positions": 200_000}),
        ({"rate": None, "budget": "40,5MB"}, {"rate": "budget", "budget_bytes": 40_500_000}),
        ({"rate": None, "budget": "1.125MB"}, {"rate": "budget", "budget_bytes": 1_125_000}),
        ({"rate": None, "guard": "exact"}, {"guard": "exact"}),
        ({"rate": None}, {}),
    ],
)
def test_what_users_ask_for(asked: dict[str, Any], expected: dict[str, Any]) -> None:
    assert rate_settings(**asked) == expected


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"rate": "fast"}, "number of at least 1, or auto, information, learned, budget"),
        ({"rate": 0.5}, "at least 1"),
        ({"rate": "nan"}, "at least 1"),
        ({"rate": 2, "rates": (1, 2)}, "exclude"),
        ({"rate": None, "rates": ()}, "one or more"),
        ({"rate": None, "rates": 2}, "one or more"),
        ({"rate": None, "rates": (1, "information")}, "first of several"),
        ({"rate": 2, "budget": 100}, "chooses the rates itself"),
        ({"rate": None, "rates": ("auto", 2), "budget": 100}, "chooses the rates itself"),
        ({"rate": "budget"}, "--budget 40MB"),
        ({"rate": None, "budget": "40 parsecs"}, "40MB"),
        *(
            ({"rate": None, "budget": told}, "cannot be read")
            for told in ("200,000", "200.000", "1,000,000", "1.000.000", "1,500MB", "1_000.5", "1e6", -1, True)
        ),
        ({"rate": None, "budget": 0}, "at least 1 position"),
        ({"rate": None, "budget": 1.5}, "cannot be read|whole number"),
        ({"rate": None, "guard": "on"}, "off, exact, loss"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_would(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        rate_settings(**asked)


def test_auto_takes_what_was_learned_where_it_was() -> None:
    assert resolved("auto", SimpleNamespace(losses=None)) == "information"
    assert resolved("auto", SimpleNamespace(losses=predictor())) == "learned"
    assert resolved(one_rate("2"), SimpleNamespace(losses=None)) == 2.0


def test_settings_that_differ_are_described_differently() -> None:
    configs = [
        IngestConfig(rate=2),
        IngestConfig(rate=1),
        IngestConfig(rate=1, also_rates=(2,)),
        IngestConfig(rate="information"),
        IngestConfig(rate="information", rate_options=RateOptions(window=20)),
        IngestConfig(rate="learned"),
        IngestConfig(rate=1, guard="exact"),
        IngestConfig(rate=1, guard="exact", guard_limit=0.5),
    ]
    assert len({described(config) for config in configs}) == len(configs)
    assert described(IngestConfig(rate=2)) == "FixedRate(2.0)"


def test_a_learned_policy_without_anything_learned_says_how_to_learn(llm: TargetLLM) -> None:
    chooser = chooser_of(IngestConfig(rate="learned"), TextMeasures(lambda: Compressor(llm)), 20)
    with pytest.raises(ConfigurationError, match="train rates"):
        chooser.choose([[1, 2, 3]])
    learned = Compressor(llm)
    learned.losses = predictor()
    chosen = chooser_of(IngestConfig(rate="learned"), TextMeasures(lambda: learned), 20).choose([list(range(20))])
    assert chosen.n_concepts == ((concepts_at(chosen.wished or 0, 20),),)


@pytest.mark.parametrize(
    "asked",
    [
        {"rate": 2.0},
        {"rates": ("information", 4.0), "guard": "exact", "guard_limit": 0.3, "rate_options": {"measure": "surprisal"}},
        {"budget": 200000},
        {"budget": "40MB"},
    ],
)
def test_settings_give_back_the_options_that_make_them(asked: dict[str, Any]) -> None:
    def made(options: dict[str, Any]) -> IngestConfig:
        further = {name: options[name] for name in ("guard_limit", "rate_options") if options.get(name) is not None}
        named = (options.get(name) for name in ("rate", "rates", "budget", "guard"))
        return IngestConfig.model_validate(rate_settings(*named) | further)

    assert made(options_of(made(asked))) == made(asked)

"""What concepts count in the budgeted policy: by predicted losses of their passage, or else by a table of rates."""

from __future__ import annotations

import re
from typing import Any

import pytest

from compllm_rag.compression.rate_policies.losses import RATES, LossPredictor
from compllm_rag.compression.rate_policies.measures import FEATURES, TextMeasures
from compllm_rag.compression.rate_policies.shares import LEAST_GAIN, PredictedShares, shares_identity, shares_of
from compllm_rag.errors import ConfigurationError, ReadBudgetError
from compllm_rag.library import ConceptLibrary
from compllm_rag.reading.budgeted import BudgetedReadPolicy
from compllm_rag.reading.kept import DEEP, kept_at
from compllm_rag.reading.passages import Decision
from compllm_rag.store.memory import MemoryStore
from tests.reading.read_samples import PARTS, decided, library
from trained import trained_deep

DIGITS = FEATURES.index("digits")


def predictor(of: ConceptLibrary, *, digits: float = 0.0, **changed: Any) -> LossPredictor:
    """Loss rises with the rate, the faster the more digits there are; text gains 2 nats."""
    width = len(FEATURES)
    slope = [[0.0] * width for _ in RATES]
    for row, rate in zip(slope, RATES, strict=True):
        row[DIGITS] = digits * (rate - 1)
    fields = {
        "mean": (0.0,) * width,
        "scale": (1.0,) * width,
        "weights": tuple(map(tuple, slope)),
        "offsets": tuple(0.1 * (rate - 1) for rate in RATES),
        "units": 100,
        "compressor": of.spec.fingerprint,
        "gain": 2.0,
    }
    return LossPredictor(**{**fields, **changed})


def predicting(monkeypatch: pytest.MonkeyPatch, also: tuple[float, ...] = (), **changed: Any) -> ConceptLibrary:
    of = library(also=also)
    monkeypatch.setattr(of.compressor, "losses", predictor(of, **changed))
    return of


def shares_told(found: Decision) -> set[tuple[int, float | None, float | None]]:
    """(passage, rate, share) of what is read as concepts."""
    parts = [(n, part) for n, one in enumerate(found.passages) for part in one.reading.parts]
    return {(n, part.rate, part.kept) for n, part in parts if part.used == "concepts"}


def test_shares_are_what_predicted_losses_leave_of_the_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    of = predicting(monkeypatch, (2.0, 4.0), digits=3.0)
    found = decided(of, BudgetedReadPolicy(text=False), {"prefill": 55})
    assert found.told["kept"] == {"by": "predicted losses", "why": "they are fitted to this compressor"}
    names = [shares_identity(predictor(of, digits=d), of.spec.fingerprint) for d in (3.0, 3.0, 4.0)]
    assert names[0] == names[1] != names[2] != {}
    told = shares_told(found)
    assert len({rate for _, rate, _ in told}) > 1 and len({n for n, _, _ in told}) > 1
    measures = TextMeasures(lambda: pytest.fail("nothing is loaded for it"), of.llm)
    for n, rate, share in told:
        passage = of.passage(PARTS[n], rate=rate)
        [unit], [k] = passage.segments, passage.n_concepts
        features = measures.features(unit)
        lost = (len(unit) / k - 1) * (0.1 + 3.0 * features[DIGITS])  # at the rate its concepts come to
        assert share == pytest.approx(1 - lost / 2.0), "in straight lines between rates"
    by_rate: dict[float | None, set[float | None]] = {}
    for _, rate, share in told:
        by_rate.setdefault(rate, set()).add(share)
    assert any(len(shares) > 1 for rate, shares in by_rate.items() if rate != 1), "passages differ at the same rate"


def test_a_passage_that_loses_much_is_read_at_a_lower_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts are worth the same, and only the digits in them tell how far they can be pressed."""
    numbers = "The price was 17 then 38 then 4291 and 5566 in 1781 before 3192 fell to 744."
    words = "The keeper went down to the sea and came back up in the dark of the night."
    made = trained_deep(library().llm)
    of = ConceptLibrary(made, MemoryStore(made.spec.width), rate=1.0, also_rates=(4.0,))
    of.ensure([numbers, words])
    shares = shares_of(predictor(of, digits=5.0), of.spec.fingerprint, TextMeasures(lambda: made))
    assert isinstance(shares, PredictedShares)
    found = [
        shares.of(passage.segments, passage.n_concepts)
        for text in (numbers, words)
        for passage in (of.passage(text, rate=4.0),)
    ]
    assert found[0] < 0.4 < 0.8 < found[1]


def test_shares_stay_between_0_and_1_and_fall_with_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    of = predicting(monkeypatch)
    unit = list(of.passage(PARTS[0]).segments[0])
    for changed in ({}, {"digits": 100.0}, {"offsets": (9.0,) * len(RATES)}, {"offsets": (-9.0,) * len(RATES)}):
        shares = shares_of(predictor(of, **changed), of.spec.fingerprint, TextMeasures(lambda: of.compressor))
        assert isinstance(shares, PredictedShares)
        found = [shares.of([unit], [k]) for k in range(len(unit), 0, -1)]
        assert found == sorted(found, reverse=True) and 0 <= found[-1] <= found[0] <= 1
        assert shares.of([unit], [0]) == 0 and shares.of([], []) == 1
    shares = shares_of(predictor(of), of.spec.fingerprint, TextMeasures(lambda: of.compressor))
    assert isinstance(shares, PredictedShares)
    at = {k: shares.of([unit[:48]], [k]) for k in (12, 6)}
    assert at[12] == pytest.approx(0.85) and at[6] == pytest.approx(at[12] / 2), "above rate 4 by proportion"
    both = shares.of([unit[:40], unit[:20]], [10, 20])
    assert both == pytest.approx((40 * 0.85 + 20 * 1.0) / 60), "each unit by its tokens, at its own rate"


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (lambda of: None, "no losses are fitted to this compressor"),
        (lambda of: predictor(of, compressor="another"), "fitted to another one"),
        (lambda of: predictor(of, gain=None), "without what text gains over no passage.*--gain-only"),
        (lambda of: predictor(of, gain=LEAST_GAIN / 2), "gained too little"),
    ],
)
def test_without_predicted_shares_the_table_decides_and_says_why(
    monkeypatch: pytest.MonkeyPatch, losses: Any, said: str
) -> None:
    of = library(also=(2.0,))
    monkeypatch.setattr(of.compressor, "losses", losses(of))
    found = decided(of, BudgetedReadPolicy(text=False), {"prefill": 60})
    assert found.told["kept"]["by"] == "table" and re.search(said, found.told["kept"]["why"])
    assert shares_identity(of.compressor.losses, of.spec.fingerprint) == {}
    for n, rate, share in shares_told(found):
        assert share == kept_at(of.passage(PARTS[n], rate=rate).achieved_rate, DEEP)


def test_a_table_that_is_given_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    of = predicting(monkeypatch, (2.0,))
    found = decided(of, BudgetedReadPolicy(text=False, kept={1: 0.9, 2: 0.0}), {"prefill": 60})
    assert found.told["kept"] == {"by": "table", "why": "it was given"}
    assert {(rate, share) for _, rate, share in shares_told(found)} == {(1.0, 0.9)}


def test_concepts_that_are_predicted_to_keep_nothing_come_last_and_are_read_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of = predicting(monkeypatch, offsets=(9.0,) * len(RATES))
    found = decided(of, BudgetedReadPolicy(text=False), {"prefill": 60})
    assert {share for _, _, share in shares_told(found)} == {0.0}
    found = decided(of, BudgetedReadPolicy(), {"prefill": 60})
    read = [part for one in found.passages for part in one.reading.parts if part.used != "left out"]
    text = [part for part in read if part.used == "text"]
    assert sum(part.end - part.start for part in text) > 30
    with pytest.raises(ReadBudgetError, match="smallest piece"):
        decided(of, BudgetedReadPolicy(text=False), {"prefill": 2})


def test_a_table_under_which_nothing_keeps_anything_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="keeps anything"):
        decided(library(), BudgetedReadPolicy(text=False, kept={1: 0.0}), {"prefill": 60})
    with pytest.raises(ReadBudgetError) as caught:  # the least is of what would be read: text
        decided(library(), BudgetedReadPolicy(kept={1: 0.0}), {"prefill": 6})
    least = int(str(caught.value).split("prefill_budget of at least ")[1].split(":")[0])
    found = decided(library(), BudgetedReadPolicy(kept={1: 0.0}), {"prefill": least})
    assert sum(not one.reading.left_out for one in found.passages) == 1

"""The rows of `rates`: policies that choose rates, and rivals at the prefill cost of fixed ones."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.planner.contenders import InOrder
from benchmarks.rates.bodies import ChosenBodies, priced
from compllm_rag.compression.rate_policies.choosing import RateChooser, best_losses, chooser_of, rates_within
from compllm_rag.compression.rate_policies.measures import TextMeasures
from compllm_rag.compression.rate_policies.policies import PricedRate
from compllm_rag.compression.rates import max_rate
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import IngestConfig, RateOptions
from compllm_rag.evaluation.bodies import PassageBodies, Segmented, Setting
from compllm_rag.evaluation.read_policies import QuestionBodies

ARTICLE = (1.5, 2.0, 3.0, 4.0)
ARTICLES_BANDS = "information, article's bands"
# What `--rows` may name; text and no passages are always asked, because the others stand against them.
GROUPS = ("fixed", "information", "learned", "budget", "guard", "random", "BM25")
# Fixed rates whose prefill rivals may take.
RIVAL_RATES = (2.0, 4.0)

# Of a row, given the passages of all questions: the setting, and what stands for passages if the setting does not say.
Make = Callable[[ConceptCompressor, Segmented, Sequence[str]], tuple[Setting, PassageBodies | None]]


def group_of(label: str) -> str:
    """Which of `GROUPS` a row belongs to."""
    return "guard" if label.endswith("guard") else label.split()[0].rstrip(",")


def rivals_of(rate: float) -> tuple[str, str]:
    """Labels of what takes as much prefill as a fixed rate: places taken by chance, sentences by the question."""
    return f"random {rate:g}", f"BM25 sentences, as fixed {rate:g}"


def unavailable(compressor: ConceptCompressor) -> dict[str, str]:
    """Groups that a compressor has no rows of, each with the reason."""
    found = {}
    if compressor.losses is None:
        found["learned"] = "the compressor has no learned losses; fit them with `compllm-rag train rates`"
    if not compressor.config.deep:
        found["random"] = "only deep concepts can stand at any places"
    return found


def choosers(compressor: ConceptCompressor, args: Namespace) -> dict[str, RateChooser]:
    """Policies that are compared, by name; budgets get their price later."""
    longest = compressor.config.longest_unit
    measures = TextMeasures(lambda: compressor)
    make = partial(chooser_of, measures=measures, longest_unit=longest)
    found = {f"fixed {rate:g}": make(IngestConfig(rate=rate)) for rate in args.rates if rate <= max_rate(longest)}
    found["information"] = make(IngestConfig(rate="information"))
    found[ARTICLES_BANDS] = make(IngestConfig(rate="information", rate_options=RateOptions(bands=ARTICLE)))
    if compressor.losses is not None:
        for limit in args.losses:
            options = RateOptions(most_loss=limit)
            found[f"learned {limit:g}"] = make(IngestConfig(rate="learned", rate_options=options))
    for share in args.shares:
        policy = PricedRate(best_losses(measures), choices=rates_within(longest))
        found[f"budget {share:g}"] = RateChooser(policy)
    found["fixed 2 with guard"] = make(IngestConfig(rate=2.0, guard="exact"))
    return found


def rows_of(compressor: ConceptCompressor, args: Namespace) -> dict[str, Make]:
    """What is asked beside text and nothing, by label, of the groups wanted."""
    found: dict[str, Make] = {
        label: partial(_chosen, label, chooser) for label, chooser in choosers(compressor, args).items()
    }
    for rate in RIVAL_RATES:
        chance, sentences = rivals_of(rate)
        if rate <= max_rate(compressor.config.longest_unit):
            found[sentences] = partial(_sentences, rate)
            if compressor.config.deep:
                found[chance] = partial(_chance, rate)
    return {label: make for label, make in found.items() if group_of(label) in (args.rows or GROUPS)}


def _chosen(
    label: str, chooser: RateChooser, compressor: ConceptCompressor, segmented: Segmented, passages: Sequence[str]
) -> tuple[Setting, PassageBodies | None]:
    if isinstance(chooser.policy, PricedRate):
        priced(chooser.policy, segmented, passages, float(label.split()[1]))
    return Setting("concepts", 1.0), ChosenBodies(compressor, chooser, segmented)


def _chance(
    rate: float, compressor: ConceptCompressor, segmented: Segmented, passages: Sequence[str]
) -> tuple[Setting, PassageBodies | None]:
    return Setting.of("random", rate), None


def _sentences(
    rate: float, compressor: ConceptCompressor, segmented: Segmented, passages: Sequence[str]
) -> tuple[Setting, PassageBodies | None]:
    return Setting("text"), QuestionBodies(compressor, rate=rate, policy=InOrder(by_words=True, cut=True), mode="text")

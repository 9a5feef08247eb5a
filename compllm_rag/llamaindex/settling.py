"""Keeping a storage within its budget: before a commit, all its chunks share what there is."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from llama_index.core.schema import BaseNode, MetadataMode

from compllm_rag.catalog.accounts import Accounts
from compllm_rag.catalog.catalog import Catalog
from compllm_rag.catalog.pending import PendingChunks
from compllm_rag.compression.rate_policies.budget import chosen_at, kept_at, least_price
from compllm_rag.compression.rate_policies.choosing import Choice
from compllm_rag.compression.rate_policies.measures import Floats
from compllm_rag.compression.rate_policies.policies import PricedRate
from compllm_rag.config import IngestConfig
from compllm_rag.library import ConceptLibrary, EnsureReport
from compllm_rag.llamaindex.tracing import traced_ensure
from compllm_rag.llamaindex.tracked_store import NodeStore

logger = logging.getLogger(__name__)

REFIT_KEY = "compllm/refit"  # setting: the budget was changed, and chunks do not share the new one yet
PRICE_KEY = "compllm/price"  # setting: what a concept costs, in predicted loss
_PAGE = 256


class Budgeted(Protocol):
    """What has a budget: the parts of a `ConceptIndex` that this takes."""

    accounts: Accounts
    pending: PendingChunks
    config: IngestConfig
    library: ConceptLibrary
    faiss: NodeStore


def open_price(library: ConceptLibrary, catalog: Catalog) -> None:
    """Give the policy of a storage with a budget the price that its chunks have."""
    if isinstance(library.policy, PricedRate):
        library.policy.price = float(catalog.get_meta(PRICE_KEY) or 0.0)
        library.forget_choices()


def is_due(index: Budgeted) -> bool:
    """Whether a storage has a new budget."""
    return index.library.chooser.budgeted and bool(index.faiss.catalog.get_meta(REFIT_KEY))


def settle(index: Budgeted) -> list[str]:
    """Raise the price of a concept until all chunks of a storage fit its budget, if they do not.

    A new budget is shared out anew, whether it is higher or lower.

    Those whose rate changes wait for their concepts from then on, see `complete`.

    Returns:
        Their node ids.

    Raises:
        BudgetError: Nothing fits; it says the least budget that would do.
    """
    policy, choices = index.library.policy, index.accounts.choices
    if not isinstance(policy, PricedRate):
        return []
    size = index.library.store.encoding.nbytes(1, index.library.spec.width)
    of_bytes = index.config.budget_bytes is not None
    budget = (index.config.budget_bytes or 0) // size if of_bytes else index.config.budget_positions or 0
    due = is_due(index)
    if choices.concepts() <= budget and not due:
        return []
    known = list(choices.priced())
    rows = [row for _, choice in known for row in choice.lost]
    lost = np.array(rows).reshape(len(rows), len(policy.choices))  # (n_units, n_rates)
    kept = kept_at([size for _, choice in known for size in choice.sizes], policy.choices)
    policy.price = least_price(
        lost, kept, budget, unit="bytes" if of_bytes else "positions", size=size if of_bytes else 1
    )
    changed = dict(_changed(known, [policy.choices[i] for i in chosen_at(policy.price, lost, kept)], kept, policy))
    logger.info("%d chunks give up concepts, so that all fit %d positions", len(changed), budget)
    index.faiss.catalog.set_meta(PRICE_KEY, repr(policy.price))
    if due:
        index.faiss.catalog.set_meta(REFIT_KEY, "")
    return _replace(index, {digest: choice for digest, choice in known if digest in changed}, changed)


def _changed(
    known: Sequence[tuple[str, Choice]], rates: Sequence[float], kept: Floats, policy: PricedRate
) -> Iterable[tuple[str, Choice]]:
    """The choices that differ from those known, with their text's digest."""
    at = 0
    for digest, choice in known:
        own = rates[at : at + len(choice.sizes)]
        ks = tuple(int(kept[at + i, policy.choices.index(rate)]) for i, rate in enumerate(own))  # K of each unit
        at += len(choice.sizes)
        if (ks,) != choice.n_concepts:
            total = sum(choice.sizes)
            wished = total / sum(size / rate for size, rate in zip(choice.sizes, own, strict=True))
            yield digest, replace(choice, rates=(total / sum(ks),), n_concepts=(ks,), wished=wished)


def _replace(index: Budgeted, former: Mapping[str, Choice], changed: Mapping[str, Choice]) -> list[str]:
    """Put other choices in the place of those that chunks had; gives the ids of the nodes that lack concepts then."""
    index.accounts.choices.put(changed)
    index.library.forget_choices()
    waiting = list[str]()
    for nodes in index.faiss.iter_pages():
        lacking = {}
        for node in nodes:
            now = index.library.passage(_text(node))
            if now.digest in changed:
                before = index.library.passage_as(_text(node), former[now.digest])
                index.accounts.replace(node.ref_doc_id or "", before, now)
                there = index.library.store.contains(list(now.all_keys))
                lacking[node.node_id] = [key for key, held in zip(now.all_keys, there, strict=True) if not held]
        index.pending.forget(lacking)
        index.pending.add({node_id: keys for node_id, keys in lacking.items() if keys})
        waiting += [node_id for node_id, keys in lacking.items() if keys]
    return waiting


def complete(index: Budgeted) -> EnsureReport:
    """Make the concepts of all chunks that wait for them."""
    waiting = list(index.pending.nodes())
    total = EnsureReport(0, 0, 0, 0, 0, 0.0)
    for start in range(0, len(waiting), _PAGE):
        page = waiting[start : start + _PAGE]
        made = traced_ensure(index.library, (_text(node) for node in index.faiss.get_nodes(page)))
        index.library.store.flush()
        index.pending.forget(page)
        total = replace(
            total,
            segments=total.segments + made.segments,
            compressed=total.compressed + made.compressed,
            reused=total.reused + made.reused,
            seconds=total.seconds + made.seconds,
        )
    return total


def _text(node: BaseNode) -> str:
    return node.get_content(metadata_mode=MetadataMode.NONE)

"""What a read policy decided for retrieved nodes, as a prompt's planner takes it and as accounts tell it."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from llama_index.core.schema import NodeWithScore

from compllm_rag.config import MissingChoice, Narrowing
from compllm_rag.errors import ReadBudgetError
from compllm_rag.generation.costs import CostModel
from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.account import NodeBody
from compllm_rag.llamaindex.node_text import found_spans, shown_metadata, text_of_node
from compllm_rag.prompt import PromptTemplate, Span, TextSpan
from compllm_rag.reading.choice import Reading
from compllm_rag.reading.crossover import crossover
from compllm_rag.reading.passages import PassageReading, Retrieved


@dataclass(frozen=True)
class ReadNodes:
    """Nodes of which something is read, what stands for each, and the account of the decision.

    Attributes:
        nodes: In the order given.
        bodies: One for each.
        account: Plain values, for `response.metadata`.
    """

    nodes: list[NodeWithScore]
    bodies: list[NodeBody]
    account: dict[str, Any]


def fixed_body(
    library: ConceptLibrary,
    text: str,
    passage: int,
    missing: MissingChoice | None,
    costs: CostModel | None,
    narrowing: Narrowing | None = None,
) -> NodeBody:
    """What stands for a text that is read in one way as a whole.

    Args:
        library: Compressor and store, at the rate that is meant.
        text: The passage.
        passage: Its number in the prompt, from 0.
        missing: What to do when concepts are not stored; None reads it as text in any case.
        costs: What was measured on this machine, for `auto`.
        narrowing: Of the prompt, for `auto`.

    Raises:
        MissingConceptsError: See `ConceptLibrary.fetch`.
    """
    if missing is None:
        return NodeBody([TextSpan(library.passage(text).ids, passage)])
    begun, policy, why = time.perf_counter(), "recompress" if missing == "auto" else missing, None
    found = crossover(library, text, costs, narrowing) if missing == "auto" else None
    if found is not None:
        policy, why = "text" if found.reads_text else "recompress", found.why
    fetched = library.fetch(text, missing=policy)
    fetch_s, as_text = time.perf_counter() - begun - fetched.compress_s, fetched.concepts is None
    span: Span = TextSpan(library.passage(text).ids, passage) if as_text else fetched.span(passage)
    bypassed = as_text and why is not None
    return NodeBody([span], fetched.hits, fetched.misses, fetch_s, fetched.compress_s, why=why, bypassed=bypassed)


def read_nodes(
    reading: PassageReading,
    template: PromptTemplate,
    query: str,
    nodes: Sequence[NodeWithScore],
    prompt_tokens: int,
    queued: Collection[str],
    window: int | None = None,
) -> ReadNodes:
    """Have the policy decide.

    Args:
        reading: Policy, budget and library.
        template: Of the prompt.
        query: What is asked.
        nodes: Best first.
        prompt_tokens: The prompt's own, without any passage.
        queued: Ids of nodes whose concepts are in the making.
        window: Positions of the LLM's window that passages may take; None where somebody else sees to that.

    Raises:
        ReadBudgetError, ConfigurationError, MissingConceptsError: See `PassageReading.read`.
    """
    retrieved = [
        Retrieved(
            node.node.node_id,
            text_of_node(node.node),
            shown_metadata(node.node)[0],
            node.score,
            sum(map(len, found_spans(template, number, node, []))),
        )
        for number, node in enumerate(nodes, 1)
    ]
    decided = reading.read(query, retrieved, prompt_tokens, queued, window=window)
    pairs = list(zip(nodes, decided.passages, strict=True))
    read = [(node, one) for node, one in pairs if not one.reading.left_out]
    if not read:
        raise ReadBudgetError(
            "nothing is answered from no passage",
            got=f"read policy {reading.policy.name} left all {len(nodes)} passages out",
            expected="at least one that is read",
            next_step="change the policy, or raise the budget",
        )
    bodies = [
        NodeBody(
            [replace(span, passage=number) for span in one.spans],
            one.hits,
            one.misses,
            one.fetch_s,
            one.compress_s,
            one.reading,
            one.reading.why or None,
            one.bypassed,
        )
        for number, (_, one) in enumerate(read)
    ]
    left_out = [(node.node.node_id, one.reading) for node, one in pairs if one.reading.left_out]
    account = {
        "name": reading.policy.name,
        "budget": dict(reading.budget.limits),
        "taken": decided.taken,
        "left_out": {name: {"why": gone.why, "parts": told(gone)} for name, gone in left_out},
        **decided.told,
    }
    return ReadNodes([node for node, _ in read], bodies, account)


def told(reading: Reading) -> list[dict[str, Any]]:
    """The parts of a reading as plain values; neighbours that are read alike for the same reason are one."""
    out: list[dict[str, Any]] = []
    for part in reading.parts:
        one = asdict(part)
        same = ("used", "rate", "why")
        if out and all(out[-1][name] == one[name] for name in same):
            out[-1]["end"] = one["end"]
        else:
            out.append(one)
    return out

"""One question answered, with the full account that the command line, the demo and the benchmarks print."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.response.schema import StreamingResponse
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from llama_index.core.vector_stores.types import MetadataFilters

from compllm_rag.config import Mode
from compllm_rag.llamaindex.retrieval import chosen_retriever

if TYPE_CHECKING:
    from compllm_rag.llamaindex.index import ConceptIndex


def retrieve(
    index: ConceptIndex,
    question: str,
    top_k: int,
    *,
    retrieval: str = "vector",
    filters: MetadataFilters | None = None,
) -> list[NodeWithScore]:
    """The chunks nearest to a question, best first; `retrieval` as in `ConceptIndex.as_query_engine`."""
    limits: dict[str, Any] = {"similarity_top_k": top_k, "filters": filters}
    chosen = chosen_retriever(index, {"retrieval": retrieval, **limits})
    return (chosen or index.as_retriever(**limits)).retrieve(question)


def answer(
    index: ConceptIndex,
    question: str,
    *,
    mode: Mode = "concepts",
    top_k: int = 4,
    nodes: Sequence[NodeWithScore] | None = None,
    retrieval: str = "vector",
    filters: MetadataFilters | None = None,
    on_piece: Callable[[str], object] | None = None,
    **reading: Any,
) -> dict[str, Any]:
    """Answer a question.

    Args:
        index: Where to look.
        question: In words.
        mode: Read the passages as concepts or as text.
        top_k: Chunks to retrieve.
        nodes: Retrieved already; then `retrieval_s` is 0.
        retrieval: By `vector`, `bm25` (words) or `hybrid` (both).
        filters: On metadata.
        on_piece: Called with each piece of the answer as it is made.
        **reading: `missing`, and what `ConceptSynthesizer` takes to decide what passages are read as: `rate`,
            `narrowing`, `read_policy`, `relevance`, `relevance_cutoff`, `position_budget`, `prefill_budget`,
            `ttft_budget_s`.

    Returns:
        The fields of `query --json` (docs/results.md); times in seconds, `used` per source.
    """
    synthesizer = index.as_synthesizer(mode=mode, streaming=True, **reading)  # what is wrong with it is said first
    begun = time.perf_counter()
    found = list(nodes) if nodes is not None else retrieve(index, question, top_k, retrieval=retrieval, filters=filters)
    retrieval_s = time.perf_counter() - begun if nodes is None else 0.0
    if not found:
        return _empty(mode, retrieval_s)
    response = synthesizer.synthesize(QueryBundle(question), found)
    account = (response.metadata or {})["compllm"]
    if not isinstance(response, StreamingResponse) or not account["prompts"]:
        # Only an empty retrieval answers without having read anything.
        return _empty(mode, retrieval_s)
    for piece in response.response_gen:
        if on_piece:
            on_piece(piece)
    return {
        "answer": account["answer"],
        "mode": mode,
        "sources": [_source(node, account["nodes"][node.node.node_id]) for node in response.source_nodes],
        **{name: account[name] for name in ("prompt_positions", "prefill_cost", "kv_bytes")},
        "retrieval_s": retrieval_s,
        **{name: account[name] for name in ("fetch_s", "layout_s", "prefill_s", "ttft_s")},
        "total_s": time.perf_counter() - begun,
        "store": account["store"],
        "dropped": account["dropped"],
        "bypassed": account["bypassed"],
        "read_policy": _titled(account.get("read_policy"), found),
        "narrowing": account.get("narrowing"),
        "finish_reason": account["finish_reason"],
    }


def _titled(policy: dict[str, Any] | None, nodes: Sequence[NodeWithScore]) -> dict[str, Any] | None:
    """What a read policy decided, with titles of the passages that it left out."""
    if policy is None:
        return None
    titles = {node.node.node_id: str(node.node.metadata.get("title", "")) for node in nodes}
    left_out = {name: {"title": titles.get(name, ""), **gone} for name, gone in policy["left_out"].items()}
    return {**policy, "left_out": left_out}


def _source(node: NodeWithScore, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "doc_id": node.node.ref_doc_id,
        "node_id": node.node.node_id,
        "title": node.node.metadata.get("title", ""),
        "score": node.score,
        "used": facts["used"],
        "n_tokens": facts["n_tokens"],
        "n_concepts": facts["n_concepts"],
        "why": facts.get("why"),
        "parts": facts.get("parts"),
        "guard": facts.get("guard"),
        "text": node.node.get_content(metadata_mode=MetadataMode.NONE),
    }


def _empty(mode: Mode, retrieval_s: float) -> dict[str, Any]:
    times = dict.fromkeys(("fetch_s", "layout_s", "prefill_s", "ttft_s"), 0.0)
    return {
        "answer": "",
        "mode": mode,
        "sources": [],
        "prompt_positions": 0,
        "prefill_cost": None,
        "kv_bytes": 0,
        "retrieval_s": retrieval_s,
        **times,
        "total_s": retrieval_s,
        "store": {"hits": 0, "misses": 0},
        "dropped": [],
        "bypassed": 0,
        "read_policy": None,
        "narrowing": None,
        "finish_reason": "stop",
    }

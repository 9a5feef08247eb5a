"""What does a query cost when its passages are read as concepts, against the same passages as text?

For contexts of several lengths, with a warm store on disk: TTFT of both in turns, how much of it is fetching and
laying out, and the bound: the prefill alone of that many random embeddings by the same call; of deep concepts the lower
half of the LLM over the prompt's own tokens and the upper half over them and as many random states.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from llama_index.core.schema import NodeWithScore, TextNode

from benchmarks import common
from benchmarks.cells import number, table
from compllm_rag.config import GenerationConfig, Mode
from compllm_rag.generation.halves import SplitForward, States, Tokens
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.synthesizer import ConceptSynthesizer
from compllm_rag.prompt import PromptInputs
from compllm_rag.store import DiskStore

_TIMES = ("fetch_s", "layout_s", "prefill_s", "ttft_s")
_QUESTION = "What is the passage mostly about?"


def ask(library: ConceptLibrary, nodes: list[NodeWithScore], mode: Mode) -> dict[str, Any]:
    """One answer of one token; its account."""
    one = GenerationConfig(max_new_tokens=1)
    synthesizer = ConceptSynthesizer(library, mode=mode, generation=one, overflow="error")
    response = synthesizer.synthesize(_QUESTION, nodes)
    account: dict[str, Any] = (response.metadata or {})["compllm"]
    if account["store"]["misses"]:
        raise RuntimeError(f"the store was not warm: {account['store']}")
    return account


def bound(generator: LocalGenerator, positions: int, concepts: int = 0) -> float:
    """Seconds to prefill that many random embeddings, `concepts` of them at the entry layer of deep concepts."""
    llm, halves = generator.llm, generator.halves
    if concepts and halves is not None:
        ids, states = [0] * (positions - concepts), torch.randn(concepts, llm.hidden_size)
        forward = SplitForward(halves, [[States(states, range(concepts)), Tokens(ids)]])
        return common.timed(forward.prefill)
    embeds = torch.randn(1, positions, llm.hidden_size, device=llm.device).to(llm.dtype) * 0.1
    return common.timed(lambda: generator.prefill(PromptInputs(embeds, None, None, [[]])))


def measure(
    llm: str, codec: str, sources: list[str], lengths: list[int], rates: list[float], repeats: int
) -> dict[str, Any]:
    """All of it."""
    compressor = common.timed_compressor(llm, codec)
    deep = compressor.config.deep
    generator, contexts = LocalGenerator(compressor.llm, halves=compressor.halves), {}
    with (
        tempfile.TemporaryDirectory() as folder,
        DiskStore(Path(folder) / "concepts", hidden_size=compressor.spec.width) as store,
    ):
        for length in lengths:
            chunks = common.chunks_of(compressor, sources, length)
            for rate in rates:
                ConceptLibrary(compressor, store, rate=rate).ensure(chunks)
            store.flush()
            nodes = [NodeWithScore(node=TextNode(text=text, id_=f"n{i}"), score=1.0) for i, text in enumerate(chunks)]
            settings: dict[str, tuple[float, Mode]] = {"text": (rates[0], "text")}
            settings |= {f"concepts at rate {rate:g}": (rate, "concepts") for rate in rates}
            rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
            for round_ in range(repeats + 1):
                for name, (rate, mode) in settings.items():
                    # Anew, so that no passage is remembered: a query usually meets others.
                    library = ConceptLibrary(compressor, store, rate=rate)
                    account = ask(library, nodes, mode)
                    split = deep and mode == "concepts"
                    concepts = sum(sum(library.passage(text).n_concepts) for text in chunks) if split else 0
                    account["bound_s"] = bound(generator, account["prompt_positions"], concepts)
                    rounds[name] += [account] if round_ else []
                common.progress(f"{length} tokens, round {round_} of {repeats}")
            contexts[str(length)] = {"nodes": len(nodes)} | {
                name: _row(accounts, rounds["text"]) for name, accounts in rounds.items()
            }
    return {"llm": llm, "codec": codec, "rates": rates, "contexts": contexts}


def _row(accounts: list[dict[str, Any]], text: list[dict[str, Any]]) -> dict[str, Any]:
    ttft, shares = [a["ttft_s"] for a in accounts], [(a["fetch_s"] + a["layout_s"]) / a["prefill_s"] for a in accounts]
    return {
        "prompt_positions": accounts[0]["prompt_positions"],
        **{key: statistics.median(a[key] for a in accounts) for key in _TIMES},
        "fetch_and_layout_over_prefill": statistics.median(shares),
        "ttft_over_bound": common.median_of_quotients(ttft, [a["bound_s"] for a in accounts]),
        "ttft_over_text": common.median_of_quotients(ttft, [a["ttft_s"] for a in text]),
    }


def main(argv: Sequence[str] | None = None) -> common.Record:
    """Run it."""
    options = common.parser("query", __doc__, "llm codec repeats texts rates")
    options.add_argument("--lengths", type=int, nargs="+", default=[1000, 4000, 7000], help="context tokens as text")
    args = common.parsed(options, argv)
    found = measure(args.llm, args.codec, common.texts(args.texts), args.lengths, args.rates, args.repeats)
    return common.written(args, found)


def tables(record: common.Record) -> list[str]:
    """Lines of the section."""
    rows = [
        [length, name, str(row["prompt_positions"]), f"{number(row['ttft_s'], 2)} s"]
        + [number(row[key]["median"], 2) for key in ("ttft_over_text", "ttft_over_bound")]
        for length, context in record["contexts"].items()
        for name, row in context.items()
        if isinstance(row, dict)
    ]
    head = ["context, tokens", "read as", "positions", "TTFT", "of text's", "over the bound"]
    return ["## One query", "", *table(head, rows)]

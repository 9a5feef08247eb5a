"""What does a query cost when its passages are read as concepts, against the same passages as text?

For contexts of several lengths, with a warm store on disk: TTFT of both in turns, how much of it is fetching and
laying out, and the bound: the prefill alone of that many random embeddings by the same call.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from llama_index.core.schema import NodeWithScore, TextNode

from benchmarks.common import median_of_quotients, parser, progress, texts, timed, trained_like, write
from benchmarks.ingest import passages
from compllm_rag.config import GenerationConfig, Mode
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


def bound(generator: LocalGenerator, positions: int) -> float:
    """Seconds to prefill that many random embeddings."""
    llm = generator.llm
    embeds = torch.randn(1, positions, llm.hidden_size, device=llm.device).to(llm.dtype) * 0.1
    return timed(lambda: generator.prefill(PromptInputs(embeds, None, None, [[]])))


def measure(
    llm: str,
    sources: list[str],
    lengths: list[int],
    rates: list[float],
    repeats: int,
) -> dict[str, Any]:
    """All of it."""
    compressor = trained_like(llm)
    generator = LocalGenerator(compressor.llm)
    result: dict[str, Any] = {"llm": llm, "rates": rates, "contexts": {}}
    with (
        tempfile.TemporaryDirectory() as folder,
        DiskStore(Path(folder) / "concepts", hidden_size=compressor.hidden_size) as store,
    ):
        libraries = {rate: ConceptLibrary(compressor, store, rate=rate) for rate in rates}
        for length in lengths:
            chunks = passages(compressor, sources, length)
            for library in libraries.values():
                library.ensure(chunks)
            store.flush()
            nodes = [NodeWithScore(node=TextNode(text=text, id_=f"n{i}"), score=1.0) for i, text in enumerate(chunks)]
            result["contexts"][str(length)] = _context(generator, libraries, nodes, repeats, length)
    return result


def _context(
    generator: LocalGenerator,
    libraries: dict[float, ConceptLibrary],
    nodes: list[NodeWithScore],
    repeats: int,
    length: int,
) -> dict[str, Any]:
    settings: list[tuple[str, float, Mode]] = [("text", next(iter(libraries)), "text")]
    settings += [(f"concepts at rate {rate:g}", rate, "concepts") for rate in libraries]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in settings}
    for round_ in range(repeats + 1):
        for name, rate, mode in settings:
            # What an earlier round remembers of a passage is forgotten: a query usually meets other passages.
            libraries[rate] = fresh = _fresh(libraries[rate], rate)
            account = ask(fresh, nodes, mode)
            account["bound_s"] = bound(generator, account["prompt_positions"])
            if round_:
                rounds[name].append(account)
        progress(f"{length} tokens, round {round_} of {repeats}")
    out: dict[str, Any] = {"nodes": len(nodes)}
    for name, accounts in rounds.items():
        ttft = [a["ttft_s"] for a in accounts]
        out[name] = {
            "prompt_positions": accounts[0]["prompt_positions"],
            **{
                key: statistics.median(a[key] for a in accounts)
                for key in ("fetch_s", "layout_s", "prefill_s", "ttft_s")
            },
            "fetch_and_layout_over_prefill": statistics.median(
                (a["fetch_s"] + a["layout_s"]) / a["prefill_s"] for a in accounts
            ),
            "ttft_over_bound": median_of_quotients(ttft, [a["bound_s"] for a in accounts]),
            "ttft_over_text": median_of_quotients(ttft, [a["ttft_s"] for a in rounds["text"]]),
        }
    return out


def _fresh(library: ConceptLibrary, rate: float) -> ConceptLibrary:
    return ConceptLibrary(library.compressor, library.store, rate=rate, namespace=library.namespace)


def main() -> None:
    """Command line."""
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", default=[1000, 4000, 7000], help="context tokens as text")
    options.add_argument("--rates", type=float, nargs="+", default=[2.0, 4.0])
    args = options.parse_args()
    write(measure(args.llm, texts(args.texts), args.lengths, args.rates, args.repeats), args.json)


if __name__ == "__main__":
    main()

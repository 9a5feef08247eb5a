"""Time to the first token of each turn of a chat, with and without the KV cache of the turns before.

The same conversation is held over and over: passages of each turn as concepts, warm in a store, or as text; with a
prefix cache, emptied before the first turn, or without one. All ways take turns, in another order each round. Earlier
turns are questions and answers of `--answer-words` words; each turn brings passages of its own.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_index.core.schema import NodeWithScore, TextNode

from benchmarks.cells import number, table
from benchmarks.common import Record, any_compressor_of, parsed, parser, progress, reworded, texts, written
from compllm_rag.cli.demo import sample_questions
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import GenerationConfig, Mode
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.generation.reuse import PrefixCache
from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.chat.planner import Turn
from compllm_rag.llamaindex.chat.synthesizer import TurnSynthesizer
from compllm_rag.prompt import SYSTEM, Message
from compllm_rag.store import DiskStore

CHUNK = 200  # source tokens
WAYS: dict[str, tuple[Mode, bool]] = {
    "text": ("text", False),
    "text, reused": ("text", True),
    "concepts": ("concepts", False),
    "concepts, reused": ("concepts", True),
}


def chunks(compressor: ConceptCompressor, sources: list[str], n: int) -> list[str]:
    """Chunks of about `CHUNK` tokens, none of them twice."""
    out: list[str] = []
    for text in reworded(sources):
        ids = [token for unit in compressor.spec.units(text) for token in unit]
        for start in range(0, len(ids) - CHUNK + 1, CHUNK):
            if len(out) == n:
                return out
            out.append(str(compressor.llm.tokenizer.decode(ids[start : start + CHUNK])))
    return out


class Conversation:
    """A conversation that is held again and again.

    Args:
        compressor: Its LLM answers.
        store: Warm.
        passages: For each turn.
        rate: Source tokens per concept.
        answer_words: Words of an earlier answer.
    """

    def __init__(
        self,
        compressor: ConceptCompressor,
        store: DiskStore,
        passages: list[list[str]],
        rate: float,
        answer_words: int,
    ) -> None:
        self._compressor, self._store, self._rate = compressor, store, rate
        rows = sample_questions()
        asked = [str(rows[n % len(rows)]["question"]) for n in range(len(passages))]
        said = [" ".join(turn[0].split()[:answer_words]) for turn in passages]
        told = [[Message("user", (q,)), Message("assistant", (a,))] for q, a in zip(asked, said, strict=True)]
        self._turns = [Turn(question, question, question, SYSTEM, (), told[:n], n) for n, question in enumerate(asked)]
        self._nodes = [
            [NodeWithScore(node=TextNode(text=text, id_=f"{n}.{i}"), score=1.0) for i, text in enumerate(turn)]
            for n, turn in enumerate(passages)
        ]
        self._generator = LocalGenerator(compressor.llm, GenerationConfig(max_new_tokens=1), halves=compressor.halves)

    def hold(self, mode: Mode, *, reuse: bool) -> list[dict[str, Any]]:
        """The account of each turn; one token is answered."""
        # Anew, so that no passage is remembered: a turn usually meets others.
        library = ConceptLibrary(self._compressor, self._store, rate=self._rate)
        self._generator.prefixes = PrefixCache() if reuse else None
        accounts = []
        for turn, nodes in zip(self._turns, self._nodes, strict=True):
            synthesizer = TurnSynthesizer(library, self._generator, turn, None, mode=mode, overflow="error")
            account: dict[str, Any] = synthesizer.answer(nodes, retrieved=True).metadata["compllm"]
            if account["store"]["misses"] or account["turns_dropped"]:
                raise RuntimeError(f"the store was not warm, or the window too small: {account}")
            accounts.append(account)
        return accounts


def measure(args: Any) -> dict[str, Any]:
    """All of it."""
    compressor = any_compressor_of(args)
    found = chunks(compressor, texts(args.texts), args.turns * args.top_k)
    passages = [found[n * args.top_k : (n + 1) * args.top_k] for n in range(args.turns)]
    rounds: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in WAYS}
    with (
        tempfile.TemporaryDirectory() as folder,
        DiskStore(Path(folder) / "concepts", hidden_size=compressor.spec.width) as store,
    ):
        ConceptLibrary(compressor, store, rate=args.rate).ensure(found)
        store.flush()
        conversation = Conversation(compressor, store, passages, args.rate, args.answer_words)
        for round_ in range(args.repeats + 1):  # the first is not counted
            for way in random.Random(round_).sample(list(WAYS), len(WAYS)):
                mode, reuse = WAYS[way]
                accounts = conversation.hold(mode, reuse=reuse)
                rounds[way] += [accounts] if round_ else []
                progress(f"round {round_} of {args.repeats}: {way}, last turn {accounts[-1]['ttft_s']:.2f} s")
    turns = [{way: _row([held[n] for held in rounds[way]]) for way in WAYS} for n in range(args.turns)]
    return {"llm": args.llm, "rate": args.rate, "top_k": args.top_k, "answer_words": args.answer_words, "turns": turns}


def _row(accounts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "prompt_positions": accounts[0]["prompt_positions"],
        "reused_positions": accounts[0]["reused_positions"],
        "ttft_s": statistics.median(account["ttft_s"] for account in accounts),
        "prefill_s": statistics.median(account["prefill_s"] for account in accounts),
    }


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    options = parser("chat", __doc__, "llm repeats texts rate reader compressor codec entry-layer dtype", rate=1.0)
    options.add_argument("--turns", type=int, default=6, help="of the conversation")
    options.add_argument("--top-k", type=int, default=4, help="passages of a turn")
    options.add_argument("--answer-words", type=int, default=60, help="of an earlier answer")
    args = parsed(options, argv)
    return written(args, measure(args))


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    rows = []
    for n, turn in enumerate(record["turns"], 1):
        reused = turn["concepts, reused"]
        share = reused["reused_positions"] / reused["prompt_positions"]
        times = [f"{number(turn[way]['ttft_s'], 2)} s" for way in WAYS]
        of_none = reused["ttft_s"] / turn["concepts"]["ttft_s"]
        rows.append([str(n), str(reused["prompt_positions"]), number(share, 2), *times, number(of_none, 2)])
    head = ["turn", "positions, concepts", "of them reused", *(f"TTFT, {way}" for way in WAYS), "reused / not"]
    return [
        "## Turns of a chat",
        "",
        f"`{record['command']}`: each turn brings {record['top_k']} passages of {CHUNK} tokens of its own, which stand "
        f"behind the earlier turns (questions, and answers of {record['answer_words']} words). *Reused* goes on with "
        "the KV cache of the turn before, up to where its passages stood.",
        "",
        *table(head, rows),
    ]

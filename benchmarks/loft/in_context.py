"""The whole corpus of LOFT in one prompt: as text, and as concepts."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import dtype_of, journal_of, part, progress
from benchmarks.loft.data import LoftSet, Query, load
from benchmarks.loft.metrics import scores
from benchmarks.loft.prompts import MOST_EXAMPLES, CorpusPrompt, examples
from compllm_rag.compression.loading import load_compressor_for
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import GenerationConfig
from compllm_rag.evaluation.asking import Asker
from compllm_rag.evaluation.bodies import Bodies, Segmented, Setting
from compllm_rag.prompt import TextSpan

# Tokens of an answer: the documents it rests on, then a list.
CONTEXT_TOKENS = 160


def in_context(
    loft: LoftSet,
    compressor: ConceptCompressor,
    queries: list[Query],
    setting: tuple[str, float | None],
    max_new_tokens: int,
    shots: Iterable[Query] = (),
) -> dict[str, Any]:
    """All documents in one prompt, in the order of the file; or why that cannot be.

    Args:
        loft: The corpus.
        compressor: With the target LLM.
        queries: That are asked, one at a time.
        setting: Mode and rate.
        max_new_tokens: Of an answer.
        shots: Queries that are shown with their answers.
    """
    (mode, rate), everything = setting, list(loft.documents.values())
    prompt = CorpusPrompt(compressor.llm.tokenizer, examples(loft, shots))
    segmented, generation = Segmented(compressor), GenerationConfig(max_new_tokens=max_new_tokens)
    bodies = Bodies(compressor, Setting.of(mode, rate), segmented)
    asker = Asker(compressor, Setting.of(mode, rate), segmented, generation, prompt=prompt)
    # Counted before anything is compressed: at 128k that takes long, and is in vain where the prompt is too long.
    longest = max((query.question for query in queries), key=lambda text: len(prompt.template.plain(text)))
    shown = [(passage.title, [TextSpan((0,) * bodies.size(passage.text))]) for passage in everything]
    needed = prompt.plan(longest, shown).positions + max_new_tokens
    row = {"mode": mode, "rate": rate, "positions": needed, "window": asker.window}
    if needed > asker.window:
        return row | {"left_out": f"prompt and answer take {needed} positions, the LLM reads {asker.window}"}
    # Not `evaluate_many`: it leaves out what does not fit as text, and reads the text again for every setting.
    asked = [loft.ask(query, everything) for query in queries]
    done = asker.ask(asked, batch_size=1, answer=True, progress=lambda n: progress(f"{mode}: {n} of {len(asked)}"))
    return row | {"loft": scores(loft, {query.id: query for query in queries}, done)}


def corpus_in_context(
    args: Namespace, loft: LoftSet, queries: list[Query], settings: list[Any], base: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """The whole corpus in the prompt, one setting after the other."""
    shots = load(folder, "few_shot").queries if (folder / "few_shot_queries.jsonl").exists() else []
    compressor = load_compressor_for(args.llm, codec=args.codec, dtype=args.dtype)
    longest = args.max_new_tokens or CONTEXT_TOKENS
    told = min(len(shots), MOST_EXAMPLES)
    same = {**base, **read_by(compressor), "examples": told, "max_new_tokens": longest}
    journal = journal_of(args.json, same)
    rows = [
        part(
            journal, str(Setting.of(*setting)), partial(in_context, loft, compressor, queries, setting, longest, shots)
        )
        for setting in settings
    ]
    return {**same, "in_context": rows}


def read_by(compressor: ConceptCompressor) -> dict[str, Any]:
    """The LLM and its dtype, the fingerprint of its concepts, and the layer at which they enter."""
    return {
        "llm": compressor.llm.source,
        "dtype": dtype_of(compressor),
        "fingerprint": compressor.fingerprint,
        "entry_layer": compressor.config.entry_layer,
    }

"""The whole corpus of LOFT in one prompt: as text, and as concepts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import progress, write
from benchmarks.loft_data import LoftSet, Query, load
from benchmarks.loft_metrics import scores
from benchmarks.loft_prompts import MOST_EXAMPLES, CorpusPrompt, examples
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.loading import load_compressor_for
from compllm_rag.config import GenerationConfig
from compllm_rag.evaluation.asking import Asker
from compllm_rag.evaluation.bodies import Bodies, Segmented, Setting
from compllm_rag.prompt import TextSpan

# Tokens of an answer: the documents it rests on, then a list.
CONTEXT_TOKENS = 160


def in_context(
    loft: LoftSet,
    compressor: Compressor,
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
    args: Any, loft: LoftSet, queries: list[Query], settings: list[Any], base: dict[str, Any], folder: Path
) -> None:
    """The whole corpus in the prompt, one setting after the other."""
    shots = load(folder, "few_shot").queries if (folder / "few_shot_queries.jsonl").exists() else []
    compressor, longest = load_compressor_for(args.llm), args.max_new_tokens or CONTEXT_TOKENS
    told = min(len(shots), MOST_EXAMPLES)
    same = {**base, **read_by(compressor), "examples": told, "max_new_tokens": longest}
    former = done_before(args.json, same, "in_context", [])
    done = [row for row in former if (row["mode"], row["rate"]) in settings]
    for setting in settings:
        if setting not in [(row["mode"], row["rate"]) for row in done]:
            done.append(in_context(loft, compressor, queries, setting, longest, shots))
            if args.json is not None:
                args.json.write_text(json.dumps({**same, "in_context": done}), encoding="utf-8")
    write({**same, "in_context": done}, args.json)


def read_by(compressor: Compressor) -> dict[str, Any]:
    """The LLM and the fingerprint of its concepts."""
    return {"llm": compressor.llm.source, "fingerprint": compressor.fingerprint}


def done_before(path: Path | None, same: dict[str, Any], name: str, empty: Any) -> Any:
    """What a former run with the same settings has finished."""
    if path is None or not path.exists():
        return empty
    try:
        former: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return empty
    return former.get(name, empty) if {key: former.get(key) for key in same} == same else empty

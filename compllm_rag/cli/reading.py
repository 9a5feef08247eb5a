"""Options of `query` and `chat` that decide what passages are read as, and `--explain`, which tells what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from compllm_rag.config import Narrowing
from compllm_rag.errors import ConfigurationError

if TYPE_CHECKING:
    from compllm_rag.compression.segmentation import Segmenter

ReadRate = Annotated[
    float | None,
    typer.Option("--rate", help="Read concepts at this rate (source tokens per concept), not at the storage's."),
]
NarrowingName = Annotated[
    str | None,
    typer.Option(
        "--narrow",
        help="From a layer on read only the share of the concepts that the question attends to most: LAYER:SHARE (0: "
        "none of them), or `auto` (a tenth, from four fifths of the layers on). Default: read all.",
    ),
]
PolicyName = Annotated[
    str | None,
    typer.Option(
        "--read-policy",
        help="`fixed`: all passages alike, as far as a budget goes; `budgeted`: what the question needs within a "
        "budget, sentence by sentence. Default: budgeted where there is a budget.",
    ),
]
RelevanceName = Annotated[
    str | None,
    typer.Option(
        "--relevance",
        help="By what the budgeted policy judges sentences: `bm25` (words), `maxsim` (states of the question beside "
        "the stored concepts), `bm25+maxsim`, or `learned` (states as trained projections see them, and words). "
        "Default: bm25.",
    ),
]
RelevanceCutoff = Annotated[
    float | None,
    typer.Option(
        "--relevance-cutoff",
        min=0,
        max=1,
        help="Leave out sentences that are less likely to matter than this share of the likeliest one, though the "
        "budget has room. Default: 0.",
    ),
]
PositionBudget = Annotated[
    int | None, typer.Option("--position-budget", min=1, help="Most prompt positions of all passages.")
]
PrefillBudget = Annotated[
    float | None, typer.Option("--prefill-budget", help="Most that passages take at prefill, in text tokens.")
]
TtftBudget = Annotated[
    float | None, typer.Option("--ttft-budget", help="Most seconds to the first token; `calibrate` first.")
]
MissingName = Annotated[
    str,
    typer.Option(
        "--missing",
        help="Concepts that are not stored: `recompress` now, read `text`, `error`, or `auto`: what is sooner.",
    ),
]
_SHOWN = 60  # characters of a sentence


def read_options(
    rate: float | None,
    read_policy: str | None,
    position_budget: int | None,
    prefill_budget: float | None,
    ttft_budget: float | None,
    missing: str,
    relevance: str | None = None,
    narrowing: str | None = None,
    relevance_cutoff: float | None = None,
) -> dict[str, Any]:
    """The options as `answer` takes them.

    Raises:
        ConfigurationError: There is no such policy or relevance, or narrowing is not understood; said here, before
            anything is loaded.
    """
    if narrowing not in (None, "auto"):
        Narrowing.parse(str(narrowing))
    for given, known, what in (
        (read_policy, (None, "fixed", "budgeted"), "read policy"),
        (relevance, (None, "bm25", "maxsim", "bm25+maxsim", "learned"), "relevance"),
        (missing, ("recompress", "text", "error", "auto"), "policy for missing concepts"),
    ):
        if given not in known:
            names = ", ".join(name for name in known if name)
            raise ConfigurationError(f"unknown {what}", got=given, expected=names, next_step="pass one of them")
    return {
        "rate": rate,
        "narrowing": narrowing,
        "read_policy": read_policy,
        "relevance": relevance,
        "relevance_cutoff": relevance_cutoff,
        "position_budget": position_budget,
        "prefill_budget": prefill_budget,
        "ttft_budget_s": ttft_budget,
        "missing": missing,
    }


def explained(found: dict[str, Any], segmenter: Segmenter) -> list[str]:
    """What became of each passage, in plain words.

    Args:
        found: As `answer` gives it.
        segmenter: Of the storage; tells which words the tokens of a passage are.
    """
    out = [""]
    for number, source in enumerate(found["sources"], 1):
        title = source["title"] or source["doc_id"]
        out.append(f"[{number}] {title}: {size_of(source)}{because(source)}")
        if source["parts"]:
            tokenized = segmenter.tokenize(source["text"])
            out += [_part(part, tokenized.text, tokenized.offsets) for part in source["parts"]]
    policy = found["read_policy"]
    if policy is None:
        out.append("nothing was decided for this question: all passages are read in the same way")
    else:
        for name, gone in policy["left_out"].items():
            out.append(f"left out: {gone['title'] or name}{_because(gone['why'])}")
        taken = ", ".join(f"{name} {policy['taken'][name]:.4g} of {most:g}" for name, most in policy["budget"].items())
        out.append(f"read policy {policy['name']}" + (f": {taken}" if taken else ", without a budget"))
        titles = {source["node_id"]: source["title"] for source in found["sources"]}
        titles |= {name: gone["title"] for name, gone in policy["left_out"].items()}
        out += _judged(policy.get("relevance"), titles)
        if kept := policy.get("kept"):
            out.append(
                f"concepts valued by {'a table of rates' if kept['by'] == 'table' else kept['by']} ({kept['why']})"
            )
    if narrowed := found["narrowing"]:
        out.append(f"from layer {narrowed['layer']} on {narrowed['concepts']} of the concepts are read")
    if found["prefill_cost"] is not None:
        out.append(f"the prompt takes {found['prefill_cost']:.2f} of the prefill that the same passages take as text")
    return out


def size_of(source: dict[str, Any]) -> str:
    """What a passage was read as: how many of its tokens as text, as how many concepts, or not at all."""
    n, parts = source["n_tokens"], source.get("parts")
    if not parts:
        return (
            f"{n} tokens as {source['n_concepts']} concepts" if source["used"] == "concepts" else f"{n} tokens as text"
        )
    sizes = {used: sum(p["end"] - p["start"] for p in parts if p["used"] == used) for used in ("text", "concepts")}
    told = [f"{sizes['text']} as text"] if sizes["text"] else []
    told += [f"{sizes['concepts']} as {source['n_concepts']} concepts"] if sizes["concepts"] else []
    told += [f"{n - sum(sizes.values())} left out"] if sum(sizes.values()) < n else []
    return f"{n} tokens, {', '.join(told)}"


def _judged(relevance: dict[str, Any] | None, titles: dict[str, str]) -> list[str]:
    """By what sentences were judged, what that took, and where something else stood in."""
    if not relevance:
        return []
    line = f"sentences judged by {relevance['signal']}"
    if "question_s" in relevance:
        line += f": the question's {relevance['question_tokens']} tokens through the lower layers alone, "
        line += f"{relevance['question_s']:.2f} s"
    instead = relevance.get("by_words", {})
    return [line, *(f"by its words: {titles.get(name) or name}{_because(why)}" for name, why in instead.items())]


def because(source: dict[str, Any]) -> str:
    """Why a passage was read as it was, in brackets; with what a guard found of it."""
    told = [source["why"]] if source["why"] else []
    if source.get("guard"):
        from compllm_rag.compression.rate_policies.guard import guard_words

        told.append(guard_words(source["guard"]))
    return _because(": ".join(told))


def _because(why: str | None) -> str:
    return f" ({why})" if why else ""


def _part(part: dict[str, Any], text: str, offsets: list[tuple[int, int]]) -> str:
    said = " ".join(text[offsets[part["start"]][0] : offsets[part["end"] - 1][1]].split())
    said = said if len(said) <= _SHOWN else f"{said[: _SHOWN - 3]}..."
    at = f" at rate {part['rate']:g}" if part["rate"] is not None else ""
    at += f", worth {part['kept']:.2f}" if part.get("kept") is not None else ""
    return f"      {part['used'] + at:<32} {said!r}{_because(part['why'])}"

"""The page section of `relevance`."""

from __future__ import annotations

from typing import Any

from benchmarks.cells import difference, source, table, with_interval
from benchmarks.planner.relevance import COLUMNS, Row

_TITLES = {"bm25": "BM25", "maxsim": "max-sim", "bm25+maxsim": "BM25 and max-sim", "learned": "learned"}


def tables(record: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        "## Which relevance finds the sentence that says the answer",
        "",
        f"{record['llm']} ({record['dtype']}), entry layer {record['entry_layer']}, rate {record['rate']:g}. "
        f"{record['n']} questions of held-out training rows in {record['groups']} groups that share passages; "
        f"{record['passages']} passages and {record['sentences']:.1f} sentences each, of which "
        f"{record['gold']:.1f} say the answer. Percent of questions; brackets are bootstrap 95 % intervals over "
        "groups. *Read* is how often the budgeted policy reads a sentence that says the answer within a share of what "
        "the passages take as text.",
        "",
        f"{source(record)}.",
        "",
    ]
    cells = []
    for name, row in record["rows"].items():
        shown = [with_interval(row.get(column), row.get(f"{column} interval")) for column in COLUMNS]
        over = "–" if name == "bm25" else difference(row["recall@1 over BM25"])
        cells.append([_TITLES.get(name, name), *shown, over])
    lines += table(["sentences by", *COLUMNS, "Δ recall@1 to BM25"], cells)
    return [*lines, *_verdict(record["rows"])]


def _verdict(rows: dict[str, Row]) -> list[str]:
    """What the differences to BM25 come to."""
    lines = []
    for name in [name for name in ("maxsim", "bm25+maxsim", "learned") if name in rows]:
        said = []
        for column in COLUMNS:
            over = rows[name][f"{column} over BM25"]
            low, high = over["interval"]
            how = "better than" if low > 0 else "worse than" if high < 0 else "not told apart from"
            said.append(f"{column} {how} BM25's ({difference(over)})")
        lines.append(f"* {_TITLES[name]}: {', '.join(said)}.")
    return [
        *lines,
        "",
        "BM25 stays the default of the budgeted policy: it takes no pass of the LLM. No answers are compared here.",
        "",
    ]

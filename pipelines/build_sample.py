"""Makes the sample corpus that ships: the first paragraphs of some Wikipedia articles, and questions about them.

    python pipelines/build_sample.py --data-dir DATA

`DATA` holds `eval/squad_dev.jsonl.gz`: SQuAD v1.1's development part as gzipped JSON lines. The development part, since
the shipped reader was trained on questions of the training part; nothing is trained on these. The questions were picked
by hand among those whose paragraph is in the sample and that can be understood without it, before any model was asked.
"""

from __future__ import annotations

import argparse
import gzip
import json
import urllib.parse
from pathlib import Path
from typing import Any

ARTICLES = (
    "Amazon rainforest",
    "Apollo program",
    "Black Death",
    "Chloroplast",
    "Doctor Who",
    "Genghis Khan",
    "Harvard University",
    "Immune system",
    "Nikola Tesla",
    "Oxygen",
    "Prime number",
    "Southern California",
    "Steam engine",
    "Warsaw",
)
QUESTIONS = (
    "56df9ee138dc421700152108",
    "56e0b9d57aa994140058e6c4",
    "5728349dff5b5019007d9f00",
    "57283adcff5b5019007d9f97",
    "5725b64d89a1e219009abd40",
    "5725b888ec44d21400f3d455",
    "57264a74708984140094c18c",
    "572956c86aef051400154d1d",
    "5727efabff5b5019007d98e4",
    "5727f18c3acd2414000df064",
    "5726a00d708984140094cc26",
    "5726a21bf1498d1400e8e578",
    "5727c69d3acd2414000dec14",
    "5728f2e26aef051400154898",
    "571c3a685efbb31900334db3",
    "572970c11d04691400779464",
    "57113be3a58dae1900cd6d28",
    "571126dfa58dae1900cd6cb3",
    "5705e26d75f01819005e76d4",
    "57339555d058e614000b5df3",
)
_CHARS = 9000  # of each article

_ATTRIBUTION = """# Where the sample corpus comes from

The texts in `articles/` are the first paragraphs of English Wikipedia articles as they stand in SQuAD v1.1 (Rajpurkar,
Zhang, Lopyrev, Liang: SQuAD: 100,000+ Questions for Machine Comprehension of Text, 2016; development part); the
questions and answers in `questions.jsonl` are SQuAD's. Both are licensed under CC BY-SA 4.0
(https://creativecommons.org/licenses/by-sa/4.0/). Headings were added and paragraphs joined; nothing else changed.

The articles, each by its Wikipedia authors:

"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("compllm_rag/data/sample"))
    args = parser.parse_args()
    by_title: dict[str, list[dict[str, Any]]] = {}
    with gzip.open(args.data_dir / "eval/squad_dev.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            by_title.setdefault(urllib.parse.unquote(row["title"]).replace("_", " "), []).append(row)
    (args.out / "articles").mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    credits = _ATTRIBUTION
    for title in ARTICLES:
        paragraphs: list[str] = []
        for row in by_title[title]:
            if sum(map(len, paragraphs)) + len(row["context"]) > _CHARS:
                break
            paragraphs.append(row["context"].strip())
            found |= {q["id"]: {**q, "title": title} for q in row["qas"]}
        name = title.replace(" ", "_")
        text = "\n\n".join([f"# {title}", *paragraphs]) + "\n"
        (args.out / "articles" / f"{name}.md").write_text(text, encoding="utf-8")
        credits += f"- {title}: https://en.wikipedia.org/wiki/{name}\n"
    asked = [{key: found[i][key] for key in ("id", "question", "answers", "title")} for i in QUESTIONS]
    lines_out = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked)
    (args.out / "questions.jsonl").write_text(lines_out, encoding="utf-8")
    (args.out / "ATTRIBUTION.md").write_text(credits, encoding="utf-8")


if __name__ == "__main__":
    main()

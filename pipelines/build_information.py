"""Counts how often tokens occur in ordinary text: the tables that anchors are chosen by.

    python pipelines/build_information.py --data-dir DATA

`DATA` holds `train/*.jsonl.gz` and `text/*.jsonl.gz` as gzipped JSON lines with `context` or `text`. Only texts whose
licence allows it are read, and none that anything is evaluated on: contexts of the training parts of SQuAD
(CC BY-SA 4.0) and FairytaleQA (Apache-2.0), Wikipedia paragraphs (CC BY-SA), biomedical abstracts (CC BY), the Python
documentation (PSF) and novels (public domain). So that no kind of text drowns the others, each source counts for at
most as many characters as `--most`.

Writes `information-smollm2-135m-instruct.safetensors` (nats per token, fp16) and `unigrams.tsv.gz` (the most frequent
units with their counts, for all other tokenizers) into the package's data folder.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compllm_rag.compression.information import information_of_counts, vocabulary_digest
from compllm_rag.config import DEFAULT_LLM
from compllm_rag.models import resolve_model
from compllm_rag.models.plaintext import encode_plain

SOURCES = (
    "train/squad",
    "train/fairytaleqa",
    "text/wikipedia_2wiki",
    "text/pubmed_abstracts",
    "text/python_docs",
    "text/novels",
)
# A word with the blank in front of it, a run of punctuation, a digit, a run of white space.
_UNIT = re.compile(r" ?[^\W\d]+| ?\d| ?[^\w\s]+|\s+(?!\S)|\s")


def texts(folder: Path, most: int) -> Iterator[tuple[str, str]]:
    """Source and text, each source cut off after `most` characters."""
    for source in SOURCES:
        used = 0
        with gzip.open(folder / f"{source}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                text = (row.get("text") or row["context"])[: most - used]
                used += len(text)
                yield source, text
                if used >= most:
                    break


def count_tokens(tokenizer: PreTrainedTokenizerBase, all_texts: list[str]) -> torch.Tensor:
    """Occurrences of each token."""
    counts = torch.zeros(len(tokenizer), dtype=torch.float64)
    for start in range(0, len(all_texts), 256):
        batch = encode_plain(tokenizer, all_texts[start : start + 256])
        for ids in batch["input_ids"]:
            counts += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=len(tokenizer))
    return counts


def write_units(all_texts: list[str], path: Path, most: int) -> None:
    """The most frequent units, ties by the unit."""
    units = collections.Counter(unit for text in all_texts for unit in _UNIT.findall(text))
    rows = sorted(units.items(), key=lambda item: (-item[1], item[0]))[:most]
    text = "".join(f"{json.dumps(unit)}\t{count}\n" for unit, count in rows)
    # A fixed time stamp: the same texts give the same bytes.
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, compresslevel=9) as packed:
        packed.write(text.encode())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("compllm_rag/data"))
    parser.add_argument("--most", type=int, default=3_000_000, help="characters counted of each source")
    parser.add_argument("--units", type=int, default=30_000, help="units kept for other tokenizers")
    args = parser.parse_args()
    found = list(texts(args.data_dir, args.most))
    sizes = collections.Counter[str]()
    for source, text in found:
        sizes[source] += len(text)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(DEFAULT_LLM).path, trust_remote_code=False)
    counts = count_tokens(tokenizer, [text for _, text in found])
    save_file(
        {"information": information_of_counts(counts).half()},
        args.out / f"information-{DEFAULT_LLM}.safetensors",
        metadata={
            "format_version": "1",
            "vocabulary": vocabulary_digest(tokenizer),
            "sources": json.dumps(sizes),
            "tokens": str(int(counts.sum())),
        },
    )
    write_units([text for _, text in found], args.out / "unigrams.tsv.gz", args.units)
    print(json.dumps({"characters": sizes, "tokens": int(counts.sum()), "seen": int((counts > 0).sum())}))


if __name__ == "__main__":
    main()

"""How informative a token is: minus the logarithm of how often it occurs in ordinary text.

The embedded model's tokenizer has a table of its own, counted from the texts named in `pipelines/build_information.py`.
For any other tokenizer the table is estimated: the most frequent units of the same texts ship with their counts, each
is tokenised, and its count goes to its tokens. What anchors are chosen by is unigram information, since it recovered as
much as the surprisal under an LM when it picked the tokens to keep, at no cost (docs/design.md, section 4).
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from compllm_rag.models.plaintext import encode_plain

_TABLE = "information-smollm2-135m-instruct.safetensors"
_UNITS = "unigrams.tsv.gz"


def information_for(tokenizer: Any) -> torch.Tensor:
    """Information content of every token of a tokenizer.

    Args:
        tokenizer: A tokenizer of transformers.

    Returns:
        Tensor (vocab_size,) in nats, float32: `-log((count + 0.5) / (total + 0.5 * vocab_size))`.
    """
    table, digest = _shipped_table()
    if vocabulary_digest(tokenizer) == digest:
        return table.clone()
    return information_of_counts(_estimated_counts(tokenizer))


def information_of_counts(counts: torch.Tensor) -> torch.Tensor:
    """Nats of each token from its count, half a count added to each so that none is infinite."""
    counts = counts.double()
    return -torch.log((counts + 0.5) / (counts.sum() + 0.5 * counts.numel())).float()


def vocabulary_digest(tokenizer: Any) -> str:
    """SHA-256 over the tokens in order of their ids."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(tokens, ensure_ascii=True).encode()).hexdigest()


def _data(name: str) -> Path:
    return Path(str(resources.files("compllm_rag"))) / "data" / name


@functools.cache
def _shipped_table() -> tuple[torch.Tensor, str]:
    with safe_open(_data(_TABLE), framework="pt") as file:
        return file.get_tensor("information").float(), str(file.metadata()["vocabulary"])


@functools.cache
def _units() -> tuple[list[str], list[int]]:
    """Units of text (` the`, `,`, a line break) with their counts, most frequent first."""
    with gzip.open(_data(_UNITS), "rt", encoding="utf-8") as lines:
        rows = [line.rstrip("\n").split("\t") for line in lines]
    return [json.loads(unit) for unit, _ in rows], [int(count) for _, count in rows]


def _estimated_counts(tokenizer: Any) -> torch.Tensor:
    units, counts = _units()
    size = max([len(tokenizer), *(index + 1 for index in tokenizer.get_vocab().values())])
    total = torch.zeros(size, dtype=torch.float64)
    encoded = encode_plain(tokenizer, units)["input_ids"]
    for ids, count in zip(encoded, counts, strict=True):
        if ids:
            total.index_add_(0, torch.tensor(ids), torch.full((len(ids),), float(count), dtype=torch.float64))
    return total

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
import itertools
import json
import threading
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from compllm_rag.models.plaintext import encode_plain

_TABLE = "information-smollm2-135m-instruct.safetensors"
_UNITS = "unigrams.tsv.gz"
_MOST_ESTIMATED = 4  # tables kept, of one number for each token
_estimated: dict[bytes, torch.Tensor] = {}
_lock = threading.Lock()


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
    key = _behaviour(tokenizer)
    with _lock:  # a table of a large vocabulary takes seconds; the next compressor of this process finds it here
        if key is None or key not in _estimated:
            made = information_of_counts(_estimated_counts(tokenizer))
            if key is None:
                return made
            while len(_estimated) >= _MOST_ESTIMATED:
                del _estimated[next(iter(_estimated))]
            _estimated[key] = made
        return _estimated[key].clone()


def information_of_counts(counts: torch.Tensor) -> torch.Tensor:
    """Nats of each token from its count, half a count added to each so that none is infinite."""
    counts = counts.double()
    return -torch.log((counts + 0.5) / (counts.sum() + 0.5 * counts.numel())).float()


def vocabulary_digest(tokenizer: Any) -> str:
    """SHA-256 over the tokens in order of their ids."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(tokens, ensure_ascii=True).encode()).hexdigest()


def _behaviour(tokenizer: Any) -> bytes | None:
    """A digest of all that a fast tokenizer goes by; None for one that does not tell."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        return None
    return hashlib.sha256(f"{len(tokenizer)} {core.to_str()}".encode()).digest()


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
    """Counts (size,) float64 of the tokens that the shipped units fall into."""
    units, counts = _units()
    size = max([len(tokenizer), *(index + 1 for index in tokenizer.get_vocab().values())])
    encoded = encode_plain(tokenizer, units, return_attention_mask=False)["input_ids"]
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))  # (n_units,)
    ids = np.fromiter(itertools.chain.from_iterable(encoded), np.int64, int(lengths.sum()))  # (n_tokens,)
    # sums of whole numbers are exact in float64, in whatever order
    weights = np.repeat(np.asarray(counts, np.float64), lengths)  # (n_tokens,)
    return torch.from_numpy(np.bincount(ids, weights, minlength=size))

"""How many bytes does a source token take: as text, as vectors, as concepts in each encoding, and as a KV cache?

The texts are cut as an ingest cuts them; concepts of the right number (random values: what they are does not change
their size) are put into a store on disk, and the folder is measured. The KV cache is what the LLM keeps of the same
text in 16 bits, per token of contexts of several lengths, since layers with a sliding window keep no more than that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3TextConfig

from benchmarks.cells import measured, number, table
from benchmarks.common import Record, parsed, parser, progress, texts, written
from benchmarks.ttft.flops import kv_bytes, layers_of
from compllm_rag.compression.rates import FixedRate
from compllm_rag.compression.segmentation import Segmenter, chunk_texts
from compllm_rag.config import DEFAULT_LLM
from compllm_rag.fingerprint import record_key
from compllm_rag.models.llm import TargetLLM
from compllm_rag.store import DiskStore
from compllm_rag.store.encodings import ENCODINGS

_SEGMENT_LENGTH, _CHUNK_SIZE = 20, 200
_DIMENSION, _ID_BYTES = 384, 8  # of the embedder that ships; its vectors lie in FAISS as float32 with 64-bit ids
# Gemma 3 4B and 12B share the tokenizer of Gemma 3 270M; their shapes are those of the published configurations: width,
# layers, heads, heads of keys and values.
_SHAPES = {"gemma-3-4b": (2560, 34, 8, 4), "gemma-3-12b": (3840, 48, 16, 8)}
_TOKENIZER_OF_SHAPES = "gemma-3-270m"


def _shape(width: int, layers: int, heads: int, kv_heads: int) -> Gemma3TextConfig:
    return Gemma3TextConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=256,
        sliding_window=1024,
    )


def stored(folder: Path, cut: Sequence[Sequence[Sequence[int]]], rate: float, hidden_size: int) -> dict[str, Any]:
    """Sizes of the concepts of chunks, each a list of segments, in each encoding."""
    policy, tokens, concepts = FixedRate(rate, _SEGMENT_LENGTH), 0, 0
    unique: dict[str, int] = {}
    for segments in cut:
        for segment, k in zip(segments, policy.n_concepts(segments), strict=True):
            unique[record_key("default", "0" * 64, k, list(segment))] = k
            tokens, concepts = tokens + len(segment), concepts + k
    generator, encodings = torch.Generator().manual_seed(0), {}
    for name in ENCODINGS:
        place = folder / f"{hidden_size}-{rate}-{name}"
        with DiskStore(place, hidden_size=hidden_size, encoding=name) as store:
            store.put((key, torch.randn(k, hidden_size, generator=generator)) for key, k in unique.items())
            store.flush()
            payload = store.stats().payload_bytes
        disk = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        encodings[name] = {
            "payload_bytes": payload,
            "disk_bytes": disk,
            "payload_per_token": payload / tokens,
            "disk_per_token": disk / tokens,
        }
    for sizes in encodings.values():
        sizes["payload_of_fp16"] = sizes["payload_bytes"] / encodings["fp16"]["payload_bytes"]
    return {
        "achieved_rate": tokens / concepts,
        "concepts": concepts,
        "unique_segments": len(unique),
        "encodings": encodings,
    }


def measure(
    name: str, segmenter: Segmenter, config: Any, sources: list[str], rates: list[float], lengths: list[int]
) -> dict[str, Any]:
    """All sizes for one LLM."""
    chunks = [text for source in sources for text, _, _ in chunk_texts(segmenter.tokenize(source), _CHUNK_SIZE)]
    cut = [segmenter.split(chunk) for chunk in chunks]
    tokens = sum(len(segment) for segments in cut for segment in segments)
    size = sum(len(source.encode()) for source in sources)
    progress(f"{name}: {tokens} tokens in {len(chunks)} chunks")
    with tempfile.TemporaryDirectory() as folder:
        made = {f"{rate:g}": stored(Path(folder), cut, rate, config.hidden_size) for rate in rates}
    layers = layers_of(config)
    return {
        "hidden_size": config.hidden_size,
        "source_tokens": tokens,
        "chunks": len(chunks),
        "segments": sum(map(len, cut)),
        "text_per_token": size / tokens,
        "vectors_per_token": len(chunks) * (4 * _DIMENSION + _ID_BYTES) / tokens,
        "rates": made,
        "cache": {
            "layers": len(layers),
            "sliding_layers": sum(layer.window is not None for layer in layers),
            "window": getattr(config, "sliding_window", None),
            "per_token": {
                str(length): kv_bytes(layers, length) / length if length <= config.max_position_embeddings else None
                for length in lengths
            },
        },
    }


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    options = parser("storage_size", __doc__, "texts rates")
    options.add_argument("--llms", nargs="+", default=[DEFAULT_LLM, _TOKENIZER_OF_SHAPES])
    options.add_argument("--lengths", type=int, nargs="+", default=[1000, 8000, 128000], help="contexts, in tokens")
    args = parsed(options, argv)
    sources, found = texts(args.texts), {}
    for name in args.llms:
        llm = TargetLLM.from_pretrained(name)
        segmenter, own = Segmenter(llm.tokenizer, _SEGMENT_LENGTH), llm.model.config.get_text_config()
        shapes: dict[str, Any] = {Path(name).name: own}
        if name == _TOKENIZER_OF_SHAPES:
            shapes |= {other: _shape(*sizes) for other, sizes in _SHAPES.items()}
        for label, config in shapes.items():
            found[label] = measure(label, segmenter, config, sources, args.rates, args.lengths)
    return written(args, {"segment_length": _SEGMENT_LENGTH, "chunk_size": _CHUNK_SIZE, "llms": found})


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    sizes, others = [], []
    for llm, found in record["llms"].items():
        for rate, row in found["rates"].items():
            for name in ENCODINGS:
                one = row["encodings"][name]
                size = f"{_bytes(one['payload_per_token'])} ({_bytes(one['disk_per_token'])})"
                cells = [llm, str(found["hidden_size"]), f"{rate} ({row['achieved_rate']:.2f})", name, size]
                sizes.append([*cells, f"{one['payload_of_fp16']:.3f}"])
        cache = found["cache"]
        layers = f"{cache['layers']}"
        layers += f" ({cache['sliding_layers']}, {cache['window']:,})" if cache["sliding_layers"] else ""
        cells = [llm, _bytes(found["text_per_token"]), _bytes(found["vectors_per_token"]), layers]
        others.append([*cells, *map(_bytes, cache["per_token"].values())])
    lengths = next(iter(record["llms"].values()))["cache"]["per_token"]
    head = ["LLM", "text", "vectors", "layers (sliding, window)"]
    return [
        "## Bytes per source token",
        "",
        f"{measured(record)}. *Concepts* are payloads, identical segments stored once, and in brackets the whole "
        "folder on disk with its index; *of fp16* compares payloads.",
        "",
        *table(["LLM", "width", "rate (achieved)", "encoding", "concepts (on disk)", "of fp16"], sizes),
        "The same text otherwise: as UTF-8, as the vectors of its chunks (384 dimensions, float32, with ids), and as "
        "the LLM's KV cache in 16 bits, per token of a context of that length. Layers with a sliding window keep no "
        "more than their window; a context that the LLM cannot read has no number.",
        "",
        *table([*head, *(f"KV cache, {int(length):,} tokens" for length in lengths)], others),
    ]


def _bytes(value: float | None) -> str:
    return number(value, 0 if value is not None and value >= 100 else 1)

"""How many bytes does a source token take: as text, as vectors, as concepts in each encoding, and as a KV cache?

The texts are cut as an ingest cuts them; concepts of the right number (random values: what they are does not change
their size) are put into a store on disk, and the folder is measured. The KV cache is what the LLM keeps of the same
text in 16 bits, per token of contexts of several lengths, since layers with a sliding window keep no more than that.
`python -m benchmarks.report` makes docs/storage.md of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3TextConfig

from benchmarks.common import parser, progress, texts, write
from compllm_rag.compression.rates import FixedRate
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.config import DEFAULT_LLM
from compllm_rag.fingerprint import record_key
from compllm_rag.llamaindex.node_parser import chunk_texts
from compllm_rag.models.llm import TargetLLM
from compllm_rag.store import DiskStore
from compllm_rag.store.encodings import ENCODINGS

_SEGMENT_LENGTH, _CHUNK_SIZE = 20, 200
_DIMENSION, _ID_BYTES = 384, 8  # of the embedder that ships; its vectors lie in FAISS as float32 with 64-bit ids
_CACHE_BYTES = 2  # of a value in a KV cache
# Gemma 3 4B and 12B share the tokenizer of Gemma 3 270M; their shapes are those of the published configurations.
_SHAPES: dict[str, dict[str, Any]] = {
    "gemma-3-4b": {
        "hidden_size": 2560,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
    },
    "gemma-3-12b": {
        "hidden_size": 3840,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "sliding_window": 1024,
    },
}
_TOKENIZER_OF_SHAPES = "gemma-3-270m"


def cache_bytes(config: Any, n_tokens: int) -> int:
    """Bytes that a KV cache keeps of a text of that many tokens; layers with a window keep no more than it."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    kept = sum(min(n_tokens, window) if window and kind == "sliding_attention" else n_tokens for kind in kinds)
    return 2 * int(kept * config.num_key_value_heads * head) * _CACHE_BYTES


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
    layers = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
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
            "sliding_layers": layers.count("sliding_attention"),
            "window": getattr(config, "sliding_window", None),
            "per_token": {
                str(length): cache_bytes(config, length) / length if length <= config.max_position_embeddings else None
                for length in lengths
            },
        },
    }


def main() -> None:
    """Command line."""
    options = parser(__doc__)
    options.add_argument("--llms", nargs="+", default=[DEFAULT_LLM, _TOKENIZER_OF_SHAPES])
    options.add_argument("--rates", type=float, nargs="+", default=[2.0, 4.0])
    options.add_argument("--lengths", type=int, nargs="+", default=[1000, 8000, 128000], help="contexts, in tokens")
    args = options.parse_args()
    sources, found = texts(args.texts), {}
    for name in args.llms:
        llm = TargetLLM.from_pretrained(name)
        segmenter, own = Segmenter(llm.tokenizer, _SEGMENT_LENGTH), llm.model.config.get_text_config()
        shapes = {Path(name).name: own}
        if name == _TOKENIZER_OF_SHAPES:
            shapes |= {other: Gemma3TextConfig(**fields) for other, fields in _SHAPES.items()}
        for label, config in shapes.items():
            found[label] = measure(label, segmenter, config, sources, args.rates, args.lengths)
    write({"segment_length": _SEGMENT_LENGTH, "chunk_size": _CHUNK_SIZE, "llms": found}, args.json)


if __name__ == "__main__":
    main()

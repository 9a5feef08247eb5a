"""The arithmetic of a prefill: a bound to put beside a measured speed-up.

Multiplying (m, k) by (k, n) matrices takes 2 m k n operations. With hidden size d, H query and G key/value heads of h
each, and MLP width f, the matrices of a decoder layer have

    P = d (H + 2 G) h  +  H h d  +  3 d f

weights, so n positions cost 2 P n in it. Queries with keys and probabilities with values are 2 h operations each for
every head and every pair of a position and one it attends to: 4 H h a pair. A causal layer has n^2 / 2 pairs; one with
a sliding window W has n W - W^2 / 2 once n is longer than W. Norms, rotary positions and activations are left out
(they grow as n does and are small beside P), so is the head, which sees one position.

For 36 layers of d = 2560, H = 32, G = 8, h = 128, f = 9728 (Qwen3-4B) that is 7.27e9 n + 2.95e5 n^2 operations: the
first term is the larger one up to n = 24,600, the second one is 84 % of all at n = 131,072. Reading n / C positions in
place of n is therefore between C and C^2 times less work: 3.45 times at C = 2 and 10.85 times at C = 4 for that shape
at 128k.

Compressing n tokens is a forward of n + n / C positions through the compressor's first layers, with attention within
segments only (its LoRA and its head, a few per cent, are left out). It grows as n does, and what it saves as n^2: below
some length, the crossover, compressing in line costs more than it saves.

Deep concepts enter at layer L of D. A prompt with m tokens of its own and K concepts is m positions in the first L
layers and m + K in the others: at K = n / C and small m, (D - L) / (D C) of the linear work of text and
(D - L) / (D C^2) of its attention. What the KV cache holds goes by the same counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer.

    Attributes:
        weights: Of its linear maps.
        attention: Heads times head_dim.
        kv: Key and value heads times head_dim, together.
        window: Positions it attends to; None is all.
    """

    weights: int
    attention: int
    kv: int
    window: int | None


def layers_of(config: Any) -> list[LayerShape]:
    """Layers of a text configuration of transformers (Llama, Qwen3, Gemma 3, Mistral and those alike)."""
    width, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    attention, kv = config.num_attention_heads * head, 2 * config.num_key_value_heads * head
    weights = 2 * width * attention + width * kv + 3 * width * inner
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    return [LayerShape(weights, attention, kv, window if kind == "sliding_attention" else None) for kind in kinds]


def pairs(n: float, window: int | None) -> float:
    """Pairs of a position and one it attends to, of n positions in a causal layer."""
    return n * window - window**2 / 2 if window is not None and n > window else n**2 / 2


def prefill(layers: list[LayerShape], n: float) -> float:
    """FLOPs to prefill n positions."""
    return sum(2 * layer.weights * n + 4 * layer.attention * pairs(n, layer.window) for layer in layers)


def compress(layers: list[LayerShape], n: float, rate: float, segment: int) -> float:
    """FLOPs to compress n source tokens: each segment and its anchors through the first layers, each on its own.

    Args:
        layers: Those that compress.
        n: Source tokens.
        rate: Source tokens per concept.
        segment: Tokens of a segment.
    """
    return n / segment * prefill(layers, segment * (1 + 1 / rate))


def deep_prefill(layers: list[LayerShape], entry: int, tokens: float, concepts: float) -> float:
    """FLOPs to prefill a prompt with deep concepts; with an entry layer of 0 those at the input embeddings.

    Args:
        layers: All of the LLM.
        entry: L, how many of them see no concepts.
        tokens: The prompt's own: question, markers, text.
        concepts: That stand for passages.
    """
    return prefill(layers[:entry], tokens) + prefill(layers[entry:], tokens + concepts)


def speed_up(layers: list[LayerShape], n: float, rate: float) -> float:
    """Bound on TTFT as text over TTFT as concepts, those being in the store."""
    return prefill(layers, n) / prefill(layers, n / rate)


def crossover(layers: list[LayerShape], depth: int, rate: float, segment: int, longest: float = 1e7) -> float | None:
    """Source tokens from which compressing in line and reading concepts is less work than reading text.

    Returns:
        The length, 0 where concepts are always less work, None where they are not up to `longest`.
    """

    def gain(n: float) -> float:
        return prefill(layers, n) - compress(layers[:depth], n, rate, segment) - prefill(layers, n / rate)

    low, high = 1.0, longest
    if gain(low) >= 0:
        return 0.0
    if gain(high) < 0:
        return None
    while high - low > 0.5:
        middle = (low + high) / 2
        low, high = (low, middle) if gain(middle) >= 0 else (middle, high)
    return high


def kv_bytes(layers: list[LayerShape], n: float, width: int = 2) -> float:
    """Bytes of the KV cache of n positions; a layer with a window keeps no more than that.

    Args:
        layers: See `layers_of`.
        n: Positions.
        width: Bytes of a value, 2 for bf16.
    """
    return sum(layer.kv * width * (n if layer.window is None else min(n, layer.window)) for layer in layers)


def deep_kv_bytes(layers: list[LayerShape], entry: int, tokens: float, concepts: float, width: int = 2) -> float:
    """Bytes of the KV cache of a prompt with deep concepts; arguments as of `deep_prefill` and `kv_bytes`."""
    return kv_bytes(layers[:entry], tokens, width) + kv_bytes(layers[entry:], tokens + concepts, width)


def weight_bytes(config: Any, width: int = 2) -> float:
    """Bytes of an LLM's linear maps and embeddings, the output matrix too where it is one of its own; no norms."""
    tables = 1 if getattr(config, "tie_word_embeddings", True) else 2
    maps = sum(layer.weights for layer in layers_of(config))
    return float(width * (maps + tables * config.vocab_size * config.hidden_size))

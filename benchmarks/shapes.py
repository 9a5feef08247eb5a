"""LLMs of a known shape with random weights: speed does not depend on the values, and no download is needed.

The fields that decide the speed are those of the published configurations, but for the window: it is 262,144 positions
in all, so that 128k tokens of text and the markers between passages fit; rotary positions are scaled where a
configuration knows fewer. `tiny` is for trying the path.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from compllm_rag.compression.compressor import Compressor
from compllm_rag.config import CompressorConfig
from compllm_rag.errors import ConfigurationError
from compllm_rag.models import resolve_model
from compllm_rag.models.llm import TargetLLM

_SIZES = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
_SIZES += ["head_dim", "vocab_size", "max_position_embeddings"]
# From the configuration files of HuggingFaceTB/SmolLM2-135M-Instruct (the embedded LLM's, made for 8,192 positions),
# Qwen/Qwen3-4B-Instruct-2507 and google/gemma-3-4b-pt (its text part).
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        **dict(zip(_SIZES, (576, 1536, 30, 9, 3, 64, 49152, 262144), strict=True)),
        "rope_parameters": {"rope_type": "linear", "factor": 32.0, "rope_theta": 100_000.0},
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        **dict(zip(_SIZES, (2560, 9728, 36, 32, 8, 128, 151936, 262144), strict=True)),
        "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0},
        "tie_word_embeddings": True,
    },
    "gemma3-4b": {
        "model_type": "gemma3_text",
        **dict(zip(_SIZES, (2560, 10240, 34, 8, 4, 256, 262208, 262144), strict=True)),
        "sliding_window": 1024,
        # Five layers with a window, then one without.
        "layer_types": ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(34)],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        },
    },
    "tiny": {
        "model_type": "qwen3",
        **dict(zip(_SIZES, (32, 64, 3, 4, 2, 8, 65536, 262144), strict=True)),
        "tie_word_embeddings": True,
    },
}
# Those that compute only the positions inside a window; sdpa computes all of them and masks, which would flatter
# whoever has fewer positions.
WINDOWED = ("flash_attention_2", "flex_attention")


def config_of(shape: str) -> Any:
    """The configuration of a shape, for transformers."""
    from transformers import AutoConfig

    fields = dict(SHAPES[shape])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def random_llm(shape: str, tokenizer: Any, *, dtype: str, device: str, attention: str = "sdpa") -> TargetLLM:
    """A target LLM of a shape.

    Args:
        shape: A name of `SHAPES`.
        tokenizer: Any that knows no more tokens than the shape; it decides how texts are cut, not how fast they are.
        dtype: float32, bfloat16 or float16.
        device: Where it lies; the weights are drawn there.
        attention: `sdpa`, `flash_attention_2`, `flex_attention` or `eager`, the same for text and for concepts.

    Raises:
        ConfigurationError: A shape with sliding windows and an attention that computes what lies outside of them, or a
            tokenizer with more tokens than the shape.
    """
    from transformers import AutoModelForCausalLM

    config = config_of(shape)
    # Special tokens are those of the tokenizer; none of the configuration's may end an answer.
    config.bos_token_id = config.eos_token_id = None
    if "sliding_window" in SHAPES[shape] and attention not in WINDOWED:
        raise ConfigurationError(
            "attention computes whole rows where layers have a window",
            got=f"{attention} for {shape}",
            expected=f"one of {', '.join(WINDOWED)}",
            next_step="pass --attention flex_attention, on a GPU, or measure another shape",
        )
    if len(tokenizer) > config.vocab_size:
        raise ConfigurationError(
            "tokenizer has more tokens than the shape",
            got=len(tokenizer),
            expected=f"at most {config.vocab_size}",
            next_step="pass another --llm to take the tokenizer from",
        )
    torch.manual_seed(0)
    with torch.device(device):
        make: Any = AutoModelForCausalLM.from_config
        model = make(config, dtype=getattr(torch, dtype), attn_implementation=attention)
    return TargetLLM(model.to(device), tokenizer, source=f"random weights, {shape}", digests={"shape": shape})


def attention_for(shape: str, device: str) -> str:
    """The attention a shape is measured with where none is asked for: with windows, the best there is on a GPU."""
    if "sliding_window" not in SHAPES[shape] or device == "cpu":
        return "sdpa"
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") is not None else "flex_attention"


def tokenizer_of(name: str) -> Any:
    """The tokenizer of an LLM: alias, hub id, or a folder, which may hold nothing else."""
    from transformers import AutoTokenizer

    folder = Path(name) if Path(name).is_dir() else resolve_model(name).path
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def noisy_compressor(llm: TargetLLM, config: CompressorConfig | None = None) -> Compressor:
    """An untrained compressor whose head is filled with small noise, so that nothing can be skipped.

    Segments are shorter than any window, so it runs with the same plain attention for all shapes.
    """
    torch.manual_seed(0)
    compressor = Compressor(llm, config)
    compressor.decoder.config._attn_implementation = "sdpa"
    with torch.no_grad():
        compressor.head.weight.normal_(std=1e-3)
    compressor.refresh_fingerprint()
    return compressor

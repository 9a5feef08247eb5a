"""Tiny random LLMs of a few architectures with a byte-level tokenizer and hand-written chat templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from compllm_rag.models.llm import TargetLLM

ARCHITECTURES = ("llama", "qwen3", "gemma3", "mistral")

TEXT = """The lighthouse on Gull Rock was built in 1871 by Ada Marsh. It stands 42 metres tall, and its lamp turned for
ninety years. In winter the keepers rowed out through the surf with oil, flour and letters.

Marsh never saw the lamp lit. She died in March 1871, three weeks before the work was done! Her brother Tom took the
boat out that night. "It burns," he wrote. "It burns, and she is not here to see it."

Today the tower is empty. Gulls nest in the lamp room; the stairs are closed. A small museum in the village keeps the
lens, the log books and one of the boats. Visitors may row it on Sundays, if the weather allows. It rarely does.
"""

CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# Gemma's style: a beginning token, no system turn, contents trimmed.
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)


def tokenizer(template: str | None = CHATML, text: str = TEXT) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|none|>", "<|bos|>", "<|start|>", "<|end|>"]
    core.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|none|>", unk_token=None
    )
    made.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    made.chat_template = template
    return made


def model(architecture: str = "llama", *, seed: int = 0, layers: int = 2, window: int = 2048, head: int = 8) -> Any:
    """A random decoder, hidden size 32."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head,
        "max_position_embeddings": window,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 3,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**common)).eval()
    if architecture == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**common)).eval()
    if architecture == "qwen2":
        del common["head_dim"]
        return Qwen2ForCausalLM(
            Qwen2Config(**common, use_sliding_window=True, sliding_window=16, max_window_layers=layers // 2)
        ).eval()
    if architecture == "mistral":
        return MistralForCausalLM(MistralConfig(**common, sliding_window=16)).eval()
    kinds = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    if architecture == "gemma2":
        return Gemma2ForCausalLM(
            Gemma2Config(**common, sliding_window=16, layer_types=kinds, query_pre_attn_scalar=8)
        ).eval()
    if architecture == "gemma3":
        return Gemma3ForCausalLM(
            Gemma3TextConfig(**common, sliding_window=16, layer_types=kinds, query_pre_attn_scalar=8)
        ).eval()
    raise ValueError(architecture)


def llm(architecture: str = "llama", *, seed: int = 0, layers: int = 2, window: int = 2048, head: int = 8) -> TargetLLM:
    """A random target LLM with its tokenizer."""
    template = NO_SYSTEM if architecture.startswith("gemma") else CHATML
    made = model(architecture, seed=seed, layers=layers, window=window, head=head)
    return TargetLLM(made, tokenizer(template))


def save(folder: Path, architecture: str = "llama", *, seed: int = 0, layers: int = 2, head: int = 8) -> Path:
    """A random target LLM as a folder that `TargetLLM.from_pretrained` reads."""
    made = llm(architecture, seed=seed, layers=layers, head=head)
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder

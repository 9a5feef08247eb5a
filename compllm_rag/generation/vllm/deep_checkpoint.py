"""An LLM as a checkpoint that vLLM serves with this package's plugin: deep concepts are read at its entry layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compllm_rag.errors import UnsupportedModelError
from compllm_rag.generation.vllm.deep_rows import RowLayout
from compllm_rag.models.halves import Halves
from compllm_rag.models.llm import decoder_of

# By transformers' name of an LLM, the name of the one in `plugin`.
SERVED = {"LlamaForCausalLM": "CompLLMDeepLlamaForCausalLM"}


def write_deep_checkpoint(folder: Path, halves: Halves) -> Path:
    """Write an LLM as it reads deep concepts: the LoRA of each half, where there is one, merged.

    Args:
        folder: Where it goes.
        halves: `halves` of the compressor or of the library.

    Returns:
        The folder.

    Raises:
        UnsupportedModelError: The plugin has no LLM of this kind, or concepts enter at the input embeddings.
    """
    llm, merged = halves.llm, halves.merged()
    name = type(llm.model).__name__
    if name not in SERVED or not halves.layer:
        raise UnsupportedModelError(
            "vLLM cannot read deep concepts of this LLM",
            got=f"{name}, entry layer {halves.layer}",
            expected=f"{', '.join(SERVED)}, an entry layer of at least 1",
            next_step="use the generator of this process",
        )
    state: dict[str, Any] = dict(llm.model.state_dict())
    decoder = next(key for key in state if "layers." in key).partition("layers.")[0]  # such as "model."
    for half, begin in ((merged.lower, 0), (merged.upper, halves.layer)):
        for key, tensor in half.state_dict().items():
            _, found, rest = key.partition("layers.")
            if found:
                number, _, leaf = rest.partition(".")
                state[f"{decoder}layers.{int(number) + begin}.{leaf}"] = tensor
    llm.model.save_pretrained(folder, state_dict=state, safe_serialization=True)
    llm.tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    layout = RowLayout.of(decoder_of(llm.model).config, halves.layer)
    config |= {"architectures": [SERVED[name]], "head_dim": _head_size(llm.model.config), **layout.fields()}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _head_size(config: Any) -> int:
    """Said outright, since it is no longer the hidden size over the heads."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

"""GGUF files as ordinary model folders: de-quantised once, in float32, saved as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def convert(source: Path, target: Path) -> None:
    """Convert a GGUF file.

    Args:
        source: The file.
        target: Folder for config, safetensors and tokenizer.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from compllm_rag.models.quiet import quiet_transformers

    where: dict[str, Any] = {"gguf_file": source.name, "trust_remote_code": False, "local_files_only": True}
    with quiet_transformers():
        tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, **where)
        model: Any = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
    # The loader remembers that the weights were quantised; saved along, that would make every later load fail.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    shared: dict[int, str] = {}
    tensors = {}
    for name, tensor in model.state_dict().items():
        # Tied tensors (output head and embedding) are stored once; loading ties them again.
        if shared.setdefault(tensor.data_ptr(), name) == name:
            tensors[name] = tensor.contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    ends = sorted({token for token in (model.config.eos_token_id, tokenizer.eos_token_id) if isinstance(token, int)})
    settings: Any = GenerationConfig
    settings(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(target)

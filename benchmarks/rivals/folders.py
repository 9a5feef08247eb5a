"""Model folders for runners: the target LLM with its reader merged, and copies that transformers 4 reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from compllm_rag.models.llm import TargetLLM
from compllm_rag.models.quiet import quiet_transformers

_FILES = ("*.safetensors", "tokenizer.json", "vocab.txt", "*.model", "special_tokens_map.json", "chat_template.jinja")


def export(llm: TargetLLM, folder: Path) -> Path:
    """Write the target LLM, reader and all, as a checkpoint."""
    with quiet_transformers():
        llm.model.save_pretrained(folder, safe_serialization=True)
    return folder


def for_transformers_4(source: Path, folder: Path, architecture: str | None = None) -> Path:
    """A model folder that transformers 4 understands; large files are linked, not copied.

    Version 5 writes the rotary base into `rope_parameters`, where version 4 does not look (it would take its default
    without a word), the dtype under another name, and tokenizer classes that version 4 does not have.

    Args:
        source: As any version wrote it.
        folder: Gets a folder of the source's name, since LLMLingua-2 goes by the name.
        architecture: Class of the model, for a source that does not name it; LLMLingua wants it named.

    Returns:
        The new folder.
    """
    target = folder / source.name
    target.mkdir(parents=True)
    for pattern in _FILES:
        for path in source.glob(pattern):
            _link(path.resolve(), target / path.name)
    config = _read(source / "config.json")
    if architecture and not config.get("architectures"):
        config["architectures"] = [architecture]
    rope = config.pop("rope_parameters", None) or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if (source / "tokenizer_config.json").exists():
        tokenizer = _read(source / "tokenizer_config.json")
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        # A list in version 5; version 4 knows a mapping of another meaning. The tokens are special in tokenizer.json.
        tokenizer.pop("extra_special_tokens", None)
        (target / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return target


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)

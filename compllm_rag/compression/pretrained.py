"""Compressors on disk and on the hub: `config.json` and `compressor.safetensors`, nothing else."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.compression.spec import ConceptSpec, embedding_rms
from compllm_rag.config import FORMAT_VERSION, CompressorConfig
from compllm_rag.errors import (
    FingerprintMismatchError,
    UnknownModelError,
    UnsupportedFormatError,
)
from compllm_rag.models.adapters import load_lora_state
from compllm_rag.models.hub import snapshot
from compllm_rag.models.llm import TargetLLM

if TYPE_CHECKING:
    from compllm_rag.compression.compressor import Compressor

_CONFIG, _WEIGHTS = "config.json", "compressor.safetensors"


def save_compressor(compressor: Compressor, folder: Path) -> Path:
    """Write a compressor; a reader of the folder sees the old one or the new one, never half of each.

    Args:
        compressor: What to save.
        folder: Made if missing.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "format_version": FORMAT_VERSION,
        "kind": "compllm-rag compressor",
        "config": compressor.config.model_dump(mode="json"),
        "llm": {"source": compressor.llm.source, "identity": compressor.llm.identity},
        "fingerprint": compressor.refresh_fingerprint(),
    }
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        weights, config = Path(scratch) / _WEIGHTS, Path(scratch) / _CONFIG
        save_file({name: tensor.cpu() for name, tensor in compressor.state().items()}, weights)
        config.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        # The configuration names the fingerprint of the weights, so a mixture of old and new is refused on loading.
        os.replace(weights, folder / _WEIGHTS)
        os.replace(config, folder / _CONFIG)
    return folder


def load_compressor(
    cls: type[Compressor],
    folder: str | Path,
    llm: TargetLLM | None = None,
    *,
    revision: str | None = None,
    **llm_options: Any,
) -> Compressor:
    """Load a compressor.

    Args:
        cls: `Compressor`, or a class derived from it.
        folder: A local folder, or a hub id (then with `revision`, a commit).
        llm: Its target LLM; None loads the one named in its configuration.
        revision: Commit of a hub id.
        **llm_options: For `TargetLLM.from_pretrained` when `llm` is None.

    Raises:
        UnknownModelError: Neither a folder nor a hub id with revision.
        ModelFetchError: The hub cannot be reached.
        UnsupportedFormatError: Files are missing, damaged, or of a newer format.
        FingerprintMismatchError: The compressor was made for another LLM, tokenizer or reader.
    """
    path = Path(folder)
    if not path.is_dir():
        path = _from_hub(str(folder), revision)
    record = _read_config(path / _CONFIG)
    if llm is None:
        llm = TargetLLM.from_pretrained(record["llm"]["source"], **llm_options)
    _check_llm(record, llm)
    config = CompressorConfig.model_validate(record["config"])
    state = _read_weights(path / _WEIGHTS)
    _check_tensors(state, llm)
    compressor = cls(llm, config, information=state["information"].float())
    _set_weights(compressor, state)
    if compressor.fingerprint != record["fingerprint"]:
        raise FingerprintMismatchError(
            "compressor's weights are not those its configuration names",
            got=compressor.fingerprint[:16],
            expected=record["fingerprint"][:16],
            next_step="fetch or save the compressor again",
        )
    return compressor


def load_spec(folder: Path, llm: TargetLLM) -> ConceptSpec:
    """What a saved compressor's concepts are; its weights are not read.

    Args:
        folder: As `save_compressor` writes it.
        llm: Its target LLM.

    Raises:
        UnsupportedFormatError: Files are missing, or of a newer format.
        FingerprintMismatchError: The compressor was made for another LLM, tokenizer or reader.
    """
    record = _read_config(folder / _CONFIG)
    _check_llm(record, llm)
    if not (folder / _WEIGHTS).is_file():
        raise UnsupportedFormatError(
            "compressor's weights cannot be read",
            got=f"no {folder / _WEIGHTS}",
            expected="a whole safetensors file",
            next_step="fetch or save the compressor again",
        )
    config = CompressorConfig.model_validate(record["config"])
    segmenter = Segmenter(llm.tokenizer, config.segment_length)
    return ConceptSpec(config, str(record["fingerprint"]), segmenter, llm.hidden_size, embedding_rms(llm))


def _check_llm(record: dict[str, Any], llm: TargetLLM) -> None:
    if record["llm"]["identity"] != llm.identity:
        raise FingerprintMismatchError(
            "compressor was made for another LLM",
            got=f"{llm.source} ({llm.identity[:16]})",
            expected=f"{record['llm']['source']} ({record['llm']['identity'][:16]})",
            next_step="load that LLM (and its reader), or train a compressor for this one",
        )


def push_compressor(compressor: Compressor, repo_id: str, *, private: bool = False) -> str:
    """Upload a compressor to the hub; needs the user's own token.

    Returns:
        The commit's id, which `load_compressor` takes as `revision`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        save_compressor(compressor, Path(scratch))
        return push_folder(Path(scratch), repo_id, private=private)


def push_folder(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload the folder of a trained reader or compressor with its model card; needs the user's own token.

    Returns:
        The commit's id.

    Raises:
        UnsupportedFormatError: The folder holds neither.
    """
    from huggingface_hub import HfApi

    if not any((folder / name).exists() for name in (_WEIGHTS, "adapter_model.safetensors")):
        raise UnsupportedFormatError(
            "nothing here to upload",
            got=str(folder),
            expected=f"a folder with {_WEIGHTS} or adapter_model.safetensors",
            next_step="name the best/ folder of a training run",
        )
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Add adapter of compllm-rag")
    return str(commit.oid)


def _from_hub(repo_id: str, revision: str | None) -> Path:
    if revision is None or repo_id.count("/") != 1:
        raise UnknownModelError(
            "no compressor here",
            got=repo_id,
            expected="a folder, or a hub id `org/name` with revision=<commit>",
            next_step="check the path",
        )
    return snapshot(repo_id, revision, [_CONFIG, _WEIGHTS])


def _read_config(path: Path) -> dict[str, Any]:
    try:
        record = dict(json.loads(path.read_text(encoding="utf-8")))
        version = record["format_version"]
        if version == FORMAT_VERSION:
            CompressorConfig.model_validate(record["config"])
            named = (record["llm"]["source"], record["llm"]["identity"], record["fingerprint"])
            version = version if all(isinstance(name, str) for name in named) else "incomplete"
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        version = "no file" if isinstance(error, OSError) else f"unreadable ({type(error).__name__})"
    if version != FORMAT_VERSION:
        raise UnsupportedFormatError(
            "this is not a compressor this release reads",
            got=f"{path}, format {version}",
            expected=f"format {FORMAT_VERSION}",
            next_step="update compllm-rag, or save the compressor again",
        )
    return dict(record)


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise UnsupportedFormatError(
            "compressor's weights cannot be read",
            got=f"{path} ({type(error).__name__})",
            expected="a whole safetensors file",
            next_step="fetch or save the compressor again",
        ) from error


def _check_tensors(state: dict[str, torch.Tensor], llm: TargetLLM) -> None:
    width = llm.hidden_size
    shapes = {"head.weight": (width, width), "head.bias": (width,), "information": (llm.embedding.weight.shape[0],)}
    wrong = [name for name, shape in shapes.items() if name not in state or state[name].shape != shape]
    wrong += [name for name in state if name not in shapes and not name.startswith("lora.")]
    wrong += [name for name, tensor in state.items() if tensor.dtype != torch.float16]
    if wrong:
        found = state.get(wrong[0])
        raise UnsupportedFormatError(
            "compressor's weights do not fit",
            got=f"{wrong[0]}, {'missing' if found is None else f'{found.dtype} {list(found.shape)}'}",
            expected=f"float16 LoRA tensors and {', '.join(f'{name} {list(shape)}' for name, shape in shapes.items())}",
            next_step="use a compressor made for this LLM",
        )


def _set_weights(compressor: Compressor, state: dict[str, torch.Tensor]) -> None:
    head = compressor.head
    with torch.no_grad():
        head.weight.copy_(state["head.weight"])
        head.bias.copy_(state["head.bias"])
    lora = {name.removeprefix("lora."): tensor for name, tensor in state.items() if name.startswith("lora.")}
    load_lora_state(compressor.decoder, lora)

"""Compressors on disk and on the hub: `config.json` and `compressor.safetensors`, nothing else."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from compllm_rag.compression.late_interaction import RELEVANCE_FILE, LateInteraction
from compllm_rag.compression.rate_policies.losses import RATES_FILE, LossPredictor
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.compression.spec import ConceptCompressor, ConceptSpec, embedding_rms, reading_halves, state_rms
from compllm_rag.config import FORMAT_VERSION, CompressorConfig
from compllm_rag.errors import (
    FingerprintMismatchError,
    UnknownModelError,
    UnsupportedFormatError,
)
from compllm_rag.fingerprint import tensor_digest
from compllm_rag.models.halves import Halves
from compllm_rag.models.hub import snapshot
from compllm_rag.models.llm import TargetLLM

_CONFIG, _WEIGHTS = "config.json", "compressor.safetensors"


def save_compressor(compressor: ConceptCompressor, folder: Path) -> Path:
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
        for name, beside in ((RATES_FILE, compressor.losses), (RELEVANCE_FILE, compressor.interaction)):
            if beside is not None:
                beside.save(Path(scratch))
                os.replace(Path(scratch) / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)  # that of another compressor
    return folder


@dataclass(frozen=True)
class SavedCompressor:
    """A compressor as it lies on disk.

    Attributes:
        llm: Its target LLM.
        config: What it is.
        state: Its tensors by name, fp16.
        fingerprint: What its configuration says it has; None where it is read to go on with another reader.
        losses: What rates lose of its concepts, where that was fitted.
        interaction: Which sentence answers a question, where that was learned.
    """

    llm: TargetLLM
    config: CompressorConfig
    state: dict[str, torch.Tensor]
    fingerprint: str | None
    losses: LossPredictor | None = None
    interaction: LateInteraction | None = None

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names begin so, without that beginning."""
        return _under(self.state, prefix)

    def check_tensors(self, shapes: dict[str, tuple[int, ...]], prefixes: tuple[str, ...]) -> None:
        """Refuse other tensors than those of the shapes given and those under the prefixes.

        Raises:
            UnsupportedFormatError: One is missing, superfluous, or of another shape or dtype.
        """
        state = self.state
        wrong = [name for name, shape in shapes.items() if name not in state or state[name].shape != shape]
        wrong += [name for name in state if name not in shapes and not name.startswith(prefixes)]
        wrong += [name for name, tensor in state.items() if tensor.dtype != torch.float16]
        if wrong:
            found = state.get(wrong[0])
            fixed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise UnsupportedFormatError(
                "compressor's weights do not fit",
                got=f"{wrong[0]}, {'missing' if found is None else f'{found.dtype} {list(found.shape)}'}",
                expected=f"float16 LoRA tensors and {fixed}",
                next_step="use a compressor made for this LLM",
            )

    def check_fingerprint(self, fingerprint: str) -> None:
        """Refuse weights that are not those the configuration names.

        Raises:
            FingerprintMismatchError: With both.
        """
        if self.fingerprint is not None and fingerprint != self.fingerprint:
            raise FingerprintMismatchError(
                "compressor's weights are not those its configuration names",
                got=fingerprint[:16],
                expected=self.fingerprint[:16],
                next_step="fetch or save the compressor again",
            )


def read_compressor(
    folder: str | Path,
    llm: TargetLLM | None = None,
    *,
    revision: str | None = None,
    other_reader: bool = False,
    **llm_options: Any,
) -> SavedCompressor:
    """Read a compressor's files.

    Args:
        folder: A local folder, or a hub id (then with `revision`, a commit).
        llm: Its target LLM; None loads the one named in its configuration.
        revision: Commit of a hub id.
        other_reader: Take it although it was made with another reader of this LLM, to be trained further with the one
            that is merged now. What rates lose, and what is relevant, is left behind: both were fitted to that reader.
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
    if not other_reader or record["llm"]["source"] != llm.source:
        _check_llm(record, llm)
    config, state = CompressorConfig.model_validate(record["config"]), _read_weights(path / _WEIGHTS)
    if record["llm"]["identity"] != llm.identity:
        return SavedCompressor(llm, config, state, None)
    beside = LossPredictor.load(path), LateInteraction.load(path)
    return SavedCompressor(llm, config, state, str(record["fingerprint"]), *beside)


def saved_config(folder: Path) -> CompressorConfig:
    """The configuration of a saved compressor; neither its weights nor an LLM are read.

    Raises:
        UnsupportedFormatError: Files are missing, or of a newer format.
    """
    return CompressorConfig.model_validate(_read_config(folder / _CONFIG)["config"])


def weights_digest(folder: Path) -> str:
    """SHA-256 of everything learned in a saved compressor, whatever its settings are.

    Raises:
        UnsupportedFormatError: Files are missing or damaged.
    """
    return tensor_digest({name: tensor.numpy() for name, tensor in _read_weights(folder / _WEIGHTS).items()})


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
    segmenter = Segmenter(llm.tokenizer, config.segment_length, config.segmenter_version)
    scale = state_rms(llm, config) if config.deep else embedding_rms(llm)
    return ConceptSpec(config, str(record["fingerprint"]), segmenter, llm.hidden_size, scale, llm.depth)


def load_reading(folder: Path, llm: TargetLLM, config: CompressorConfig) -> Halves:
    """The halves of an LLM with the LoRAs that read a saved compressor's deep concepts; the one that writes stays out.

    Raises:
        UnsupportedFormatError: The weights are missing or damaged.
    """
    state = _read_weights(folder / _WEIGHTS) if config.read_rank or config.prompt_rank else {}
    return reading_halves(llm, config, _under(state, "read."), _under(state, "prompt."))


def _check_llm(record: dict[str, Any], llm: TargetLLM) -> None:
    if record["llm"]["identity"] != llm.identity:
        raise FingerprintMismatchError(
            "compressor was made for another LLM",
            got=f"{llm.source} ({llm.identity[:16]})",
            expected=f"{record['llm']['source']} ({record['llm']['identity'][:16]})",
            next_step="load that LLM (and its reader), or train a compressor for this one; `train --other-reader` "
            "goes on from one made with another reader",
        )


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
    return snapshot(repo_id, revision, [_CONFIG, _WEIGHTS, RATES_FILE, RELEVANCE_FILE])


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


def _under(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

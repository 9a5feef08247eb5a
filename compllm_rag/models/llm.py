"""The target LLM: a frozen decoder that reads concepts in place of token embeddings."""

from __future__ import annotations

import inspect
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compllm_rag.errors import ConfigurationError, UnsupportedModelError
from compllm_rag.fingerprint import mapping_digest, tagged_digest, tensor_digest
from compllm_rag.models import resolve_model
from compllm_rag.models.checkpoints import (
    check_device,
    check_dtype,
    default_device,
    load_checkpoint,
    placed,
    quantisation_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IN_MEMORY = "in-memory"
"""Source of an LLM that has no name."""
_PROVENANCE = {"transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures", "use_cache"}


class TargetLLM:
    """A frozen decoder LLM with its tokenizer and its identity.

    Args:
        model: A decoder of transformers that takes `inputs_embeds`.
        tokenizer: Its fast tokenizer.
        source: How the model is named again: alias, folder or `org/name@revision`.
        digests: SHA-256 of the source files (and of the reader adapter); None computes one from the tensors.

    Raises:
        UnsupportedModelError: The model cannot read embeddings, or needs more than embeddings.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        source: str = IN_MEMORY,
        digests: dict[str, str] | None = None,
    ) -> None:
        _check(model)
        frozen: Any = model
        frozen.requires_grad_(False)
        frozen.eval()
        self.model = frozen
        self.tokenizer: Any = tokenizer
        self.source = source
        self.reader: Path | None = None  # where the adapter lies that `from_pretrained` merged
        self.digests = digests if digests is not None else _tensor_digests(model, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        spec: str | Path,
        *,
        reader: Path | None = None,
        dtype: str | None = None,
        device: str | None = None,
        device_map: str | dict[str, Any] | None = None,
        cache_dir: Path | None = None,
        offline: bool = False,
        progress: Callable[[str, float | None], None] | None = None,
    ) -> TargetLLM:
        """Load a model by alias, folder or hub id.

        Weights are read in the checkpoint's own dtype, not in float32 first. A checkpoint that bitsandbytes, GPTQ or
        AWQ quantised is loaded as it is, onto the device, where the package that it needs is installed.

        Args:
            spec: For example `smollm2-135m-instruct`, `./my-model`, `org/name` or `org/name@<commit>`.
            reader: Folder of a reader adapter in PEFT's format, merged in fp32; None reads with the model as it is.
            dtype: `float32`, `bfloat16`, `float16`, or `auto` for the checkpoint's own; None picks float32 on a CPU and
                bfloat16 elsewhere.
            device: A torch device; None picks CUDA, then Apple's MPS, where there is one.
            device_map: As of transformers (`"auto"`, `{"": "cuda:1"}`), in place of `device`; all layers must come to
                lie on one device.
            cache_dir: Where fetched models lie; None means the user's cache directory.
            offline: Never touch the network.
            progress: Called with a message and a share from 0 to 1 (None: unknown) while fetching.

        Raises:
            UnsupportedDtypeError: The dtype is not one of these.
            UnsupportedModelError: The model cannot be used, or a package that its quantised weights need is missing.
            ConfigurationError: `device` and `device_map`, a device that is not there, or a reader and quantised
                weights.
            UnknownModelError, ModelFetchError, DigestMismatchError, UnsafeModelError: See `resolve_model`.
        """
        if device is not None and device_map is not None:
            raise ConfigurationError(
                "device and device_map exclude each other", got=f"{device} and {device_map}", expected="one of them"
            )
        begun = time.perf_counter()
        place = device or default_device()
        dtype = dtype or ("float32" if place == "cpu" and device_map is None else "bfloat16")
        check_dtype(dtype)
        if device is not None:
            check_device(device)
        files = resolve_model(str(spec), cache_dir=cache_dir, offline=offline, progress=progress)
        method = quantisation_of(files.path)
        if method and reader is not None:
            raise ConfigurationError(
                "a reader cannot be merged into quantised weights",
                got=f"{files.source}, quantised by {method}",
                expected="reader=None, or a checkpoint that is not quantised",
                next_step="merge first (`compllm-rag models export`), then quantise",
            )
        model, tokenizer = load_checkpoint(files.path, dtype, place, device_map)
        digests = dict(files.digests)
        if reader is not None:
            from compllm_rag.models.adapters import merge_adapter

            digests |= {f"reader/{name}": digest for name, digest in merge_adapter(model, reader).items()}
        model = placed(model, dtype, place if device_map is None else None)
        made = cls(model, tokenizer, source=files.source, digests=digests)
        made.reader = reader
        logger.info(
            "loaded LLM %s as %s on %s%s in %.1f s",
            made.source,
            dtype,
            device_map or place,
            "" if reader is None else ", a reader merged,",
            time.perf_counter() - begun,
        )
        return made

    @property
    def identity(self) -> str:
        """Digest of everything that decides what the model and its tokenizer do."""
        return mapping_digest("compllm-rag/target", self.digests)

    @property
    def hidden_size(self) -> int:
        """Width of the input-embedding space."""
        return int(self.embedding.weight.shape[1])

    @property
    def window(self) -> int:
        """Positions the model was made for."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    def depth(self) -> int:
        """How many layers it has."""
        return len(decoder_of(self.model).layers)

    @property
    def kv_bytes(self) -> int:
        """Bytes that one position takes in the KV cache of one layer, in the compute dtype."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * heads * width * self.dtype.itemsize)

    @property
    def embedding(self) -> Any:
        """The input-embedding module; called, never indexed, since some scale their rows (Gemma)."""
        return self.model.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        """Where the embeddings lie."""
        return torch.device(self.embedding.weight.device)

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        dtype: torch.dtype = self.embedding.weight.dtype
        return dtype

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Input embeddings of token ids as the first layer sees them (post-scale).

        Returns:
            Tensor (n_tokens, hidden_size) in the compute dtype.
        """
        ids = torch.tensor(list(token_ids), dtype=torch.long, device=self.device)
        with torch.inference_mode():
            embedded: torch.Tensor = self.embedding(ids[None])[0]
        return embedded

    def stop_ids(self) -> set[int]:
        """Tokens that end an answer: those of the tokenizer and of the model's generation settings."""
        found = {self.tokenizer.eos_token_id}
        for config in (self.model.config.get_text_config(), getattr(self.model, "generation_config", None)):
            value = getattr(config, "eos_token_id", None)
            found |= set(value) if isinstance(value, list | tuple) else {value}
        return {int(token) for token in found if token is not None}


def _check(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        trouble = "an encoder-decoder"
    elif "inputs_embeds" not in inspect.signature(model.forward).parameters:
        trouble = "a model whose forward takes no inputs_embeds"
    elif getattr(config, "hidden_size_per_layer_input", 0):
        trouble = "a model with per-layer embeddings, which need token ids at every layer"
    elif not all(hasattr(decoder_of(model), part) for part in ("layers", "norm")):
        trouble = f"a {type(model).__name__}, whose decoder has no plain list of layers and final norm"
    else:
        return
    raise UnsupportedModelError(
        "this LLM cannot read concepts",
        got=trouble,
        expected="a decoder LLM of transformers that takes inputs_embeds (Llama, Qwen, Gemma, Mistral and their like)",
        next_step="choose another target LLM",
    )


def decoder_of(model: Any) -> Any:
    """The bare decoder inside a causal LM: embeddings, layers and final norm, without the output head."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def _config_json(model: PreTrainedModel) -> str:
    """The settings that differ from the architecture's own, without those that change no result."""
    settings: dict[str, Any] = model.config.to_diff_dict()
    kept = {key: value for key, value in settings.items() if key not in _PROVENANCE}
    return json.dumps(kept, sort_keys=True, default=str)


def _tensor_digests(model: PreTrainedModel, tokenizer: Any) -> dict[str, str]:
    arrays = {name: tensor.detach().float().cpu().numpy() for name, tensor in model.state_dict().items()}
    vocabulary = {token: str(index) for token, index in tokenizer.get_vocab().items()}
    return {
        "tensors": tensor_digest(arrays),
        "config": tagged_digest("compllm-rag/config", config=_config_json(model)),
        "tokenizer": mapping_digest("compllm-rag/vocabulary", vocabulary),
    }

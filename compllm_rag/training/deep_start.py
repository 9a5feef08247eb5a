"""What a run of deep concepts starts from: the settings of a new compressor, or one to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.loading import with_unit_length
from compllm_rag.compression.pretrained import read_compressor
from compllm_rag.config import CompressorConfig
from compllm_rag.errors import ConfigurationError
from compllm_rag.models.adapters import load_lora_state, lora_state
from compllm_rag.models.llm import TargetLLM
from compllm_rag.training.job_options import DeepOptions

_NO_LORA: dict[str, Any] = {"rank": 0, "alpha": 0, "modules": ()}


def lora_settings(options: DeepOptions) -> dict[str, Any]:
    """Fields of `CompressorConfig` of what is trained.

    Raises:
        ConfigurationError: A LoRA for prompts is asked for where the LLM is to read concepts as it is.
    """
    if options.frozen_upper and options.prompt_rank:
        raise ConfigurationError(
            "the LLM cannot both read concepts as it is and learn to",
            got=f"frozen_upper, and a LoRA of rank {options.prompt_rank} for prompts",
            expected="one of them",
            next_step="leave --frozen-upper or --prompt-rank out",
        )

    def of(rank: int) -> dict[str, Any]:
        return {"rank": rank, "alpha": 2 * rank, "modules": options.lora_modules if rank else ()}

    alone = options.frozen_upper
    ranks = {"lora": options.lora_rank, "read": 0 if alone else options.lora_rank}
    if options.prompt_rank is not None or alone:
        ranks["prompt"] = 0 if alone else options.prompt_rank or 0
    fields = {f"{name}_{key}": value for name, rank in ranks.items() for key, value in of(rank).items()}
    return fields | ({} if options.marked is None else {"marked": options.marked})


def going_on_from(folder: Path, llm: TargetLLM, options: DeepOptions) -> DeepCompressor:
    """A saved compressor to go on training; with `options.frozen_upper` without the LoRA by which it is read.

    Raises:
        ConfigurationError: It is none of deep concepts, or of another entry layer or LoRA than `options` say.
        FingerprintMismatchError, UnsupportedFormatError: See `read_compressor`.
    """
    made = DeepCompressor.of(read_compressor(folder, llm, other_reader=options.other_reader))
    if options.frozen_upper and (made.config.read_rank or made.config.prompt_rank):
        made = _writing_alone(made)
    wanted = lora_settings(options)
    more: dict[str, Any] = {}
    if options.prompt_rank and not made.config.prompt_rank:
        more |= {name: value for name, value in wanted.items() if name.startswith("prompt_")}
    if options.marked and not made.config.marked:
        more["marked"] = True
    if more:
        made = _with_more(made, more)
    if options.entry_layer is not None:
        wanted["entry_layer"] = options.entry_layer
    for name, value in wanted.items():
        found = getattr(made.config, name)
        if (sorted(found) != sorted(value)) if isinstance(value, tuple) else (found != value):
            raise ConfigurationError(
                "compressor to go on from is of another kind",
                got=f"{name} {found} in {folder}",
                expected=f"{name} {value}",
                next_step="`train selector --entry-layer` moves it to another layer"
                if name == "entry_layer"
                else "give the settings it was made with, or choose another --from",
            )
    return (
        made if options.unit_length in (None, made.config.unit_length) else with_unit_length(made, options.unit_length)
    )


def _writing_alone(made: DeepCompressor) -> DeepCompressor:
    """The same compressor with its concepts read by the LLM as it is."""
    none = {f"{name}_{key}": value for name in ("read", "prompt") for key, value in _NO_LORA.items()}
    config = CompressorConfig.model_validate(made.config.model_dump() | none)
    alone = DeepCompressor(made.llm, config, information=made.information, selector=made.selector)
    load_lora_state(alone.decoder, lora_state(made.decoder))
    if alone.marker is not None and made.marker is not None:
        alone.marker.data.copy_(made.marker.data)
    return alone


def _with_more(made: DeepCompressor, fields: Mapping[str, Any]) -> DeepCompressor:
    """The same compressor with a LoRA for the prompt's own tokens, or a marker, neither of which has an effect yet."""
    config = CompressorConfig.model_validate(made.config.model_dump() | dict(fields))
    more = DeepCompressor(made.llm, config, information=made.information, selector=made.selector)
    for name, tree in more.trees.items():
        load_lora_state(tree, lora_state(tree) | lora_state(made.trees[name]))
    if more.marker is not None and made.marker is not None:
        more.marker.data.copy_(made.marker.data)
    return more

"""Compressors with random LoRA and head: what a trained one is to the code, without the training."""

from __future__ import annotations

from typing import Any

import torch

from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.loading import untrained_deep
from compllm_rag.compression.rate_policies.losses import RATES, LossPredictor
from compllm_rag.compression.rate_policies.measures import FEATURES
from compllm_rag.config import CompressorConfig
from compllm_rag.models.llm import TargetLLM

LORA: dict[str, Any] = {"lora_rank": 4, "lora_alpha": 8, "lora_modules": ("q_proj", "v_proj", "down_proj")}


def information(llm: TargetLLM, seed: int = 0) -> torch.Tensor:
    """A table (vocab_size,) without equals."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(llm.embedding.weight.shape[0], generator=generator).float() / 16


def trained(llm: TargetLLM, *, seed: int = 0, strength: float = 0.2, **config: Any) -> Compressor:
    """A compressor whose LoRA and head are random numbers that fp16 holds exactly."""
    made = Compressor(llm, CompressorConfig(**{**LORA, **config}), information=information(llm))
    randomise(made, seed=seed, strength=strength)
    return made


def randomise(compressor: Compressor, *, seed: int, strength: float = 0.2) -> None:
    """Set LoRA and head to random numbers that fp16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    learned = [p for name, p in compressor.decoder.named_parameters() if ".lora_" in name]
    with torch.no_grad():
        for parameter in (*learned, *compressor.head.parameters()):
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * strength).half())


DEEP: dict[str, Any] = {**LORA, "read_rank": 2, "read_alpha": 4, "read_modules": ("q_proj", "o_proj")}
PROMPT: dict[str, Any] = {"prompt_rank": 3, "prompt_alpha": 6, "prompt_modules": ("k_proj", "up_proj")}


def trained_deep(llm: TargetLLM, *, seed: int = 0, strength: float = 0.2, **config: Any) -> DeepCompressor:
    """A compressor of deep concepts whose LoRAs and marker are random numbers that fp16 holds exactly."""
    made = untrained_deep(llm, information=information(llm), **{**DEEP, **config})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tree in made.trees.values():
            for name, parameter in tree.named_parameters():
                if ".lora_" in name:
                    parameter.copy_((torch.randn(parameter.shape, generator=generator) * strength).half())
        if made.marker is not None:
            made.marker.copy_((torch.randn(made.marker.shape, generator=generator) * strength).half())
    return made


def rising_losses(compressor: DeepCompressor, *, gain: float | None = None) -> LossPredictor:
    """Losses of a compressor that rise with the rate alone."""
    width = len(FEATURES)
    return LossPredictor(
        mean=(0.0,) * width,
        scale=(1.0,) * width,
        weights=((0.0,) * width,) * len(RATES),
        offsets=tuple(0.05 * (rate - 1) for rate in RATES),
        units=10,
        compressor=compressor.fingerprint,
        gain=gain,
    )

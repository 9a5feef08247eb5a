"""Training a reader: a LoRA adapter that teaches a small instruct model to answer from passages.

Read as text, with cross-entropy on the answers alone; some of the examples are other prompts with the model's own
answers to them, so that it goes on following those.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from compllm_rag.models.adapters import inject_lora, load_lora_state, lora_state
from compllm_rag.models.llm import TargetLLM, decoder_of
from compllm_rag.prompt import TextSpan
from compllm_rag.training.examples import Branch, Example, pack, positions_of, targets_of, weight_of
from compllm_rag.training.job_options import LINEARS, ReaderOptions
from compllm_rag.training.material import Material
from compllm_rag.training.objective import Loss, answer_loss, last_hidden_state, nll_by_kind
from compllm_rag.training.run_config import Progress, RunConfig

_DEFAULT = ReaderOptions()


class _Trained(nn.Module):
    """The decoder, and the whole loss as its forward, as data-parallel runs need it."""

    def __init__(self, llm: TargetLLM) -> None:
        super().__init__()
        self.decoder = decoder_of(llm.model)
        self.__dict__["llm"] = llm

    def forward(self, items: Sequence[Example]) -> Loss:
        llm: TargetLLM = self.__dict__["llm"]
        targets = targets_of(items, prompt_weight=0.0, kind_weights={}, device=llm.device)
        hidden = last_hidden_state(llm, pack(items, llm))[targets.is_answer]  # (n_answer_tokens, hidden_size)
        loss = answer_loss(llm, hidden, targets.answers())
        value = float(loss.detach())
        return Loss(loss, {"ce": value, "loss": value})


class ReaderTask:
    """Trains a LoRA adapter on all linear layers of an LLM; the LLM is changed in place.

    Args:
        llm: The LLM as it is, without a reader.
        material: Examples.
        keep: Other prompts with answers, token ids of both; drawn with probability `keep_share`.
        rank: Of LoRA.
        keep_share: Share of examples that are other prompts.
        validation: Held-out groups of questions to look at.
    """

    name = "reader"

    def __init__(
        self,
        llm: TargetLLM,
        material: Material,
        *,
        keep: Sequence[tuple[tuple[int, ...], tuple[int, ...]]] = (),
        rank: int = _DEFAULT.rank,
        modules: tuple[str, ...] = LINEARS,
        keep_share: float = _DEFAULT.keep_share,
        validation: int = _DEFAULT.validation,
    ) -> None:
        self.llm, self.material, self.keep, self.rank, self.modules = llm, material, list(keep), rank, modules
        self.keep_share = keep_share
        decoder = decoder_of(llm.model)
        inject_lora(decoder, rank=rank, alpha=2 * rank, modules=modules)
        for name, parameter in decoder.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        self.module: nn.Module = _Trained(llm)
        self.validation = material.looked_at(validation)

    def load(self, settings: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
        """Start from an adapter of the same rank, settings and tensors as `read_adapter` gives them.

        It counts as much as where it is merged, whatever its alpha; that of the task stays 2 * rank.
        """
        prefix, times = decoder_prefix(self.llm), float(settings["lora_alpha"]) / (2 * self.rank)
        found = {k.removeprefix(prefix): v * times if ".lora_B." in k else v for k, v in state.items()}
        load_lora_state(decoder_of(self.llm.model), found)

    def parameter_groups(self, config: RunConfig) -> list[dict[str, Any]]:
        """LoRA alone."""
        return [{"params": [p for p in self.module.parameters() if p.requires_grad], "times": 1.0}]

    def draw(self, rng: random.Random) -> Example:
        """Questions over passages, or another prompt."""
        if self.keep and rng.random() < self.keep_share:
            prompt, answer = rng.choice(self.keep)
            return Example((TextSpan(prompt),), (Branch((), answer, "keep"),))
        return self.material.draw(rng)

    def size(self, item: Example) -> int:
        """Positions."""
        return positions_of(item)

    def weight(self, item: Example) -> float:
        """Its branches."""
        return weight_of(item, {})

    def alike(self, item: Example) -> bool:
        """All examples may share a forward."""
        return True

    def loss(self, module: nn.Module, items: Sequence[Example]) -> Loss:
        """Loss of one forward."""
        loss: Loss = module(items)
        return loss

    @torch.no_grad()
    def validate(self, progress: Progress) -> dict[str, float]:
        """Negative log-likelihood of held-out gold answers, nats per token."""
        total, tokens = 0.0, 0
        for begin in range(0, len(self.validation), 4):
            some = self.validation[begin : begin + 4]
            targets = targets_of(some, prompt_weight=0.0, kind_weights={}, device=self.llm.device)
            found = nll_by_kind(self.llm, last_hidden_state(self.llm, pack(some, self.llm)), targets)["qa"]
            total, tokens = total + found[0], tokens + found[1]
        nll = total / max(1, tokens)
        return {"nll_text": nll, "score": -nll}

    def export(self, folder: Path) -> None:
        """Write the adapter in PEFT's format, fp16."""
        save_reader(self.llm, folder, rank=self.rank, modules=self.modules)


def decoder_prefix(llm: TargetLLM) -> str:
    """What PEFT puts in front of the names of the decoder's tensors."""
    decoder = decoder_of(llm.model)
    [path] = [name for name, module in llm.model.named_modules() if module is decoder]
    return f"base_model.model.{path}." if path else "base_model.model."


def save_reader(llm: TargetLLM, folder: Path, *, rank: int, modules: tuple[str, ...]) -> None:
    """Write the live LoRA of an LLM as an adapter that PEFT, and `TargetLLM.from_pretrained`, read."""
    state = {decoder_prefix(llm) + name: tensor for name, tensor in lora_state(decoder_of(llm.model)).items()}
    write_adapter(folder, state, source=llm.source, rank=rank, alpha=2 * rank, modules=modules)


def write_adapter(
    folder: Path, state: dict[str, torch.Tensor], *, source: str, rank: int, alpha: int, modules: tuple[str, ...]
) -> None:
    """Write LoRA tensors in PEFT's format, fp16; a reader of the folder sees each file whole."""
    tensors = {name: tensor.half().cpu().contiguous() for name, tensor in state.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(modules),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        weights, settings = Path(scratch) / "adapter_model.safetensors", Path(scratch) / "adapter_config.json"
        save_file(tensors, weights)
        settings.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        os.replace(weights, folder / weights.name)
        os.replace(settings, folder / settings.name)

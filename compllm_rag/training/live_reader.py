"""A reader that learns to read concepts while the compressor learns to write them.

A small LLM that has only ever seen tokens reads concepts badly, and a compressor can bend its concepts only so far
towards what it reads well. So the LLM may meet it halfway: a further LoRA on the target is trained together with the
compressor, on concepts and on text, with the LLM as it was (reading text) as the teacher of both. Afterwards it is
joined with the former reader into one adapter, and the target is frozen as ever; text is read by the same reader.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.pretrained import save_compressor
from compllm_rag.models.adapters import adapter_digests, inject_lora, lora_state, read_adapter
from compllm_rag.models.llm import TargetLLM, decoder_of
from compllm_rag.training.job_options import LINEARS
from compllm_rag.training.reader_task import decoder_prefix, write_adapter

_NAME = "live"


class LiveReader:
    """A LoRA on the target itself, for as long as training goes on.

    It must be there before the compressor is made, whose tree then shares it.

    Args:
        llm: The target, with its former reader merged.
        rank: Of LoRA.
        former: Folder of the reader that is merged, None if there is none.
        modules: Names of the linear layers it changes.
    """

    def __init__(
        self, llm: TargetLLM, rank: int, former: Path | None = None, modules: tuple[str, ...] = LINEARS
    ) -> None:
        self.llm, self.rank, self.former, self.modules = llm, rank, former, modules
        self.digests = dict(llm.digests)
        inject_lora(decoder_of(llm.model), rank=rank, alpha=2 * rank, modules=modules, name=_NAME)

    @property
    def decoder(self) -> Any:
        """The target's decoder, which the LoRA is part of."""
        return decoder_of(self.llm.model)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for name, p in self.decoder.named_parameters() if f".{_NAME}." in name]

    def join(self, compressor: Compressor) -> None:
        """Let the compressor's tree use both LoRAs: its own, and the one it shares with the target."""
        for layer in _tuned(compressor.decoder):
            layer.set_adapter([name for name in (_NAME, "default") if name in layer.lora_A])

    @contextmanager
    def off(self) -> Iterator[None]:
        """The target as it was before; the compressor's own tree is not touched."""
        layers = list(_tuned(self.decoder))
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def export(self, folder: Path, compressor: Compressor) -> None:
        """Write `reader/`, the former reader and this one in one adapter, and the compressor that belongs to it.

        Two adapters of ranks r and s add up to one of rank r + s: their factors side by side, each with its own scale
        taken into B.
        """
        state = {
            decoder_prefix(self.llm) + name: t.float().cpu() for name, t in lora_state(self.decoder, _NAME).items()
        }
        state = {name: 2.0 * t if ".lora_B." in name else t for name, t in state.items()}
        if self.former is not None:
            config, other = read_adapter(self.former)
            factor = float(config["lora_alpha"]) / int(config["r"])
            for name, tensor in other.items():
                scaled = tensor.float() * (factor if ".lora_B." in name else 1.0)
                state[name] = torch.cat([scaled, state[name]], dim=1 if ".lora_B." in name else 0)
        rank = next(iter(t.shape[0] for name, t in state.items() if ".lora_A." in name))
        write_adapter(folder / "reader", state, source=self.llm.source, rank=rank, alpha=rank, modules=self.modules)
        kept = {name: d for name, d in self.digests.items() if not name.startswith("reader/")}
        before = self.llm.digests
        self.llm.digests = kept | adapter_digests(folder / "reader")
        try:
            save_compressor(compressor, folder)
        finally:
            self.llm.digests = before
            compressor.refresh_fingerprint()


def _tuned(decoder: Any) -> Iterator[Any]:
    from peft.tuners.lora import LoraLayer

    return (module for module in decoder.modules() if isinstance(module, LoraLayer))

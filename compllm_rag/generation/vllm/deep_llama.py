"""Llama in vLLM with a second entry: rows of a prompt that carry a hidden state for the entry layer.

Loaded by vLLM alone, by `plugin`. A checkpoint for it (`deep_checkpoint`) says the width of a row as its hidden size,
so that all of vLLM's buffers and checks have room for it, and what the LLM's own is beside that. A row (see
`deep_rows`) holds the embedding of a token, a state, and how many states there are, none or one. All rows run through
the layers below the entry layer as tokens do; in front of it a row's state takes the place of what came out.

vLLM carries the residual stream as a sum of two, and Qwen3-VL adds its further levels to one of them behind a layer;
here both are replaced.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from vllm.compilation.decorators import support_torch_compile
from vllm.distributed import get_pp_group
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0})
class DeepLlamaModel(LlamaModel):  # type: ignore[misc]  # vLLM lies in an environment of its own
    """The decoder, over rows in place of embeddings."""

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Tokens as rows without a state, (n, width of a row)."""
        embeddings: torch.Tensor = self.embed_tokens(input_ids)  # (n, hidden_size)
        return torch.nn.functional.pad(embeddings, (0, self.config.compllm_row_width - embeddings.shape[-1]))

    def forward(
        self,
        input_ids: Any,
        positions: torch.Tensor,
        intermediate_tensors: Any,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run all layers; hidden states (n, hidden_size) after the final norm."""
        rows = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        width, entry_layer = self.config.hidden_size, self.config.compllm_entry_layer
        hidden, states, has_state = rows[:, :width], rows[:, width : 2 * width], rows[:, 2 * width :][:, :1] > 0.5
        residual = None
        for number, layer in enumerate(self.layers):
            if number == entry_layer:
                stream = hidden if residual is None else hidden + residual
                hidden, residual = torch.where(has_state, states, stream), None
            hidden, residual = layer(positions, hidden, residual)
        normed: torch.Tensor = self.norm(hidden, residual)[0]
        return normed


class DeepLlamaForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """The LLM."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", layer_type: type = LlamaDecoderLayer) -> None:
        if get_pp_group().world_size > 1:
            raise ValueError("deep concepts want all layers in one place: start vLLM without pipeline parallelism")
        config = copy.deepcopy(vllm_config.model_config.hf_config)
        config.compllm_row_width, config.hidden_size = config.hidden_size, config.compllm_hidden_size
        inner = vllm_config.with_hf_config(config, architectures=["LlamaForCausalLM"])
        super().__init__(vllm_config=inner, prefix=prefix, layer_type=layer_type)

    def _init_model(self, vllm_config: Any, prefix: str = "", layer_type: type = LlamaDecoderLayer) -> DeepLlamaModel:
        return DeepLlamaModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

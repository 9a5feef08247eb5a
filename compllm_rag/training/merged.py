"""Llama's layers with LoRA merged into their weights at every step: for a GPU, which waits for whoever calls it.

A live LoRA layer is several small products and casts beside each large one, all of which somebody has to start. Here
each step begins with one product for all layers of a kind, W + B A, in the dtype that is computed in; a forward runs
over these weights alone, and what their gradients say of A and B is again one product for each kind. It costs the
gradient of whole weights, half as much again as a backward pass without it.

The weights that come out are those of `DeepTask` and `ReaderTask`; the tests compare losses and gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from compllm_rag.errors import UnsupportedModelError
from compllm_rag.models.llm import TargetLLM, decoder_of

# What is multiplied by the same input is one matrix: kind of matrix, and the linear layers stacked in it.
_KINDS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_FACTOR = 2.0  # of every LoRA here: its alpha is twice its rank

Tensors = Mapping[str, torch.Tensor]


class Weights:
    """An LLM's weights in float32, stacked by kind: (layers, out_features, in_features).

    Args:
        llm: Of Llama's architecture, reader merged or not, in float32.
        device: Where they go.

    Raises:
        UnsupportedModelError: It is of another architecture, has biases or rotary positions of another kind.
    """

    def __init__(self, llm: TargetLLM, device: torch.device) -> None:
        config, decoder = llm.model.config, decoder_of(llm.model)
        rope = getattr(config, "rope_parameters", None) or {}
        odd = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
        odd += [f"rope type {rope['rope_type']}"] if rope.get("rope_type", "default") != "default" else []
        if config.model_type != "llama" or config.hidden_act != "silu" or odd:
            raise UnsupportedModelError(
                "this LLM cannot be trained with merged LoRA",
                got=f"{type(llm.model).__name__}{' with ' + ', '.join(odd) if odd else ''}",
                expected="Llama's architecture without biases",
                next_step="use `compllm-rag train`",
            )
        self.heads, self.kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.head = int(getattr(config, "head_dim", None) or config.hidden_size // self.heads)
        self.hidden, self.eps, self.device = int(config.hidden_size), float(config.rms_norm_eps), device
        self.layers = len(decoder.layers)

        def stacked(names: tuple[str, ...]) -> torch.Tensor:
            each = [torch.cat([layer.get_submodule(n).weight.detach() for n in names]) for layer in decoder.layers]
            return torch.stack(each).float().to(device)

        self.of = {kind: stacked(names) for kind, names in _KINDS.items()}
        sizes = {name: decoder.layers[0].get_submodule(name).weight.shape[0] for n in _KINDS.values() for name in n}
        self.rows: dict[str, tuple[str, slice]] = {}  # of each linear layer: its kind, and its rows there
        for kind, names in _KINDS.items():
            begin = 0
            for name in names:
                self.rows[name] = (kind, slice(begin, begin + sizes[name]))
                begin += sizes[name]
        self.norms = torch.stack(
            [torch.stack([x.input_layernorm.weight, x.post_attention_layernorm.weight]) for x in decoder.layers]
        ).detach()  # (layers, 2, hidden_size)
        self.norms = self.norms.float().to(device)
        self.last_norm = decoder.norm.weight.detach().float().to(device)
        self.embedding = llm.embedding.weight.detach().float().to(device)
        self.output = llm.model.get_output_embeddings().weight.detach().float().to(device)
        self.frequencies = decoder.rotary_emb.inv_freq.detach().float().to(device)

    def rotary(self, places: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, (batch, 1, n, head_dim), of positions (batch, n)."""
        angles = places[..., None].float() * self.frequencies  # (batch, n, head_dim / 2)
        angles = torch.cat((angles, angles), -1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)


class Tree:
    """Some layers of an LLM, with a LoRA that is trained or without.

    Args:
        weights: The LLM's.
        first: The first layer.
        last: The one behind the last.
        dtype: Computed in.
        rank: Of LoRA on all linear layers; 0: none.
    """

    def __init__(self, weights: Weights, first: int, last: int, dtype: torch.dtype, rank: int = 0) -> None:
        self.weights, self.first, self.last, self.dtype, self.rank = weights, first, last, dtype, rank
        self.norms = weights.norms[first:last].to(dtype)
        self._merged = {kind: whole[first:last].to(dtype).clone() for kind, whole in weights.of.items()}
        self.a: dict[str, torch.Tensor] = {}  # of each linear layer (layers, rank, in_features)
        self.b: dict[str, torch.Tensor] = {}  # (layers, out_features, rank)
        self._gradients: dict[str, torch.Tensor] = {}
        self._leaves: dict[str, list[torch.Tensor]] = {}
        if not rank:
            return
        for name, (kind, rows) in weights.rows.items():
            shape = (last - first, rank, weights.of[kind].shape[2])
            self.a[name] = torch.empty(shape, device=weights.device)
            nn.init.kaiming_uniform_(self.a[name].view(-1, shape[2]), a=math.sqrt(5))
            self.b[name] = torch.zeros(last - first, rows.stop - rows.start, rank, device=weights.device)
        for kind, whole in self._merged.items():
            self._gradients[kind] = torch.zeros_like(whole)
            self._leaves[kind] = [each.detach().requires_grad_(True) for each in whole]
            for leaf, gradient in zip(self._leaves[kind], self._gradients[kind], strict=True):
                leaf.grad = gradient

    @property
    def parameters(self) -> list[torch.Tensor]:
        """A and B of every linear layer, stacked over layers."""
        return [*self.a.values(), *self.b.values()]

    def load(self, state: Tensors, times: float = 1.0) -> None:
        """Take LoRA tensors as PEFT names them, `...layers.I.NAME.lora_A.weight`, I counted in these layers.

        Args:
            state: All of them.
            times: Factor of B, where the alpha they were saved with is not twice the rank.
        """
        found = {name[name.index("layers.") :]: tensor.float() for name, tensor in state.items()}
        for name in self.a:
            for layer in range(self.last - self.first):
                self.a[name][layer] = found[f"layers.{layer}.{name}.lora_A.weight"]
                self.b[name][layer] = found[f"layers.{layer}.{name}.lora_B.weight"] * times
        self.merge()

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors as PEFT names them, `layers.I.NAME.lora_A.weight`, on the CPU."""
        return {
            f"layers.{layer}.{name}.lora_{side}.weight": each.detach().cpu().clone()
            for side, tensors in (("A", self.a), ("B", self.b))
            for name, stacked in tensors.items()
            for layer, each in enumerate(stacked)
        }

    @torch.no_grad()
    def merge(self) -> None:
        """Begin a step: weights by the LoRA of now, and no gradients."""
        for name, (kind, rows) in self.weights.rows.items():
            if self.rank:
                whole = self.weights.of[kind][self.first : self.last, rows]  # (layers, out_features, in_features)
                self._merged[kind][:, rows] = (whole + _FACTOR * self.b[name] @ self.a[name]).to(self.dtype)
        for gradient in self._gradients.values():
            gradient.zero_()

    @torch.no_grad()
    def unmerge_gradients(self) -> None:
        """End a step's backward passes: what the weights' gradients say of A and B."""
        for name, (kind, rows) in self.weights.rows.items():
            if self.rank:
                whole = self._gradients[kind][:, rows].float()  # (layers, out_features, in_features)
                self.a[name].grad = _FACTOR * self.b[name].transpose(1, 2) @ whole
                self.b[name].grad = _FACTOR * whole @ self.a[name].transpose(1, 2)

    def run(self, hidden: torch.Tensor, places: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """All layers.

        Args:
            hidden: (batch, n, hidden_size).
            places: (batch, n), positions.
            mask: (batch, 1, n, n), True where a row sees a column; None: each slot all before it.
        """
        rotary = self.weights.rotary(places, self.dtype)
        source: Mapping[str, Any] = self._leaves or self._merged
        for layer in range(self.last - self.first):
            own = {kind: each[layer] for kind, each in source.items()}
            hidden = self._layer(hidden, own, self.norms[layer], rotary, mask)
        return hidden

    def _layer(
        self,
        hidden: torch.Tensor,
        own: Tensors,
        norms: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        sizes, (batch, n, width) = self.weights, hidden.shape
        heads, kv, head = sizes.heads, sizes.kv_heads, sizes.head
        joint = F.linear(F.rms_norm(hidden, (width,), norms[0], sizes.eps), own["qkv"])
        parts = torch.split(joint, [heads * head, kv * head, kv * head], -1)
        # (batch, heads or kv_heads, n, head_dim) each
        query, key, value = (part.view(batch, n, -1, head).transpose(1, 2) for part in parts)
        query, key = _rotated(query, *rotary), _rotated(key, *rotary)
        key, value = (
            x[:, :, None].expand(batch, kv, heads // kv, n, head).reshape(batch, heads, n, head) for x in (key, value)
        )
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        hidden = hidden + F.linear(read.transpose(1, 2).reshape(batch, n, heads * head), own["o"])
        gate, up = F.linear(F.rms_norm(hidden, (width,), norms[1], sizes.eps), own["gate_up"]).chunk(2, -1)
        return hidden + F.linear(F.silu(gate) * up, own["down"])


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def branch_mask(owner: torch.Tensor) -> torch.Tensor:
    """Who sees whom, (batch, 1, n, n), of whose each slot is, (batch, n); see `examples.Packed`."""
    slots = torch.arange(owner.shape[1], device=owner.device)
    mine, theirs = owner[:, :, None], owner[:, None]  # (batch, n, 1) and (batch, 1, n)
    seen = (slots[:, None] >= slots) & ((theirs == 0) | (theirs == mine)) & (theirs >= 0)  # (batch, n, n)
    return (seen | torch.eye(len(slots), dtype=torch.bool, device=owner.device))[:, None]


class Reading:
    """An LLM that reads text, in the dtype of a tree."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self.weights, self.dtype = weights, dtype
        self.embedding, self.output = weights.embedding.to(dtype), weights.output.to(dtype)
        self.last_norm = weights.last_norm.to(dtype)

    def text(self, tree: Tree, batch: Tensors, prefix: str = "") -> torch.Tensor:
        """Log-probabilities (n_predictions, vocab_size) of `laid_out.text_rows`, their names behind `prefix`."""
        hidden = F.embedding(batch[prefix + "ids"], self.embedding)
        hidden = tree.run(hidden, batch[prefix + "places"], branch_mask(batch[prefix + "owner"]))
        return self.predicted(hidden, batch[prefix + "at"])

    def predicted(self, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (n_predictions, vocab_size) by some slots of (batch, n, hidden_size)."""
        picked = hidden.flatten(0, 1).index_select(0, at)
        normed = F.rms_norm(picked, (hidden.shape[-1],), self.last_norm, self.weights.eps)
        return F.linear(normed, self.output).float().log_softmax(-1)


class DeepReading(Reading):
    """The same, and as it writes and reads deep concepts; the teacher reads text.

    Args:
        weights: The LLM's, reader merged.
        dtype: Computed in.
        entry_layer: L.
        rank: Of the LoRAs that write and read.
        prompt_rank: Of that of the prompt's own tokens; 0: none.
        marked: Whether a vector marks the tokens that are kept.
    """

    def __init__(
        self, weights: Weights, dtype: torch.dtype, entry_layer: int, rank: int, prompt_rank: int, marked: bool
    ) -> None:
        super().__init__(weights, dtype)
        self.teacher = Tree(weights, 0, weights.layers, dtype)
        # By the names of `DeepCompressor.trees`.
        self.trees = {
            "lora": Tree(weights, 0, entry_layer, dtype, rank),
            "read": Tree(weights, entry_layer, weights.layers, dtype, rank),
            "prompt": Tree(weights, 0, entry_layer, dtype, prompt_rank),
        }
        self.marker = torch.zeros(weights.hidden, device=weights.device, requires_grad=marked)

    def concepts(self, batch: Tensors) -> torch.Tensor:
        """Log-probabilities (n_predictions, vocab_size) of `laid_out.deep_rows`, read with concepts."""
        units = F.embedding(batch["unit_ids"], self.embedding)  # (units, u, hidden_size)
        units = units + batch["unit_marks"][..., None].to(self.dtype) * self.marker.to(self.dtype)
        places = torch.arange(units.shape[1], device=units.device)[None]
        units = self.trees["lora"].run(units, places, None)
        low = F.embedding(batch["low_ids"], self.embedding)  # (batch, l, hidden_size)
        low = self.trees["prompt"].run(low, batch["low_places"], branch_mask(batch["low_owner"]))
        both = torch.cat((low.flatten(0, 1), units.flatten(0, 1), units.new_zeros(1, units.shape[-1])))
        joined = both.index_select(0, batch["joined"].flatten()).view(*batch["joined"].shape, -1)
        hidden = self.trees["read"].run(joined, batch["places"], branch_mask(batch["owner"]))
        return self.predicted(hidden, batch["at"])

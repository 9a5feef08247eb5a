"""The compressor's head as it is trained: over standardised hidden states.

Hidden states of a decoder are lopsided. Of SmolLM2 behind layer 12, after RMS normalisation, two of 576 dimensions
have a root mean square of about 12 and the median one of 0.4, and more than half of the energy is one constant vector.
A linear layer on top of that learns the constants first: a step that is small for them is far too small for all the
rest. So the head is trained on `(x - mean) / std`, and folded into the plain linear layer that ships:
`W' = W / std`, `b' = b - W' mean`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from compllm_rag.compression.compressor import Compressor


class StandardisedHead(nn.Linear):
    """A linear layer over standardised inputs; as a function the same as the layer it was made from.

    Args:
        head: The plain layer.
        mean: Of its inputs, (hidden_size,).
        std: Of its inputs, (hidden_size,).
    """

    def __init__(self, head: nn.Linear, mean: torch.Tensor, std: torch.Tensor) -> None:
        super().__init__(head.in_features, head.out_features, device=head.weight.device, dtype=torch.float32)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        with torch.no_grad():
            self.weight.copy_(head.weight * std)
            self.bias.copy_(head.bias + head.weight @ mean)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """What the plain layer would give."""
        return F.linear((input - self.get_buffer("mean")) / self.get_buffer("std"), self.weight, self.bias)

    def folded(self) -> nn.Linear:
        """The plain layer."""
        plain = nn.Linear(self.in_features, self.out_features, device=self.weight.device, dtype=torch.float32)
        with torch.no_grad():
            plain.weight.copy_(self.weight / self.get_buffer("std"))
            plain.bias.copy_(self.bias - plain.weight @ self.get_buffer("mean"))
        return plain.requires_grad_(False)


@torch.no_grad()
def standardise(compressor: Compressor, segments: Sequence[tuple[int, ...]], ks: Sequence[int]) -> None:
    """Train the compressor's head over standardised inputs, as these segments give them.

    Args:
        compressor: Its head is replaced.
        segments: A few hundred, of the training data.
        ks: K of each.
    """
    seen: list[torch.Tensor] = []
    hook = compressor.head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    rows = []
    try:
        for begin in range(0, len(segments), 64):
            some = ks[begin : begin + 64]
            compressor.concepts_with_grad(segments[begin : begin + 64], some)
            rows += [state[:k] for state, k in zip(seen.pop(), some, strict=True)]
    finally:
        hook.remove()
    states = torch.cat(rows)
    # A dimension that hardly moves must not be blown up: at least a tenth of the median.
    std = states.std(0)
    compressor.head = StandardisedHead(compressor.head, states.mean(0), std.clamp_min(0.1 * float(std.median())))


@contextmanager
def plain_head(compressor: Compressor) -> Iterator[None]:
    """The compressor with the head that ships, for as long as it is saved."""
    head: Any = compressor.head
    if isinstance(head, StandardisedHead):
        compressor.head = head.folded()
    try:
        yield
    finally:
        compressor.head = head

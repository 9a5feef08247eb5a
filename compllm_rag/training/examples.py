"""What one training example is: passages in front, and several things to say about them behind.

A SQuAD paragraph has about five questions. Laid out one by one, the paragraph would be compressed, and read, five
times for five short answers; here it stands once, and each question with its answer is a *branch* that sees the
passages and itself, not the other branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import ConceptSpan, Span, TextSpan, embed_spans

BranchKind = Literal["qa", "copy", "continue", "keep"]


@dataclass(frozen=True)
class Body:
    """A passage's token ids, cut into segments; a batch reads it as text or as the concepts made of them."""

    segments: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return sum(map(len, self.segments))

    @property
    def ids(self) -> tuple[int, ...]:
        """All token ids."""
        return tuple(token for segment in self.segments for token in segment)


@dataclass(frozen=True)
class Branch:
    """One continuation of the prefix: what is asked, and what is to be said.

    Attributes:
        prompt: Token ids that are read; may be empty.
        target: Token ids that are learned; never empty.
        kind: What it exercises.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    kind: BranchKind = "qa"


@dataclass(frozen=True)
class Example:
    """A prefix of text and passages, and the branches behind it; the prefix is never empty."""

    prefix: tuple[TextSpan | Body, ...]
    branches: tuple[Branch, ...]

    @property
    def bodies(self) -> list[Body]:
        """The passages, in order."""
        return [part for part in self.prefix if isinstance(part, Body)]

    @property
    def source_tokens(self) -> int:
        """Tokens of the passages."""
        return sum(map(len, self.bodies))

    def spans(self, concepts: Sequence[torch.Tensor] | None = None) -> list[Span]:
        """Spans of the prefix.

        Args:
            concepts: (n_concepts, hidden_size) of each passage; None reads them as text.
        """
        out: list[Span] = []
        passage = 0
        for part in self.prefix:
            if isinstance(part, TextSpan):
                out.append(part)
                continue
            out.append(TextSpan(part.ids, passage) if concepts is None else ConceptSpan(concepts[passage], passage))
            passage += 1
        return out


@dataclass(frozen=True)
class Packed:
    """A batch of examples as the LLM reads them, padded on the right.

    Attributes:
        inputs_embeds: (batch, seq_len, hidden_size).
        attention_mask: Boolean (batch, 1, seq_len, seq_len), or by layer type where the LLM has several.
        position_ids: (batch, seq_len); every branch goes on where the prefix ends.
        rows: (n,) batch index of each learned prediction.
        columns: (n,) position that makes it: the one before the token.
    """

    inputs_embeds: torch.Tensor
    attention_mask: Any
    position_ids: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


@dataclass(frozen=True)
class Targets:
    """What is to be predicted at each (row, column), the same for text and for concepts.

    Attributes:
        ids: (n,) token ids.
        weights: (n,) such that a branch's answer sums to the branch's share of the batch, and its prompt to
            `prompt_weight` of that.
        is_answer: (n,) False where the token belongs to a branch's prompt: read, and matched, but not learned.
        kinds: Of each branch, with the slice of its answer's predictions.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    is_answer: torch.Tensor
    kinds: list[tuple[str, slice]]


def targets_of(
    examples: Sequence[Example], *, prompt_weight: float, kind_weights: dict[str, float], device: torch.device
) -> Targets:
    """Targets of a batch in the order in which `pack` gives rows and columns."""
    ids: list[int] = []
    weights: list[float] = []
    answers: list[bool] = []
    kinds: list[tuple[str, slice]] = []
    for example in examples:
        for branch in example.branches:
            asked = branch.prompt[1:]
            ids += [*asked, *branch.target]
            share = kind_weights.get(branch.kind, 1.0)
            weights += [prompt_weight * share / max(1, len(asked))] * len(asked)
            kinds.append((branch.kind, slice(len(weights), len(weights) + len(branch.target))))
            weights += [share / len(branch.target)] * len(branch.target)
            answers += [False] * len(asked) + [True] * len(branch.target)
    total = sum(weight_of(example, kind_weights) for example in examples)
    return Targets(
        torch.tensor(ids, device=device),
        torch.tensor(weights, device=device) / max(total, 1e-12),
        torch.tensor(answers, device=device),
        kinds,
    )


def weight_of(example: Example, kind_weights: dict[str, float]) -> float:
    """How much of a batch an example is: the sum of its branches' shares."""
    return sum(kind_weights.get(branch.kind, 1.0) for branch in example.branches)


def pack(
    examples: Sequence[Example],
    llm: TargetLLM,
    concepts: Sequence[Sequence[torch.Tensor]] | None = None,
    embed: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Packed:
    """Lay examples out for one forward.

    Args:
        examples: At least one.
        llm: Whose embeddings stand for tokens.
        concepts: For each example, concepts (n_concepts, hidden_size) of each of its passages; None reads them as text.
        embed: Embedding module, where another tree than the LLM's own is trained.

    Returns:
        The batch; gradients flow into `concepts`.
    """
    embed = embed or llm.embedding
    sequences, positions, groups, rows, columns = [], [], [], [], []
    for row, example in enumerate(examples):
        spans = example.spans(None if concepts is None else concepts[row])
        length = sum(map(len, spans))
        places, owner = list(range(length)), [0] * length
        for number, branch in enumerate(example.branches, 1):
            tokens = (*branch.prompt, *branch.target)
            # The first prediction is made by the prefix if the branch has no prompt, else by its own first token.
            begin = len(places)
            made_by = [*([length - 1] if not branch.prompt else []), *range(begin, begin + len(tokens) - 1)]
            rows += [row] * len(made_by)
            columns += made_by
            spans.append(TextSpan(tokens))
            places += range(length, length + len(tokens))
            owner += [number] * len(tokens)
        sequences.append(embed_spans(spans, embed, llm.device))  # (seq_len, hidden_size)
        positions.append(places)
        groups.append(owner)
    longest = max(map(len, positions))
    device = llm.device
    # Both (batch, longest): whose each position is (0: the prefix, -1: padding), and where it stands in its prompt.
    group = torch.tensor([g + [-1] * (longest - len(g)) for g in groups], device=device)
    place = torch.tensor([p + [0] * (longest - len(p)) for p in positions], device=device)
    embeds = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)  # (batch, longest, hidden_size)
    return Packed(
        embeds,
        _masks(llm, group, place),
        place,
        torch.tensor(rows, device=device),  # (n,)
        torch.tensor(columns, device=device),  # (n,)
    )


def _masks(llm: TargetLLM, group: torch.Tensor, place: torch.Tensor) -> Any:
    """Who sees whom: the prefix, and what is earlier in its branch; padding sees itself, so that nothing is NaN.

    Args:
        llm: Says which kinds of layer there are.
        group: (batch, seq_len), whose each position is.
        place: (batch, seq_len), where it stands in its prompt.

    Returns:
        Boolean (batch, 1, seq_len, seq_len), or by layer type.
    """
    n = group.shape[1]
    slots = torch.arange(n, device=group.device)  # (n,)
    mine, theirs = group[:, :, None], group[:, None, :]  # (batch, n, 1) and (batch, 1, n)
    # (batch, n, n): row sees column
    full = (slots[None, :, None] >= slots[None, None, :]) & ((theirs == 0) | (theirs == mine)) & (theirs >= 0)
    itself = torch.eye(n, dtype=torch.bool, device=group.device)  # (n, n)
    full = (full | itself)[:, None]  # (batch, 1, n, n)
    config = llm.model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not window or (kinds and kinds == {"full_attention"}) or getattr(config, "use_sliding_window", True) is False:
        # Qwen3 asks for masks by layer type even where no layer slides.
        return {"full_attention": full} if kinds else full
    near = (place[:, :, None] - place[:, None, :] < window)[:, None]  # (batch, 1, n, n)
    sliding = full & (near | itself)  # (batch, 1, n, n)
    return {"full_attention": full, "sliding_attention": sliding} if kinds else sliding


def positions_of(example: Example) -> int:
    """Positions of an example read as text."""
    fixed = sum(len(part) for part in example.prefix)
    return fixed + sum(len(branch.prompt) + len(branch.target) for branch in example.branches)

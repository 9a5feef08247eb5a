"""What one training example is: passages in front, and several things to say about them behind.

A SQuAD paragraph has about five questions. Laid out one by one, the paragraph would be compressed, and read, five
times for five short answers; here it stands once, and each question with its answer is a *branch* that sees the
passages and itself, not the other branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from compllm_rag.models.halves import Halves
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import ConceptSpan, Span, TextSpan, embed_spans

BranchKind = Literal["qa", "copy", "continue", "keep"]


@dataclass(frozen=True)
class Body:
    """A passage's token ids, cut into segments; a batch reads it as text or as the concepts made of them.

    For deep concepts these are units, chunks of text.
    """

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

    def spans(self, concepts: Sequence[torch.Tensor | ConceptSpan] | None = None) -> list[Span]:
        """Spans of the prefix.

        Args:
            concepts: (n_concepts, hidden_size) of each passage, or its span of deep ones; None reads them as text.
        """
        out: list[Span] = []
        passage = 0
        for part in self.prefix:
            if isinstance(part, TextSpan):
                out.append(part)
                continue
            given = TextSpan(part.ids, passage) if concepts is None else concepts[passage]
            out.append(ConceptSpan(given, passage) if isinstance(given, torch.Tensor) else given)
            passage += 1
        return out


@dataclass(frozen=True)
class Packed:
    """A batch of examples as the LLM reads them, padded on the right.

    Attributes:
        inputs_embeds: (batch, seq_len, hidden_size); with deep concepts, the residual stream in front of their entry
            layer.
        attention_mask: (batch, 1, seq_len, seq_len), boolean or to be added to the scores, as the LLM's attention takes
            it; or by layer type where the LLM has several.
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

    def answers(self) -> Targets:
        """Those of the answers alone: most predictions are of questions, and the LM head is dear."""
        kinds, at = list[tuple[str, slice]](), 0
        for kind, where in self.kinds:
            kinds.append((kind, slice(at, at + where.stop - where.start)))
            at = kinds[-1][1].stop
        mine = self.is_answer
        return Targets(self.ids[mine], self.weights[mine], mine[mine], kinds)


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


@dataclass(frozen=True)
class Row:
    """One example slot by slot: its prefix, then its branches.

    Attributes:
        spans: What stands there.
        order: Of each slot: how many slots stand in front of it in its own prompt.
        places: Of each slot: its position; more than its order behind tokens that were not kept.
        owner: Of each slot: the number of its branch, 0 for the prefix.
        columns: Slots that make a prediction.
    """

    spans: list[Span]
    order: list[int]
    places: list[int]
    owner: list[int]
    columns: list[int]

    @property
    def tokens(self) -> list[bool]:
        """Of each slot: whether a token stands there, not a concept."""
        return [isinstance(span, TextSpan) for span in self.spans for _ in range(len(span))]


def row_of(example: Example, concepts: Sequence[torch.Tensor | ConceptSpan] | None) -> Row:
    """An example slot by slot; see `Example.spans`."""
    spans, places, end = example.spans(concepts), [], 0
    for span in spans:
        kept = span.places.tolist() if isinstance(span, ConceptSpan) and span.places is not None else range(len(span))
        places += [end + place for place in kept]
        end += span.extent
    length = len(places)
    order, owner, columns = list(range(length)), [0] * length, []
    for number, branch in enumerate(example.branches, 1):
        tokens = (*branch.prompt, *branch.target)
        # The first prediction is made by the prefix if the branch has no prompt, else by its own first token.
        begin = len(places)
        columns += [*([length - 1] if not branch.prompt else []), *range(begin, begin + len(tokens) - 1)]
        spans.append(TextSpan(tokens))
        order += range(length, length + len(tokens))
        places += range(end, end + len(tokens))
        owner += [number] * len(tokens)
    return Row(spans, order, places, owner, columns)


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
    rows = [row_of(example, None if concepts is None else concepts[i]) for i, example in enumerate(examples)]
    sequences = [embed_spans(row.spans, embed or llm.embedding, llm.device) for row in rows]  # (seq_len, hidden_size)
    embeds = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)  # (batch, longest, hidden_size)
    return _packed(llm, rows, embeds)


def pack_deep(examples: Sequence[Example], halves: Halves, concepts: Sequence[Sequence[ConceptSpan]]) -> Packed:
    """Lay examples out for one forward of the LLM's upper half; tokens run through the lower one.

    As in generation, tokens see no passages below the entry layer, and concepts join there.

    Args:
        examples: At least one.
        halves: The LLM in two halves.
        concepts: For each example, deep concepts of each of its passages.

    Returns:
        The batch; gradients flow into `concepts`, and into the lower half's LoRA if it has one.
    """
    llm = halves.llm
    rows = [row_of(example, spans) for example, spans in zip(examples, concepts, strict=True)]
    low = [without_concepts(row) for row in rows]
    learned = any(parameter.requires_grad for parameter in halves.lower.parameters())
    with torch.set_grad_enabled(learned and torch.is_grad_enabled()):
        sequences = [embed_spans(row.spans, llm.embedding, llm.device) for row in low]  # (n_tokens, hidden_size)
        embeds = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)  # (batch, most tokens, hidden_size)
        packed = _packed(llm, low, embeds)
        hidden = halves.below(packed.inputs_embeds, packed.attention_mask, packed.position_ids)
    states = iter(span.concepts.to(hidden) for row in rows for span in row.spans if isinstance(span, ConceptSpan))
    joined = []  # (seq_len, hidden_size) each
    for row, texts, states_below in zip(rows, low, hidden, strict=True):
        lengths = [len(span) for span in texts.spans]
        tokens = iter(states_below[: sum(lengths)].split(lengths))
        joined.append(torch.cat([next(tokens if isinstance(span, TextSpan) else states) for span in row.spans]))
    return _packed(llm, rows, torch.nn.utils.rnn.pad_sequence(joined, batch_first=True))


def without_concepts(row: Row) -> Row:
    """What the lower half sees of it: tokens alone, at the positions they have among the passages."""
    kept = [slot for slot, is_token in enumerate(row.tokens) if is_token]
    return Row(
        [span for span in row.spans if isinstance(span, TextSpan)],
        [row.order[slot] - (slot - n) for n, slot in enumerate(kept)],  # concepts stand in the prefix alone
        [row.places[slot] for slot in kept],
        [row.owner[slot] for slot in kept],
        [],
    )


def _packed(llm: TargetLLM, rows: Sequence[Row], embeds: torch.Tensor) -> Packed:
    """The batch of rows whose input is `embeds`, (batch, longest, hidden_size)."""
    device, longest = llm.device, embeds.shape[1]
    # All (batch, longest): whose each slot is (0: the prefix, -1: padding), how many are in front of it, its position.
    group = _padded([row.owner for row in rows], longest, -1).to(device)
    order = _padded([row.order for row in rows], longest, 0).to(device)
    places = _padded([row.places for row in rows], longest, 0).to(device)
    return Packed(
        embeds,
        _masks(llm, group, order),
        places,
        torch.tensor([i for i, row in enumerate(rows) for _ in row.columns], device=device),  # (n,)
        torch.tensor([column for row in rows for column in row.columns], device=device),  # (n,)
    )


def _padded(rows: Sequence[Sequence[int]], longest: int, fill: int) -> torch.Tensor:
    """Rows of whole numbers, (batch, longest), filled up behind; far sooner than a tensor of nested lists."""
    made = np.full((len(rows), longest), fill, dtype=np.int64)
    for row, values in zip(made, rows, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(made)


def _masks(llm: TargetLLM, group: torch.Tensor, order: torch.Tensor) -> Any:
    """Who sees whom: the prefix, and what is earlier in its branch; padding sees itself, so that nothing is NaN.

    Args:
        llm: Says which kinds of layer there are.
        group: (batch, seq_len), whose each slot is.
        order: (batch, seq_len), how many slots stand in front of it in its prompt; a sliding window counts these.

    Returns:
        (batch, 1, seq_len, seq_len), or by layer type.
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
        return {"full_attention": _as_read(llm, full)} if kinds else _as_read(llm, full)
    near = (order[:, :, None] - order[:, None, :] < window)[:, None]  # (batch, 1, n, n)
    sliding = full & (near | itself)  # (batch, 1, n, n)
    if not kinds:
        return _as_read(llm, sliding)
    return {"full_attention": _as_read(llm, full), "sliding_attention": _as_read(llm, sliding)}


def _as_read(llm: TargetLLM, mask: torch.Tensor) -> torch.Tensor:
    """A boolean mask as the LLM's attention takes it: eager attention (Gemma 2) would add it to the scores."""
    if llm.model.config._attn_implementation != "eager":
        return mask
    lowest = torch.finfo(llm.dtype).min
    return torch.zeros(mask.shape, dtype=llm.dtype, device=mask.device).masked_fill(~mask, lowest)


def positions_of(example: Example) -> int:
    """Positions of an example read as text."""
    fixed = sum(len(part) for part in example.prefix)
    return fixed + sum(len(branch.prompt) + len(branch.target) for branch in example.branches)

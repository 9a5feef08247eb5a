"""Keys and values of kept tokens at all layers, after KV-Distill (arXiv 2503.10337).

Tokens of a context are kept by a score that does not know the question; kept ones pass through weights with LoRA, the
others through the LLM's own; the keys and values of the kept ones, at all layers, are what the frozen LLM reads. It
learns by the KL divergence from the LLM that reads all of the text, forward and reverse.

Unlike the paper: tokens are chosen by the same scores as ours and not by a trained scorer; LoRA is on all linear layers
and has the rank of the other rows; both directions of KL count the same; a passage is compressed behind the prompt's
opening on its own, so that it could be kept and used again, and not as one context with the others. A passage's keys
are taken where it stands in the prompt, which a store would have to turn there.

Training reads one forward over the whole text with a mask in which what was not kept is seen by its own passage alone;
at generation the keys and values of what was not kept are removed. Both give the same (there is a test).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.rivals.base import LeftOutError
from benchmarks.rivals.trained.asking import RowBodies
from benchmarks.rivals.trained.row import Cost, Row, Setup
from compllm_rag.compression.loading import untrained_deep
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import GenerationConfig
from compllm_rag.evaluation.asking import Asker
from compllm_rag.evaluation.bodies import Segmented, Setting
from compllm_rag.evaluation.questions import Question
from compllm_rag.evaluation.scoring import ScoringGenerator
from compllm_rag.evaluation.statistics import Record
from compllm_rag.generation.forward import Forward, fork_cache
from compllm_rag.models.halves import upper_half
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import PromptPlan, Span, TextSpan
from compllm_rag.training.examples import Body, Example, Packed, pack, targets_of
from compllm_rag.training.job_options import LINEARS
from compllm_rag.training.objective import Loss, last_hidden_state, log_probabilities


@dataclass(frozen=True)
class _Whole(TextSpan):
    """The text of a passage, with the units that it is cut into."""

    body: Body = field(default_factory=lambda: Body(()))


class Gate:
    """Which positions LoRA changes in the forward that is going on, (batch, n, 1); None: none of them."""

    kept: torch.Tensor | None = None


class GatedLoRA(nn.Module):
    """A linear layer with LoRA at some positions alone; it begins as the layer itself.

    Args:
        base: The layer, frozen.
        rank: Of LoRA.
        gate: Says where; shared by all layers of a tree.
    """

    def __init__(self, base: nn.Linear, rank: int, gate: Gate) -> None:
        super().__init__()
        self.base = base
        self.lora_down = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device)
        self.lora_up = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device)
        nn.init.zeros_(self.lora_up.weight)
        self._gate = gate

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Of (batch, n, in_features), (batch, n, out_features); alpha is twice the rank."""
        out: torch.Tensor = self.base(input)
        if self._gate.kept is None:
            return out
        change: torch.Tensor = 2.0 * self.lora_up(self.lora_down(input.float())) * self._gate.kept
        return out + change.to(out.dtype)


class KVDistill(Row):
    """KV of kept tokens at all layers; see the module.

    Raises:
        LeftOutError: The LLM has layers that do not attend to the whole prompt.
    """

    objective = "both ways"

    def __init__(self, setup: Setup, rate: float) -> None:
        super().__init__(setup, rate)
        _refuse_windows(setup.llm)
        self._chooser = untrained_deep(setup.llm, setup.entry_layer, information=setup.information)
        self._gate, self.tree = Gate(), upper_half(setup.llm.model, 0)
        for name, layer in list(self.tree.named_modules()):
            parent, _, leaf = name.rpartition(".")
            # Of the last layer nothing but keys and values is read.
            wanted = ("k_proj", "v_proj") if f".layers.{setup.llm.depth - 1}." in name else LINEARS
            if leaf in wanted and isinstance(layer, nn.Linear):
                setattr(self.tree.get_submodule(parent), leaf, GatedLoRA(layer, setup.rank, self._gate))
        self.module = nn.ModuleDict({"write": self.tree})

    @contextmanager
    def _changing(self, kept: torch.Tensor) -> Iterator[None]:
        self._gate.kept = kept[..., None].float()
        try:
            yield
        finally:
            self._gate.kept = None

    def kept(self, body: Body) -> list[int]:
        """The places kept of a passage."""
        out, begin = list[int](), 0
        for unit, places in zip(
            body.segments, self._chooser.kept_places(body.segments, self.counts(body)), strict=True
        ):
            out += [begin + place for place in places]
            begin += len(unit)
        return out

    def laid_out(self, examples: Sequence[Example]) -> tuple[Packed, torch.Tensor, torch.Tensor]:
        """Examples as text, with a mask that hides what is not kept from all but its own passage.

        Returns:
            The batch, and (batch, seq_len) twice: which slots are kept tokens of passages, and which others are.
        """
        packed = pack(examples, self.llm)
        batch, n, _ = packed.inputs_embeds.shape
        passage, kept = torch.full((batch, n), -1), torch.zeros(batch, n, dtype=torch.bool)
        opening = torch.zeros(batch, n, dtype=torch.bool)
        for row, example in enumerate(examples):
            at = 0
            for number, part in enumerate(example.prefix):
                if isinstance(part, Body):
                    passage[row, at : at + len(part)] = number
                    kept[row, at + torch.tensor(self.kept(part))] = True
                elif at == 0:
                    opening[row, : len(part)] = True
                at += len(part)
        mine, theirs = passage[:, :, None], passage[:, None, :]
        within = (theirs == mine) | opening[:, None]  # what a passage's tokens see
        seen = torch.where(mine >= 0, within, (theirs < 0) | kept[:, None])  # (batch, n, n): row sees column
        seen = (seen | torch.eye(n, dtype=torch.bool)).to(self.llm.device)[:, None]
        masks = packed.attention_mask
        made = {k: _both(m, seen) for k, m in masks.items()} if isinstance(masks, dict) else _both(masks, seen)
        dropped = (passage >= 0) & ~kept
        return replace(packed, attention_mask=made), kept.to(self.llm.device), dropped.to(self.llm.device)

    def read(self, examples: Sequence[Example], *, every_layer: bool = False) -> list[torch.Tensor]:
        """See `Row.read`; the last layer alone."""
        packed, kept, _ = self.laid_out(examples)
        with self._changing(kept):
            return [last_hidden_state(self.llm, packed, self.tree)]

    def loss(self, examples: Sequence[Example]) -> Loss:
        """KL from text to kept tokens and back, at the answer tokens."""
        llm = self.llm
        targets = targets_of(examples, prompt_weight=0.0, kind_weights={}, device=llm.device)
        with torch.no_grad():
            theirs = log_probabilities(llm, last_hidden_state(llm, pack(examples, llm))[targets.is_answer])
        ours = log_probabilities(llm, self.read(examples)[0][targets.is_answer])  # (n_answer_tokens, vocab_size)
        weights = targets.weights[targets.is_answer]
        forth = (F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1) * weights).sum()
        back = (F.kl_div(theirs, ours, log_target=True, reduction="none").sum(-1) * weights).sum()
        total = (forth + back) / 2
        parts = {"kl": float(forth.detach()), "reverse_kl": float(back.detach()), "loss": float(total.detach())}
        return Loss(total, parts)

    def spans(self, text: str, passage: int) -> list[Span]:
        """The passage's text, of which its generator keeps a part."""
        body = self.material.body(text)
        return [_Whole(body.ids, passage, body)]

    def asker(self, compressor: ConceptCompressor, segmented: Segmented, generation: GenerationConfig) -> Asker:
        """See `Row.asker`."""
        return _KVAsker(self, compressor, segmented, generation)

    def cost(self, achieved_rate: float) -> Cost:
        """Nothing of a passage is prefilled; keys and values of all layers are stored and attended to."""
        config = self.llm.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        stored = 2 * self.llm.depth * heads * width
        return Cost(1 / achieved_rate, 0.0, 1 / achieved_rate, stored / achieved_rate)

    def prefill(self, example: Example) -> tuple[torch.Tensor, Any, int]:
        """Read a prompt and remove from the KV cache what was not kept.

        Returns:
            Logits (1, vocab_size) of the first new token, the cache, and the position of that token.
        """
        from transformers import DynamicCache

        packed, kept, dropped = self.laid_out([example])
        cache = DynamicCache(config=self.llm.model.config)
        with self._changing(kept):
            logits = self.tree(
                inputs_embeds=packed.inputs_embeds,
                attention_mask=packed.attention_mask,
                position_ids=packed.position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        left = (~dropped[0]).nonzero()[:, 0]
        layers: list[Any] = cache.layers
        for layer in layers:
            layer.keys, layer.values = layer.keys[:, :, left], layer.values[:, :, left]
        return logits, cache, packed.inputs_embeds.shape[1]


def _refuse_windows(llm: TargetLLM) -> None:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    other = {type(layer).__name__ for layer in DynamicCache(config=llm.model.config).layers} - {DynamicLayer.__name__}
    if other:
        raise LeftOutError(
            "keys and values of this LLM cannot be removed one by one",
            got=", ".join(sorted(other)),
            expected="layers that attend to the whole prompt",
            next_step="leave kv_distill out of --rows",
        )


def _both(mask: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """A mask (batch, 1, n, n), boolean or to be added to scores, with what is not `seen` hidden too."""
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


class _KeptForward:
    """One prompt of which the KV of kept tokens remains; see `Forward`."""

    def __init__(self, row: KVDistill, plan: PromptPlan) -> None:
        self._row, self._cache, self._at = row, None, 0
        parts = [span for span in plan.spans if isinstance(span, TextSpan)]
        self._example = Example(tuple(part.body if isinstance(part, _Whole) else part for part in parts), ())

    @torch.inference_mode()
    def prefill(self) -> torch.Tensor:
        """See `Forward.prefill`."""
        logits, self._cache, self._at = self._row.prefill(self._example)
        return logits

    @torch.inference_mode()
    def extend(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Forward.extend`; the LLM as it is goes on."""
        cache: Any = self._cache
        n, device = ids.shape[1], ids.device
        logits: torch.Tensor = self._row.llm.model(
            input_ids=ids,
            attention_mask=torch.ones(1, cache.get_seq_length() + n, dtype=torch.long, device=device),
            position_ids=torch.arange(self._at, self._at + n, device=device)[None],
            past_key_values=cache,
            use_cache=True,
        ).logits
        self._at += n
        return logits

    def fork(self) -> _KeptForward:
        """See `Forward.fork`."""
        forked = copy.copy(self)
        forked._cache = fork_cache(self._cache)
        return forked


class _Rows:
    """Prompts one after another, as if they were a batch; see `Forward`."""

    def __init__(self, rows: Sequence[_KeptForward]) -> None:
        self._rows = rows

    def prefill(self) -> torch.Tensor:
        """See `Forward.prefill`."""
        return torch.cat([row.prefill() for row in self._rows])

    def prefill_parts(self, *, most: int | None = None) -> Iterator[torch.Tensor | None]:
        """See `Forward.prefill_parts`; keys and values are taken out once the prompt was read, so it is one part."""
        yield self.prefill()

    def extend(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Forward.extend`."""
        return torch.cat([row.extend(own[None]) for row, own in zip(self._rows, ids, strict=True)])

    def fork(self) -> _Rows:
        """See `Forward.fork`."""
        return _Rows([row.fork() for row in self._rows])


class _KeptGenerator(ScoringGenerator):
    def __init__(self, row: KVDistill, config: GenerationConfig) -> None:
        super().__init__(row.llm, config)
        self._row = row

    def lay_out(self, plans: Sequence[PromptPlan]) -> Forward:
        """See `LocalGenerator.lay_out`."""
        return _Rows([_KeptForward(self._row, plan) for plan in plans])


class _KVAsker(Asker):
    def __init__(
        self, row: KVDistill, compressor: ConceptCompressor, segmented: Segmented, generation: GenerationConfig
    ) -> None:
        super().__init__(compressor, Setting("text"), segmented, generation, RowBodies(row))
        self._generator = self._answers = _KeptGenerator(row, generation)

    def _record(self, question: Question, plan: PromptPlan, *rest: Any) -> Record:
        made = super()._record(question, plan, *rest)
        return replace(made, positions=made.positions - made.source_tokens + (made.concepts or 0), cost=0.0)

"""Deep concepts: what stands in front of a middle layer of the LLM at the kept tokens of a chunk.

The LLM's first L layers run over a whole chunk behind the prompt's constant opening; K of its n positions are kept, and
their residual stream is the chunk's concepts. At query time the prompt's own tokens run through those layers without
the passages, the concepts join at layer L at their source positions, and the upper layers run over all: a passage costs
(D - L) / (D C) of its prefill as text, D the LLM's layers, and as much of its KV cache.

Three LoRA adapters may be trained, all optional: one below L that writes concepts, one from L on that reads them, and
one below L with which the prompt's own tokens run there, where they do not see the passages as the LLM is used to. And
where tokens are dropped, a learned vector may mark those that are kept: what stands there then knows that it has to
speak for its neighbours.
Untrained, an LLM reads its own states: at L = D / 2 and C = 1 they recover most of what text gives (docs/quality.md).
Lower layers of a decoder deal with what is near, so that question and passage need not meet there (DeFormer,
arXiv 2005.00697); CompLLM's concepts (arXiv 2509.19228) enter at layer 0.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from compllm_rag.compression.information import information_for
from compllm_rag.compression.late_interaction import LateInteraction
from compllm_rag.compression.pins import Pins, raised
from compllm_rag.compression.pretrained import SavedCompressor, read_compressor, save_compressor
from compllm_rag.compression.rate_policies.losses import LossPredictor
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.compression.selection import best_positions, fitted, learned_scores, random_scores
from compllm_rag.compression.spec import ConceptSpec, inject_reading, state_rms
from compllm_rag.config import CompressorConfig
from compllm_rag.errors import ConfigurationError
from compllm_rag.fingerprint import tagged_digest, tensor_digest
from compllm_rag.models.adapters import inject_lora, load_lora_state, lora_state
from compllm_rag.models.device_memory import memory_trouble, out_of_memory, release_unused, room_for
from compllm_rag.models.halves import Halves, lower_half, merged_tree
from compllm_rag.models.llm import TargetLLM

logger = logging.getLogger(__name__)

# Positions of one forward, and of one that gives logits over the vocabulary: (positions, vocab_size) in float32.
_BATCH_POSITIONS = {"cpu": 4096, "cuda": 65536}
_LOGIT_POSITIONS = {"cpu": 1024, "cuda": 8192}
_MEMORY = "end what else uses this device, load the LLM in bfloat16, or take another device (`device='cpu'`)"


class DeepCompressor:
    """Turns units (chunks of text) into deep concepts of a target LLM.

    Args:
        llm: The target LLM, reader merged.
        config: With `entry_layer` of at least 1.
        information: Information content of each token, (vocab_size,) in nats; None takes the shipped table of the
            embedded model, or estimates one for any other tokenizer.
        selector: Weights of a learned selector, (hidden_size + 1,); see `learned_scores`. For `selector="learned"`
            alone.

    Raises:
        ConfigurationError: The configuration does not fit the LLM, or a learned selector and its weights do not come
            together.
        UnsupportedModelError: The LLM cannot be cut in two; see `Halves`.
    """

    def __init__(
        self,
        llm: TargetLLM,
        config: CompressorConfig,
        *,
        information: torch.Tensor | None = None,
        selector: torch.Tensor | None = None,
    ) -> None:
        _require_deep(config)
        _check_selector(config, selector, llm.hidden_size)
        self.llm, self.config = llm, config
        # How the LLM reads these concepts; generators take it from here.
        self.halves = Halves(llm, config.entry_layer)
        inject_reading(self.halves, config)
        # What the selector looks at: the LLM as it is, whatever LoRA its halves have.
        self._plain = lower_half(llm.model, config.entry_layer) if config.prompt_rank else self.halves.lower
        table = information if information is not None else information_for(llm.tokenizer)
        # fp16 is what is saved: a table kept finer than its file would choose other positions after a reload.
        self.information = fitted(table, llm.embedding.weight.shape[0]).half().float().to(llm.device)
        self.selector = None if selector is None else selector.half().float().to(llm.device)
        self._pins = Pins(llm.tokenizer, llm.embedding.weight.shape[0], config.pins) if config.pins else None
        # (hidden_size,), without effect until it is trained; float32 as the LoRA tensors are
        self.marker = torch.nn.Parameter(torch.zeros(llm.hidden_size, device=llm.device)) if config.marked else None
        self.decoder = lower_half(llm.model, config.entry_layer)
        if config.lora_rank:
            inject_lora(self.decoder, rank=config.lora_rank, alpha=config.lora_alpha, modules=config.lora_modules)
        self.segmenter = Segmenter(llm.tokenizer, config.segment_length, config.segmenter_version)
        self.losses: LossPredictor | None = None  # what rates lose, if that was fitted; see `rate_policies.losses`
        self.interaction: LateInteraction | None = None  # which sentence answers, if that was learned
        self._fingerprint: str | None = None
        self._merged: Any = None  # see `_writing`
        self._most_positions = max(_BATCH_POSITIONS.values())  # of one forward; less once memory was short

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, llm: TargetLLM | None = None, *, revision: str | None = None, **llm_options: Any
    ) -> DeepCompressor:
        """Load a compressor from a folder or a hub id; see `compllm_rag.compression.pretrained.read_compressor`.

        Raises:
            ConfigurationError: It is one of CompLLM's, whose concepts enter at the input embeddings.
        """
        return cls.of(read_compressor(folder, llm, revision=revision, **llm_options))

    @classmethod
    def of(cls, saved: SavedCompressor) -> DeepCompressor:
        """The compressor that lies on disk."""
        _require_deep(saved.config)
        shapes: dict[str, tuple[int, ...]] = {"information": (saved.llm.embedding.weight.shape[0],)}
        if saved.config.selector == "learned":
            shapes["selector"] = (saved.llm.hidden_size + 1,)
        learned = dict(shapes)
        if saved.config.marked:
            shapes["marker"] = (saved.llm.hidden_size,)
        saved.check_tensors(shapes, ("lora.", "read.", "prompt."))
        tables = {name: saved.state[name].float() for name in learned}
        made = cls(saved.llm, saved.config, **tables)
        if made.marker is not None:
            made.marker.data.copy_(saved.state["marker"])
        for name, tree in made.trees.items():
            load_lora_state(tree, saved.under(f"{name}."))
        saved.check_fingerprint(made.fingerprint)
        made.losses, made.interaction = saved.losses, saved.interaction
        return made

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the compressor to a folder; see `compllm_rag.compression.pretrained.save_compressor`."""
        return save_compressor(self, Path(folder))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything a concept, and how it is read, depends on; not of dtype or device."""
        return self._fingerprint or self.refresh_fingerprint()

    def refresh_fingerprint(self) -> str:
        """Compute the fingerprint again; whoever changes the weights calls this."""
        self._merged = None
        self._fingerprint = tagged_digest(
            "compllm-rag/deep-compressor",
            target=self.llm.identity,
            weights=tensor_digest({k: v.cpu().numpy() for k, v in self.state().items()}),
            config=self.config.model_dump_json(exclude={"format_version"}),
        )
        return self._fingerprint

    @property
    def trees(self) -> dict[str, Any]:
        """The module trees that may have a LoRA, by the name that its tensors begin with in a file.

        `lora` writes concepts, `prompt` and `read` run a prompt below and from the entry layer on.
        """
        return {"lora": self.decoder, "read": self.halves.upper, "prompt": self.halves.lower}

    def take_lora(self, other: DeepCompressor) -> None:
        """Copy every LoRA, and the marker, of a compressor with the same ones; the fingerprint is to be refreshed."""
        for name, tree in self.trees.items():
            load_lora_state(tree, lora_state(other.trees[name]))
        if self.marker is not None and other.marker is not None:
            self.marker.data.copy_(other.marker.data)

    @property
    def hidden_size(self) -> int:
        """Width of a concept."""
        return self.llm.hidden_size

    @property
    def spec(self) -> ConceptSpec:
        """What is known of its concepts without its weights."""
        return ConceptSpec(self.config, self.fingerprint, self.segmenter, self.hidden_size, self._scale, self.llm.depth)

    @functools.cached_property
    def _scale(self) -> float:
        return state_rms(self.llm, self.config)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything learned, in fp16 as it is saved: each LoRA, the marker, the information table, the selector."""
        tensors = {
            f"{part}.{name}": tensor for part, tree in self.trees.items() for name, tensor in lora_state(tree).items()
        }
        tensors["information"] = self.information
        if self.selector is not None:
            tensors["selector"] = self.selector
        if self.marker is not None:
            tensors["marker"] = self.marker.detach()
        return {name: tensor.half().contiguous() for name, tensor in tensors.items()}

    def compress(
        self,
        units: Sequence[Sequence[int]],
        n_concepts: Sequence[int],
        *,
        places: Sequence[Sequence[int]] | None = None,
    ) -> list[torch.Tensor]:
        """Compress units, all at once.

        Args:
            units: Token ids of each unit.
            n_concepts: K of each unit, from 1 to its number of tokens.
            places: Which K tokens of each unit to keep, in order; None chooses them, see `kept_places`.

        Returns:
            One tensor (K, hidden_size + 1) per unit, float32 on the CPU, in the order given: the states in order of
            place, and in the last column the place of each within its unit.

        Raises:
            ConfigurationError: A unit is empty or too long, its K out of bounds, or its places not K of it in order.
            DeviceMemoryError: Not even a single unit fits the memory; batches are halved before that.
        """
        given: Sequence[Sequence[int] | None] = places or [None] * len(units)
        for unit, k, own in zip(units, n_concepts, given, strict=True):
            self._check_unit(unit, k, own)
        out: list[torch.Tensor | None] = [None] * len(units)
        order = sorted(range(len(units)), key=lambda i: len(units[i]))  # nearly rectangular batches
        device = "cpu" if self.llm.device.type == "cpu" else "cuda"
        limit = min(_BATCH_POSITIONS[device], self._most_positions)
        for batch in _batches(order, [len(self.config.opening) + len(unit) for unit in units], limit):
            chosen = [units[i] for i in batch]
            kept = (
                [list(places[i]) for i in batch] if places else self.kept_places(chosen, [n_concepts[i] for i in batch])
            )
            made = self._halving(chosen, kept)
            for i, rows in zip(batch, made, strict=True):
                out[i] = rows
        return [rows for rows in out if rows is not None]

    def kept_places(self, units: Sequence[Sequence[int]], n_concepts: Sequence[int]) -> list[list[int]]:
        """The places that each unit keeps, in order; see `CompressorConfig.selector` and `pins`."""
        scored = [i for i, k in enumerate(n_concepts) if k < len(units[i])]
        with room_for("choose the tokens to keep of a chunk", self.llm.device, _MEMORY):
            scores = dict(zip(scored, self.scores([units[i] for i in scored]), strict=True))
        return [
            self.best_places(units[i], scores[i], k) if i in scores else list(range(len(units[i])))
            for i, k in enumerate(n_concepts)
        ]

    def best_places(self, unit: Sequence[int], scores: torch.Tensor, n_concepts: int) -> list[int]:
        """The K places that a unit keeps by its scores (n_tokens,) of `scores`, pins first, in order."""
        return best_positions(
            scores if self._pins is None else raised(scores, self._pins.of(unit), n_concepts), n_concepts
        )

    def _check_unit(self, unit: Sequence[int], k: int, places: Sequence[int] | None) -> None:
        n = len(unit)
        fits = 1 <= n <= self.config.unit_length and 1 <= k <= n
        if places is not None:
            fits = fits and len(places) == k and list(places) == sorted({*places} & {*range(n)})
        if not fits:
            raise ConfigurationError(
                "unit cannot be compressed",
                got=f"{n} tokens into {k} concepts" + ("" if places is None else f" at {list(places)[:20]}"),
                expected=f"1 to {self.config.unit_length} tokens and 1 to that many concepts, at places in order",
                next_step="cut the text with the spec's `units`",
            )

    def _halving(self, units: list[Sequence[int]], kept: list[list[int]]) -> list[torch.Tensor]:
        made, said = None, None
        try:
            made = self._forward(units, kept)
        except (RuntimeError, MemoryError) as error:
            said = memory_trouble(error)
            if said is None:
                raise
        if made is not None:
            return made
        release_unused(self.llm.device)
        if len(units) == 1:
            raise out_of_memory(
                "compress a single chunk",
                self.llm.device,
                said or "",
                _MEMORY,
            )
        half = len(units) // 2
        self._most_positions = max(1, half * (len(self.config.opening) + max(map(len, units))))
        return self._halving(units[:half], kept[:half]) + self._halving(units[half:], kept[half:])

    @torch.inference_mode()
    def _forward(self, units: Sequence[Sequence[int]], kept: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        hidden = self.states(units, kept)  # (batch, longest, hidden_size)
        out = []
        for row, places in zip(hidden, kept, strict=True):
            at = torch.tensor(places)  # (K,)
            states = row[at.to(row.device)].float().cpu()  # (K, hidden_size)
            out.append(torch.cat([states, at[:, None].float()], 1))  # (K, hidden_size + 1)
        return out

    @torch.inference_mode()
    def states(self, units: Sequence[Sequence[int]], kept: Sequence[Sequence[int]] | None = None) -> torch.Tensor:
        """One batched forward of the lower half.

        Args:
            units: Token ids of each.
            kept: Places of each that are kept, which a marked compressor has to know; None: all of them.

        Returns:
            Tensor (batch, most tokens, hidden_size) in the compute dtype: the residual stream in front of the entry
            layer at every token of each unit; rows beyond a unit's length are meaningless.
        """
        return self._through(self._writing(), units, kept)

    def states_with_grad(
        self, units: Sequence[Sequence[int]], kept: Sequence[Sequence[int]] | None = None
    ) -> torch.Tensor:
        """The same as `states`, differentiable in the LoRA that writes and in the marker; slower."""
        return self._through(self.decoder, units, kept)

    def _writing(self) -> Any:
        """The lower half that passages run through: its LoRA merged into weights of its own, where memory allows.

        Live, a LoRA of rank 32 makes each layer of a small LLM about a quarter slower. What is trained is `decoder`;
        whoever changes that calls `refresh_fingerprint`.
        """
        if not self.config.lora_rank:
            return self.decoder
        made = self._merged  # at hand, whoever lets go of it meanwhile
        if made is None:
            try:
                made = merged_tree(self.decoder)
            except (RuntimeError, MemoryError) as error:
                if memory_trouble(error) is None:
                    raise
                made = self.decoder
            if made is self.decoder:
                release_unused(self.llm.device)
                logger.warning("no memory to merge the LoRA that writes concepts: chunks are compressed more slowly")
            self._merged = made
        return made

    def _through(self, tree: Any, units: Sequence[Sequence[int]], kept: Sequence[Sequence[int]] | None) -> torch.Tensor:
        begin = len(self.config.opening)
        ids, mask = self._rows(units)  # (batch, begin + most tokens) each
        hidden: torch.Tensor = tree(
            inputs_embeds=self._marked(self.llm.embedding(ids), units, kept),
            attention_mask=None if bool(mask.all()) else mask,
            use_cache=False,
        ).last_hidden_state  # (batch, begin + most tokens, hidden_size)
        return hidden[:, begin:]

    def _marked(
        self, embeddings: torch.Tensor, units: Sequence[Sequence[int]], kept: Sequence[Sequence[int]] | None
    ) -> torch.Tensor:
        """Embeddings (batch, n, hidden_size) of rows with the marker at the places that are kept of a unit."""
        if self.marker is None or kept is None:
            return embeddings
        begin = len(self.config.opening)
        places = [
            [begin + place for place in own] if len(own) < len(unit) else []  # where all are kept, none stands out
            for unit, own in zip(units, kept, strict=True)
        ]
        at = torch.zeros(embeddings.shape[:2], dtype=embeddings.dtype, device=embeddings.device)  # (batch, n)
        for row, own in zip(at, places, strict=True):
            row[own] = 1
        return embeddings + at[..., None] * self.marker.to(embeddings.dtype)

    @torch.inference_mode()
    def plain_states(self, units: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        """What stands in front of the entry layer without any LoRA: (n_tokens, hidden_size) of each unit."""
        begin, limit = len(self.config.opening), _BATCH_POSITIONS["cpu" if self.llm.device.type == "cpu" else "cuda"]
        size = max(1, limit // (begin + self.config.unit_length))
        for at in range(0, len(units), size):
            ids, mask = self._rows(units[at : at + size])  # (batch, n) each
            hidden = self._plain(
                inputs_embeds=self.llm.embedding(ids),
                attention_mask=mask,
                position_ids=torch.arange(ids.shape[1], device=ids.device).expand_as(ids),  # (batch, n)
                use_cache=False,
            ).last_hidden_state  # (batch, n, hidden_size)
            yield from (row[begin : begin + len(unit)] for row, unit in zip(hidden, units[at : at + size], strict=True))

    def _rows(self, units: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Opening and unit of each row as ids and mask, (batch, n) each; what pads a row stands behind it."""
        rows = [[*self.config.opening, *unit] for unit in units]
        n, device = max(map(len, rows)), self.llm.device
        ids = torch.tensor([row + [0] * (n - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return ids, (torch.arange(n, device=device) < lengths[:, None]).long()

    @torch.inference_mode()
    def scores(self, units: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        """How much each token of each unit is worth keeping, (n_tokens,) float32 on the CPU each."""
        if self.config.selector == "random":
            yield from map(random_scores, units)
            return
        known = [self.information[torch.tensor(list(unit), device=self.llm.device)] for unit in units]
        if self.config.selector == "information":
            yield from (row.cpu() for row in known)
            return
        if self.selector is not None:
            for states, table in zip(self.plain_states(units), known, strict=True):
                yield learned_scores(states, table, self.selector).cpu()
            return
        begin = len(self.config.opening)
        size = max(
            1, _LOGIT_POSITIONS["cpu" if self.llm.device.type == "cpu" else "cuda"] // (begin + self.config.unit_length)
        )
        for at in range(0, len(units), size):
            ids, mask = self._rows(units[at : at + size])  # (batch, n) each
            logits = self.llm.model(
                input_ids=ids, attention_mask=None if bool(mask.all()) else mask, use_cache=False
            ).logits  # (batch, n, vocab_size)
            for row, unit, table in zip(logits, units[at : at + size], known[at : at + size], strict=True):
                # What stands at a place foretells the next: the opening's last token foretells the unit's first.
                said = row[max(begin - 1, 0) : begin - 1 + len(unit)].float().log_softmax(-1)
                wanted = torch.tensor(list(unit), device=row.device)[-len(said) :]
                surprisal = -said.gather(1, wanted[:, None])[:, 0]  # (n_tokens,), one less without an opening
                missing = torch.zeros(len(unit) - len(said), device=row.device)
                yield (table + 0.5 * torch.cat([missing, surprisal])).cpu()


def _require_deep(config: CompressorConfig) -> None:
    if not config.deep:
        raise ConfigurationError(
            "this is no compressor of deep concepts",
            got="entry layer 0, the input embeddings",
            expected="an entry layer of at least 1",
            next_step="use Compressor",
        )


def _check_selector(config: CompressorConfig, weights: torch.Tensor | None, hidden_size: int) -> None:
    wanted = (hidden_size + 1,) if config.selector == "learned" else None
    has = None if weights is None else tuple(weights.shape)
    if has != wanted:
        raise ConfigurationError(
            "selector and its weights do not fit",
            got=f'selector "{config.selector}" with ' + ("no weights" if has is None else f"weights {has}"),
            expected="no weights" if wanted is None else f"weights {wanted}",
            next_step="make one with `compllm-rag train selector`" if wanted else "leave the weights out",
        )


def _batches(order: Sequence[int], lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Runs of `order`, shortest rows first, of at most `limit` positions, padding counted; at least one row each."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > limit:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def default_entry_layer(depth: int) -> int:
    """Half the LLM's layers; a concept then costs half a token of text."""
    return max(1, math.floor(depth / 2))

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

from compllm_rag.compression.deep_checks import check_selector, check_unit, require_deep
from compllm_rag.compression.information import information_for
from compllm_rag.compression.late_interaction import LateInteraction
from compllm_rag.compression.pins import Pins, raised
from compllm_rag.compression.pretrained import SavedCompressor, read_compressor, save_compressor
from compllm_rag.compression.rate_policies.losses import LossPredictor
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.compression.selection import best_positions, fitted
from compllm_rag.compression.spec import ConceptSpec, inject_reading, state_rms
from compllm_rag.compression.token_worth import TokenWorth, most_positions, rows_behind
from compllm_rag.config import CompressorConfig
from compllm_rag.fingerprint import tagged_digest, tensor_digest
from compllm_rag.models.adapters import inject_lora, load_lora_state, lora_state
from compllm_rag.models.device_memory import NO_MEMORY, in_halves, memory_trouble, release_unused, room_for
from compllm_rag.models.halves import Halves, lower_half, merged_tree
from compllm_rag.models.llm import TargetLLM

logger = logging.getLogger(__name__)


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
        require_deep(config)
        check_selector(config, selector, llm.hidden_size)
        self.llm, self.config = llm, config
        # How the LLM reads these concepts; generators take it from here.
        self.halves = Halves(llm, config.entry_layer)
        inject_reading(self.halves, config)
        table = information if information is not None else information_for(llm.tokenizer)
        # fp16 is what is saved: a table kept finer than its file would choose other positions after a reload.
        self.information = fitted(table, llm.embedding.weight.shape[0]).half().float().to(llm.device)
        self.selector = None if selector is None else selector.half().float().to(llm.device)
        # The selector looks at the LLM as it is, whatever LoRA its halves have.
        plain = lower_half(llm.model, config.entry_layer) if config.prompt_rank else self.halves.lower
        self._worth = TokenWorth(llm, config, self.information, self.selector, plain)
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
        self._most_positions: float = math.inf  # of one forward; less once memory was short

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
        require_deep(saved.config)
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
            check_unit(self.config, unit, k, own)
        out: list[torch.Tensor | None] = [None] * len(units)
        order = sorted(range(len(units)), key=lambda i: len(units[i]))  # nearly rectangular batches
        limit = min(most_positions(self.llm.device), self._most_positions)
        for batch in _batches(order, [len(self.config.opening) + len(unit) for unit in units], limit):
            chosen = [units[i] for i in batch]
            kept = (
                [list(places[i]) for i in batch] if places else self.kept_places(chosen, [n_concepts[i] for i in batch])
            )
            for i, rows in zip(batch, self._made(list(zip(chosen, kept, strict=True))), strict=True):
                out[i] = rows
        return [rows for rows in out if rows is not None]

    def kept_places(self, units: Sequence[Sequence[int]], n_concepts: Sequence[int]) -> list[list[int]]:
        """The places that each unit keeps, in order; see `CompressorConfig.selector` and `pins`."""
        scored = [i for i, k in enumerate(n_concepts) if k < len(units[i])]
        with room_for("choose the tokens to keep of a chunk", self.llm.device, NO_MEMORY):
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

    def _made(self, batch: Sequence[tuple[Sequence[int], list[int]]]) -> list[torch.Tensor]:
        """Concepts of units with the places that they keep, as many at once as fit the memory."""
        longest = len(self.config.opening) + max(len(unit) for unit, _ in batch)

        def shrunk(items: int) -> None:
            self._most_positions = max(1, items * longest)

        return in_halves(
            lambda some: self._forward([unit for unit, _ in some], [kept for _, kept in some]),
            batch,
            self.llm.device,
            "compress a single chunk",
            NO_MEMORY,
            shrunk,
        )

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
        ids, mask = rows_behind(self.config.opening, units, self.llm.device)  # (batch, begin + most tokens) each
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

    def plain_states(self, units: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        """What stands in front of the entry layer without any LoRA: (n_tokens, hidden_size) of each unit."""
        return self._worth.plain_states(units)

    def scores(self, units: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        """How much each token of each unit is worth keeping, (n_tokens,) float32 on the CPU each."""
        return self._worth.of(units)


def _batches(order: Sequence[int], lengths: Sequence[int], limit: float) -> Iterator[list[int]]:
    """Runs of `order`, shortest rows first, of at most `limit` positions, padding counted; at least one row each."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > limit:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch

"""The compressor: segments of text in, concept embeddings out.

Architecture of CompLLM (arXiv 2509.19228, section 3): the target LLM itself with LoRA reads a segment followed by K
query embeddings; the hidden states at the queries pass through one linear layer. Where the paper's queries are K
end-of-sequence tokens, ours are by default the segment's K most informative tokens, the *anchors*, and a concept is
the anchor's own embedding plus a correction that starts at zero. So an untrained compressor equals hard pruning, and
training can only move on from there (docs/design.md section 4).

A segment's concepts depend on nothing but the segment: that is why they can be made once and kept.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compllm_rag.compression.information import information_for
from compllm_rag.compression.late_interaction import LateInteraction
from compllm_rag.compression.pretrained import SavedCompressor, read_compressor, save_compressor
from compllm_rag.compression.rate_policies.losses import LossPredictor
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.compression.selection import AnchorChooser, fitted, word_begins
from compllm_rag.compression.spec import ConceptSpec, embedding_rms
from compllm_rag.config import CompressorConfig
from compllm_rag.errors import ConfigurationError
from compllm_rag.fingerprint import tagged_digest, tensor_digest
from compllm_rag.models.adapters import inject_lora, load_lora_state, lora_state
from compllm_rag.models.device_memory import NO_MEMORY, in_halves
from compllm_rag.models.halves import Halves, lower_half
from compllm_rag.models.llm import TargetLLM

# Settings of deep concepts, which these are not.
_DEEP_FIELDS = (
    *("entry_layer", "unit_length", "opening", "selector", "pins", "marked"),
    *("read_rank", "read_alpha", "read_modules", "prompt_rank", "prompt_alpha", "prompt_modules"),
)
# Tokens and anchors of one forward; enough to keep two cores or one GPU busy, small enough for 24 GiB.
BATCH_POSITIONS = {"cpu": 4096, "cuda": 65536}
# Segments read ahead and sorted by length, so that batches are nearly rectangular and memory stays bounded.
_READ_AHEAD = 2048


class Compressor:
    """Compresses segments into concept embeddings of a target LLM.

    The module tree is its own (first L layers, LoRA always on); the base tensors are the target's, so that neither
    memory nor the target's behaviour changes.

    Args:
        llm: The target LLM, reader merged.
        config: What the compressor is; None means the untrained default.
        information: Information content of each token, (vocab_size,) in nats; None takes the shipped table of the
            embedded model, or estimates one for any other tokenizer.

    Raises:
        ConfigurationError: The configuration does not fit the LLM.
    """

    def __init__(
        self, llm: TargetLLM, config: CompressorConfig | None = None, *, information: torch.Tensor | None = None
    ) -> None:
        self.llm, self.config = llm, config or CompressorConfig()
        self.halves: Halves | None = None  # its concepts are read by the LLM as it is
        _refuse_deep(self.config)
        depth = llm.depth
        if self.config.layers is not None and self.config.layers > depth:
            raise ConfigurationError(
                "compressor has more layers than the LLM",
                got=self.config.layers,
                expected=f"at most {depth}",
                next_step="lower `layers`, or use the LLM it was made for",
            )
        table = information if information is not None else information_for(llm.tokenizer)
        rows = llm.embedding.weight.shape[0]
        # fp16 is what is saved: a table kept finer than its file would choose other anchors after a reload.
        self.information = fitted(table, rows).half().float().to(llm.device)
        # Where a word begins; without words every token is one.
        begins = word_begins(llm.tokenizer, rows).to(llm.device) if self.config.anchor_words else None
        self._chooser = AnchorChooser(self.information, begins)
        self.decoder = lower_half(llm.model, self.config.layers)
        if self.config.lora_rank:
            inject_lora(
                self.decoder,
                rank=self.config.lora_rank,
                alpha=self.config.lora_alpha,
                modules=self.config.lora_modules,
            )
        width = llm.hidden_size
        self.head = nn.Linear(width, width, device=llm.device, dtype=torch.float32).requires_grad_(False)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.segmenter = Segmenter(llm.tokenizer, self.config.segment_length, self.config.segmenter_version)
        self.losses: LossPredictor | None = None  # what rates lose, if that was fitted; see `rate_policies.losses`
        self.interaction: LateInteraction | None = None  # which sentence answers, if that was learned
        self._fingerprint: str | None = None
        self._most_positions = max(BATCH_POSITIONS.values())  # of one forward; less once memory was short

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, llm: TargetLLM | None = None, *, revision: str | None = None, **llm_options: Any
    ) -> Compressor:
        """Load a compressor from a folder or a hub id; see `compllm_rag.compression.pretrained.read_compressor`.

        Raises:
            ConfigurationError: It is one of deep concepts.
        """
        return cls.of(read_compressor(folder, llm, revision=revision, **llm_options))

    @classmethod
    def of(cls, saved: SavedCompressor) -> Compressor:
        """The compressor that lies on disk."""
        _refuse_deep(saved.config)
        width, rows = saved.llm.hidden_size, saved.llm.embedding.weight.shape[0]
        saved.check_tensors({"head.weight": (width, width), "head.bias": (width,), "information": (rows,)}, ("lora.",))
        made = cls(saved.llm, saved.config, information=saved.state["information"].float())
        with torch.no_grad():
            made.head.weight.copy_(saved.state["head.weight"])
            made.head.bias.copy_(saved.state["head.bias"])
        load_lora_state(made.decoder, saved.under("lora."))
        saved.check_fingerprint(made.fingerprint)
        made.losses, made.interaction = saved.losses, saved.interaction
        return made

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the compressor to a folder; see `compllm_rag.compression.pretrained.save_compressor`."""
        return save_compressor(self, Path(folder))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything a concept depends on (docs/design.md section 5); not of dtype or device."""
        return self._fingerprint or self.refresh_fingerprint()

    def refresh_fingerprint(self) -> str:
        """Compute the fingerprint again; whoever changes the weights calls this."""
        # Tokens the compressor adds by itself are named by files of the tokenizer that no digest covers.
        # A setting that came later leaves the fingerprints alone that were made before it, as long as it is off.
        later = set(_DEEP_FIELDS) if self.config.anchor_words else {"anchor_words", *_DEEP_FIELDS}
        added = {"sink_id": self._sink_id()} if self.config.sink else {}
        if self.config.queries == "eos":
            added["query_id"] = int(self.llm.tokenizer.eos_token_id)
        self._fingerprint = tagged_digest(
            "compllm-rag/compressor",
            target=self.llm.identity,
            weights=tensor_digest({k: v.cpu().numpy() for k, v in self.state().items()}),
            config=self.config.model_dump_json(exclude={"format_version", *later}),
            **added,
        )
        return self._fingerprint

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
        return embedding_rms(self.llm)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything learned, in fp16 as it is saved: LoRA, head and information table."""
        tensors = {f"lora.{name}": tensor for name, tensor in lora_state(self.decoder).items()}
        tensors |= {"head.weight": self.head.weight.detach(), "head.bias": self.head.bias.detach()}
        tensors["information"] = self.information
        return {name: tensor.half().contiguous() for name, tensor in tensors.items()}

    def anchors(self, segment: Sequence[int], n_concepts: int) -> list[int]:
        """Indices of a segment's K most informative tokens, in order; among equals the earlier one."""
        return self._chooser.choose(segment, n_concepts)

    def kept_places(self, segments: Sequence[Sequence[int]], n_concepts: Sequence[int]) -> list[list[int]]:
        """The tokens of each segment that its concepts start from; see `anchors`."""
        return [self.anchors(segment, k) for segment, k in zip(segments, n_concepts, strict=True)]

    def compress(self, segments: Sequence[Sequence[int]], n_concepts: Sequence[int]) -> list[torch.Tensor]:
        """Compress segments, all at once.

        Args:
            segments: Token ids of each segment.
            n_concepts: K of each segment, from 1 to its number of tokens.

        Returns:
            One tensor (K, hidden_size) per segment, float32 on the CPU, in the order given.

        Raises:
            ConfigurationError: A segment is empty or too long, or its K out of bounds.
            DeviceMemoryError: Not even a single segment fits the memory; batches are halved before that.
        """
        out: list[torch.Tensor | None] = [None] * len(segments)
        for index, concepts in self.compress_stream(zip(segments, n_concepts, strict=True)):
            out[index] = concepts
        return [concepts for concepts in out if concepts is not None]

    def compress_stream(
        self, items: Iterable[tuple[Sequence[int], int]], *, read_ahead: int = _READ_AHEAD
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Compress a stream of (segment, K) in bounded memory.

        Yields:
            Index in the stream and concepts (K, hidden_size), float32 on the CPU; within one read-ahead window the
            order is that of the lengths, not that of the stream.
        """
        window: list[tuple[int, Sequence[int], int]] = []
        for index, (segment, k) in enumerate(items):
            self._check_segment(segment, k)
            window.append((index, segment, k))
            if len(window) == read_ahead:
                yield from self._compress_window(window)
                window = []
        yield from self._compress_window(window)

    def _check_segment(self, segment: Sequence[int], k: int) -> None:
        n = len(segment)
        if not 1 <= n <= self.config.segment_length or not 1 <= k <= n:
            raise ConfigurationError(
                "segment cannot be compressed",
                got=f"{n} tokens into {k} concepts",
                expected=f"1 to {self.config.segment_length} tokens and 1 to that many concepts",
                next_step="cut the text with this compressor's own segmenter",
            )

    def _compress_window(self, window: list[tuple[int, Sequence[int], int]]) -> Iterator[tuple[int, torch.Tensor]]:
        window.sort(key=lambda item: (len(item[1]), item[2]))
        limit = BATCH_POSITIONS["cpu" if self.llm.device.type == "cpu" else "cuda"]
        for batch in batches(window, min(limit, self._most_positions)):
            yield from self._compress_batch(batch)

    def _compress_batch(self, batch: list[tuple[int, Sequence[int], int]]) -> Iterator[tuple[int, torch.Tensor]]:
        longest = len(batch[-1][1]) + batch[-1][2]

        def shrunk(items: int) -> None:
            self._most_positions = max(1, items * longest)

        def made(some: Sequence[tuple[int, Sequence[int], int]]) -> list[tuple[int, torch.Tensor]]:
            # (batch, max K, hidden_size)
            concepts = self._forward([s for _, s, _ in some], [k for _, _, k in some]).float().cpu()
            # A copy of each row: a view would keep the whole batch alive for as long as one segment is in use.
            return [(index, row[:k].clone()) for (index, _, k), row in zip(some, concepts, strict=True)]

        device = self.llm.device
        yield from in_halves(made, batch, device, "compress a single segment", NO_MEMORY, shrunk)

    @torch.inference_mode()
    def _forward(self, segments: Sequence[Sequence[int]], ks: Sequence[int]) -> torch.Tensor:
        """Concepts of one batch; see `concepts_with_grad` for the shapes."""
        return self.concepts_with_grad(segments, ks)

    def concepts_with_grad(self, segments: Sequence[Sequence[int]], ks: Sequence[int]) -> torch.Tensor:
        """One batched forward, differentiable in LoRA and head.

        Rows are tokens, then anchors; shorter rows are padded in front of their tokens and behind their anchors, so
        that what belongs together stays together (a sliding window counts places, not positions), and positions count
        as if there were no padding.

        Returns:
            Tensor (batch, max K, hidden_size) in float32; rows beyond a segment's K are meaningless.
        """
        lead = [self._sink_id()] if self.config.sink else []
        n, k, device = len(lead) + max(map(len, segments)), max(ks), self.llm.device
        # (batch, n): padding, then the sink if there is one, then the segment
        ids = torch.tensor([[*[0] * (n - len(lead) - len(s)), *lead, *s] for s in segments], device=device)
        begins = torch.tensor([n - len(lead) - len(s) for s in segments], device=device)[:, None]  # (batch, 1)
        counts = torch.tensor(list(ks), device=device)[:, None]  # (batch, 1), K of each row
        slots, ordinals = torch.arange(n, device=device), torch.arange(k, device=device)  # (n,), (max K,)
        where = self._chooser.places(ids, slots >= begins + len(lead), counts, k)  # (batch, max K), slots of anchors
        tokens = self.llm.embedding(ids)  # (batch, n, hidden_size)
        # What concepts start from, and what is read behind the segment: (batch, max K, hidden_size) each.
        if self.config.queries == "anchor":
            start = queries = torch.gather(tokens, 1, where[..., None].expand(-1, -1, tokens.shape[-1]))
        elif self.config.queries == "mean":
            start = queries = _pooled(tokens, slots - begins - len(lead), n - begins - len(lead), counts, k)
        else:
            eos = self.llm.embedding(torch.full_like(where, int(self.llm.tokenizer.eos_token_id)))
            start, queries = torch.zeros_like(eos), eos
        # (batch, max K), rotary positions of the queries
        after = where - begins if self.config.anchor_positions == "source" else n - begins + ordinals
        mask = torch.cat([slots >= begins, ordinals < counts], 1)  # (batch, n + max K)
        # Without a mask transformers takes positions that do not count on by one for sequences packed into one row.
        needed = self.config.anchor_positions == "source" or not bool(mask.all())
        hidden = self.decoder(
            inputs_embeds=torch.cat([tokens, queries], 1),
            attention_mask=mask.long() if needed else None,
            position_ids=torch.cat([(slots - begins).clamp_min(0), after], 1),
            use_cache=False,
        ).last_hidden_state[:, -k:]  # (batch, max K, hidden_size)
        normed = nn.functional.rms_norm(hidden.float(), (hidden.shape[-1],), eps=1e-6)  # the same shape, float32
        concepts: torch.Tensor = start.float() + self.config.scale * self.head(normed)
        return concepts

    def _sink_id(self) -> int:
        token = self.llm.tokenizer.bos_token_id
        return int(token if token is not None else self.llm.tokenizer.eos_token_id)


def _refuse_deep(config: CompressorConfig) -> None:
    if config.deep:
        raise ConfigurationError(
            "this is a compressor of deep concepts",
            got=f"entry layer {config.entry_layer}",
            expected="entry layer 0, the input embeddings",
            next_step="use DeepCompressor",
        )


def _pooled(
    tokens: torch.Tensor, place: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor, k: int
) -> torch.Tensor:
    """Means (batch, max K, hidden_size) of K even runs of each row's tokens.

    Args:
        tokens: Embeddings (batch, n, hidden_size).
        place: (batch, n), counted from each row's first token; negative in front of it.
        lengths: (batch, 1), tokens of each row.
        counts: (batch, 1), K of each row.
        k: The largest K.
    """
    run = torch.where(place >= 0, place * counts // lengths, k)
    member = nn.functional.one_hot(run, k + 1)[..., :k].to(tokens.dtype)
    sums = member.transpose(1, 2) @ tokens
    return sums / member.sum(1).clamp_min(1)[..., None]


def batches(
    window: Sequence[tuple[int, Sequence[int], int]], limit: int, *, mixed: int = 16
) -> Iterator[list[tuple[int, Sequence[int], int]]]:
    """Cut a window of (index, segment, K), sorted by length and K, into batches of at most `limit` positions.

    Most are rectangular; a batch mixes lengths only while it has fewer than `mixed` rows.
    """
    batch: list[tuple[int, Sequence[int], int]] = []
    for item in window:
        size = (len(batch) + 1) * (len(item[1]) + item[2])
        shape_changes = batch and (len(item[1]), item[2]) != (len(batch[-1][1]), batch[-1][2])
        if batch and (size > limit or (shape_changes and len(batch) >= mixed)):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch

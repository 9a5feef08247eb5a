"""One context and the ways to read it: what `ttft` times."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import reworded
from benchmarks.memory import Peak, cache_bytes
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import GenerationConfig
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.library import ConceptLibrary
from compllm_rag.prompt import ConceptSpan, PromptInputs, QAPrompt, Span, TextSpan, lay_out
from compllm_rag.store import DiskStore, MemoryStore

QUESTION = "What is the passage mostly about?"
CHUNK = 200  # source tokens


@dataclass(frozen=True)
class Setting:
    """How the context is read: `text`, `concepts` from a warm store, `cold`, or the `bound` of as many positions."""

    mode: str
    rate: float | None = None
    positions: int = 0

    def __str__(self) -> str:
        if self.mode == "bound":
            return f"bound, {self.positions} positions"
        return self.mode if self.rate is None else f"{self.mode} at rate {self.rate:g}"


class Case:
    """A context of one length and everything to read it with.

    Args:
        compressor: With the target LLM.
        sources: Texts the context is made of.
        length: Source tokens, about.
        rates: Source tokens per concept.
        folder: For the warm stores.
    """

    def __init__(
        self, compressor: Compressor, sources: list[str], length: int, rates: list[float], folder: Path
    ) -> None:
        self.compressor, self.llm = compressor, compressor.llm
        self.generator = LocalGenerator(self.llm, GenerationConfig(max_new_tokens=1))
        self.prompt = QAPrompt(self.llm.tokenizer)
        self.chunks = chunks_in(compressor, sources, length)
        # Text is cut up by the same class as concepts are, so that both sides remember passages alike.
        self.reader = ConceptLibrary(compressor, MemoryStore(self.llm.hidden_size))
        self.libraries: dict[float, ConceptLibrary] = {}
        for rate in rates:
            store = DiskStore(folder / f"{length}-{rate:g}", hidden_size=self.llm.hidden_size)
            self.libraries[rate] = ConceptLibrary(compressor, store, rate=rate)
            self.libraries[rate].ensure(self.chunks)
            store.flush()

    def run(self, setting: Setting, decode: int) -> dict[str, float]:
        """Seconds of each part, once; `decode` more tokens after the first are timed on their own."""
        self._wait()
        with Peak(self.llm.device) as peak:
            begun = time.perf_counter()
            bodies, compress_s = self._bodies(setting)
            fetched = time.perf_counter()
            inputs = self._inputs(setting, bodies)
            self._wait()
            laid_out = time.perf_counter()
            logits, cache = self.generator.prefill(inputs)
            token = logits.argmax(-1, keepdim=True)
            self._wait()
            ended = time.perf_counter()
            kv_bytes = cache_bytes(cache)
            per_token = self._decode(token, cache, decode)
        return {
            "positions": inputs.inputs_embeds.shape[1],
            "compress_s": compress_s,
            "fetch_s": fetched - begun - compress_s,
            "layout_s": laid_out - fetched,
            "prefill_s": ended - laid_out,
            "ttft_s": ended - begun,
            "per_token_s": per_token,
            "kv_bytes": kv_bytes,
            "peak_bytes": peak.bytes,
        }

    def first_fetch(self, setting: Setting) -> float:
        """Seconds to fetch passages that were not asked for before in this process, so that they are tokenised too."""
        begun = time.perf_counter()
        if setting.rate is None:
            for text in self.chunks:
                self.compressor.segmenter.split(text)
        else:
            library = ConceptLibrary(self.compressor, self.libraries[setting.rate].store, rate=setting.rate)
            for text in self.chunks:
                library.fetch(text, missing="error")
        return time.perf_counter() - begun

    def _bodies(self, setting: Setting) -> tuple[list[Span], float]:
        if setting.mode == "bound":
            return [], 0.0
        if setting.rate is None:
            return [TextSpan(self.reader.passage(text).ids, number) for number, text in enumerate(self.chunks)], 0.0
        library, compress_s = self.libraries[setting.rate], 0.0
        if setting.mode == "cold":
            library = ConceptLibrary(self.compressor, MemoryStore(self.llm.hidden_size), rate=setting.rate)
            begun = time.perf_counter()
            library.ensure(self.chunks)
            compress_s = time.perf_counter() - begun
        fetched = [library.fetch(text, missing="error") for text in self.chunks]
        spans: list[Span] = [ConceptSpan(f.concepts, n) for n, f in enumerate(fetched) if f.concepts is not None]
        return spans, compress_s

    def _inputs(self, setting: Setting, bodies: list[Span]) -> PromptInputs:
        if setting.mode == "bound":
            noise = torch.randn(1, setting.positions, self.llm.hidden_size, device=self.llm.device)
            return PromptInputs((noise * 0.02).to(self.llm.dtype), None, None, [[]])
        return lay_out([self.prompt.plan(QUESTION, [("", [body]) for body in bodies])], self.llm)

    @torch.inference_mode()
    def _decode(self, token: torch.Tensor, cache: Any, steps: int) -> float:
        """Seconds of a further token at this length of cache."""
        if steps == 0:
            return 0.0
        begun = time.perf_counter()
        for _ in range(steps):
            logits = self.llm.model(input_ids=token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
        self._wait()
        return (time.perf_counter() - begun) / steps

    def _wait(self) -> None:
        if self.llm.device.type == "cuda":
            torch.cuda.synchronize()


def chunks_in(compressor: ConceptCompressor, sources: list[str], length: int) -> list[str]:
    """Chunks of whole segments, about `length` source tokens in all; no segment occurs twice but by chance."""
    chunks: list[str] = []
    kept: list[int] = []
    total = 0
    for text in reworded(sources):
        for segment in compressor.spec.segmenter.split(text):
            kept += segment
            if len(kept) >= min(CHUNK, length - total):
                chunks.append(compressor.llm.tokenizer.decode(kept))
                total, kept = total + len(kept), []
            if total >= length:
                return chunks
    return chunks

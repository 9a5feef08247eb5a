"""What is known of a compressor without its weights: enough to cut texts up, name their records and check them.

Whoever only reads concepts loads no compressor. It is loaded on the first miss.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.config import CompressorConfig
from compllm_rag.errors import FingerprintMismatchError
from compllm_rag.models.llm import TargetLLM

if TYPE_CHECKING:
    from compllm_rag.compression.compressor import Compressor


@dataclass(frozen=True)
class ConceptSpec:
    """A kind of concepts.

    Attributes:
        config: Of the compressor that makes them.
        fingerprint: Identity of everything they depend on.
        segmenter: Cuts texts into what is compressed.
        hidden_size: Width of a concept.
        scale: RMS of the LLM's input embeddings, which concepts are measured against.
    """

    config: CompressorConfig
    fingerprint: str
    segmenter: Segmenter
    hidden_size: int
    scale: float


class DeferredCompressor:
    """A compressor that is loaded when something has to be compressed.

    Args:
        spec: What its concepts are.
        llm: The target LLM.
        load: Loads it.
    """

    def __init__(self, spec: ConceptSpec, llm: TargetLLM, load: Callable[[], Compressor]) -> None:
        self.spec, self.llm, self._load = spec, llm, load
        self._loaded: Compressor | None = None
        self._lock = threading.Lock()

    @property
    def loaded(self) -> bool:
        """Whether it was needed so far."""
        return self._loaded is not None

    def get(self) -> Compressor:
        """The compressor itself.

        Raises:
            FingerprintMismatchError: It is not the one that the spec describes.
            UnsupportedFormatError: Its files are damaged.
        """
        with self._lock:
            if self._loaded is None:
                made = self._load()
                if made.fingerprint != self.spec.fingerprint:
                    raise FingerprintMismatchError(
                        "compressor was changed since the storage was opened",
                        got=made.fingerprint[:16],
                        expected=self.spec.fingerprint[:16],
                        next_step="open the storage again",
                    )
                self._loaded = made
            return self._loaded


def embedding_rms(llm: TargetLLM) -> float:
    """Root mean square of the input embeddings, post-scale: the scale a trained compressor starts with.

    Taken once, by whoever creates the configuration: it is part of the identity, and must not depend on the dtype that
    some later machine computes in.
    """
    rows = min(llm.embedding.weight.shape[0], 4096)
    return float(llm.embed(range(rows)).float().pow(2).mean().sqrt())

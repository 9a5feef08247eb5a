"""A worker: the documents of a part in, a shard out. It holds the models and writes to the staging folder alone.

`PartEncoder` is a batch callable, as Ray Data's `map_batches` takes one, and knows nothing of Ray.
"""

from __future__ import annotations

import os
import platform
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from llama_index.core.schema import MetadataMode

from compllm_rag.errors import CompLLMError, WorkersFailedError
from compllm_rag.llamaindex.embedding_texts import EmbeddingTexts
from compllm_rag.llamaindex.node_parser import ConceptNodeParser
from compllm_rag.llamaindex.sharding.shards import ShardManifest, put_manifest, put_vectors, shard_store
from compllm_rag.llamaindex.sharding.staging import Staging
from compllm_rag.llamaindex.storage_library import library_of
from compllm_rag.llamaindex.storage_parts import load_embedder_of, load_own_compressor
from compllm_rag.models.device_memory import release_unused

# A part that kills every worker it is given to must end, and not go round for ever.
MOST_ATTEMPTS = 4
_LONGEST_REASON = 500
# Errors of the worker, not of its part: it would fail with all others as well.
_FATAL: tuple[type[Exception], ...] = (MemoryError, getattr(torch, "AcceleratorError", MemoryError))


class PartEncoder:
    """Encodes parts; loads its models once, on its GPU where it has one.

    Args:
        folder: The staging folder.

    Raises:
        StorageNotFoundError: This machine does not see the folder.
        FingerprintMismatchError, EmbedderMismatchError: The models here are not the storage's.
    """

    def __init__(self, folder: str) -> None:
        self.staging = Staging(Path(folder))
        job = self.staging.job()
        if job.device == "cpu":
            torch.set_num_threads(job.threads)
        self.manifest = job.storage
        options = {"dtype": job.dtype, "device": job.device}
        self.compressor = load_own_compressor(self.staging.folder, self.manifest, job.llm, None, options)
        self.manifest.check_compressor(self.compressor.spec.fingerprint, self.compressor.llm.source)
        self.embedder = load_embedder_of(self.manifest, job.embedder, None, options)
        self._texts = EmbeddingTexts(self.embedder)
        self.parser = ConceptNodeParser(self.compressor.spec.segmenter, self.manifest.ingest.chunk_size)

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
        """Encode parts, unless they are; an error of one is told in its row, so that the others go on.

        Args:
            batch: Keys of parts, as `part`.

        Returns:
            Columns with a row for each part: see `encode`, and `error`, empty where there was none.

        Raises:
            MemoryError, torch.AcceleratorError: The process has no memory left, or its GPU failed.
        """
        rows = list[dict[str, Any]]()
        for key in map(str, batch["part"]):
            made = {"part": key, "host": platform.node(), "pid": os.getpid(), "tokens": 0, "compressed": 0, "error": ""}
            try:
                made |= self.encode(key)
            except CompLLMError as error:
                made["error"] = f"{type(error).__name__}: {error}"
            except _FATAL:
                raise
            except Exception as error:  # noqa: BLE001 - of the embedder, say; whatever it is, it is told
                made["error"] = _described(error)
            rows.append(made)
        return {name: [row[name] for row in rows] for name in rows[0]}

    def encode(self, key: str) -> dict[str, int]:
        """Make the shard of a part, unless it is there.

        Returns:
            Source `tokens`, and units that were `compressed`; zeros where nothing was to be done.

        Raises:
            WorkersFailedError: The part was begun and not finished too often in this run.
        """
        if self.staging.has_shard(key):
            return {"tokens": 0, "compressed": 0}
        if self.staging.begin(key) > MOST_ATTEMPTS:
            raise WorkersFailedError(
                "workers were killed again and again while they encoded this part",
                got=f"{MOST_ATTEMPTS} times part {key[:16]}",
                next_step="give them more memory, or make smaller parts by --part-chars",
            )
        begun, busy = time.perf_counter(), time.process_time()
        nodes = self.parser.get_nodes_from_documents(self.staging.part(key))
        self._texts.begin()
        with self.staging.making_shard(key) as folder:
            vectors = self.embedder.get_text_embedding_batch(self._texts.of(nodes))
            digest = put_vectors(folder, vectors, self.manifest.dimension)
            with shard_store(folder, self.manifest) as store:
                library = library_of(self.compressor, store, self.manifest.ingest, None)
                done = library.ensure(node.get_content(MetadataMode.NONE) for node in nodes)
            put_manifest(
                folder,
                ShardManifest(
                    key=key,
                    nodes=[node.node_id for node in nodes],
                    vectors=digest,
                    segments=done.segments,
                    compressed=done.compressed,
                    source_tokens=done.source_tokens,
                    seconds=time.perf_counter() - begun,
                    cpu_s=time.process_time() - busy,
                    host=platform.node(),
                    pid=os.getpid(),
                ),
            )
        release_unused(self.compressor.llm.device)
        return {"tokens": done.source_tokens, "compressed": done.compressed}


def _described(error: Exception) -> str:
    """An error that nobody expected, in one line: its class, what it says, and where it was raised."""
    reason = " ".join(str(error).split())[:_LONGEST_REASON] or "no reason told"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {reason} (in {last.name}, {Path(last.filename).name}:{last.lineno})"

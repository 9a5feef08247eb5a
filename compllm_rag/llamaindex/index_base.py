"""What a `ConceptIndex` is made of; asking (`index_asking`) and writing (`index_writing`) stand on it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import TransformComponent
from llama_index.core.storage.docstore.types import RefDocInfo

from compllm_rag.catalog.accounts import Accounts
from compllm_rag.catalog.keywords import KeywordIndex
from compllm_rag.catalog.origins import Origins
from compllm_rag.catalog.pending import PendingChunks
from compllm_rag.compression.spec import ConceptCompressor, DeferredCompressor
from compllm_rag.config import GenerationConfig, IngestConfig
from compllm_rag.generation.address import generator_at
from compllm_rag.generation.base import Generator
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.generation.reuse import PrefixCache
from compllm_rag.handles import ProcessBound
from compllm_rag.library import EnsureReport
from compllm_rag.llamaindex.embedding import embedder_identity
from compllm_rag.llamaindex.embedding_texts import EmbeddingTexts
from compllm_rag.llamaindex.index_struct import ConceptIndexStruct, ConceptStorageContext
from compllm_rag.llamaindex.kvstore import CatalogDocumentStore, CatalogKVStore
from compllm_rag.llamaindex.node_parser import ConceptNodeParser
from compllm_rag.llamaindex.observer import AccountsObserver
from compllm_rag.llamaindex.reentrant_lock import ReentrantLock
from compllm_rag.llamaindex.ref_docs import ref_doc_info
from compllm_rag.llamaindex.splitting import Splitting
from compllm_rag.llamaindex.stock import refused
from compllm_rag.llamaindex.storage_library import library_of
from compllm_rag.llamaindex.tracked_store import NodeStore, TrackedVectorStore
from compllm_rag.llamaindex.uploads import UploadQueue
from compllm_rag.metrics import Metrics, Work
from compllm_rag.storage.manifest import Manifest
from compllm_rag.store.base import ConceptStore


class IndexBase(ProcessBound, VectorStoreIndex):
    """The parts of a `ConceptIndex`, joined; its arguments are described there."""

    _opened_by = "open it again there: ConceptIndex.load(storage_dir, read_only=True)"

    def __init__(
        self,
        compressor: ConceptCompressor | DeferredCompressor,
        store: ConceptStore,
        vector_store: NodeStore,
        embedder: BaseEmbedding,
        *,
        config: IngestConfig | None = None,
        generation: GenerationConfig | None = None,
        generator: Generator | str | None = None,
        storage_dir: Path | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        self.config, self.storage_dir, self.store = config or IngestConfig(), storage_dir, store
        self.manifest = manifest or Manifest.of(
            compressor.spec, compressor.llm, *embedder_identity(embedder), vector_store.dim, self.config
        )
        kvstore = CatalogKVStore(vector_store.catalog)
        values = kvstore.values
        self.accounts, self.origins, self.pending = Accounts(values), Origins(values), PendingChunks(values)
        self.library = library_of(compressor, store, self.config, self.accounts.choices)
        # What was given as an address is ours to close.
        self._own_generator = (
            generator_at(generator, compressor.llm, generation, halves=compressor.halves)
            if isinstance(generator, str)
            else None
        )
        generator = self._own_generator if isinstance(generator, str) else generator
        self.generator: Generator = generator or LocalGenerator(
            compressor.llm, generation, halves=compressor.halves, prefixes=PrefixCache()
        )
        self._generation = generation or self.generator.config
        self.faiss: NodeStore = vector_store
        self.parser = ConceptNodeParser(self.library.spec.segmenter, self.config.chunk_size, llm=compressor.llm.source)
        self.splitting = Splitting(vector_store.catalog, self.parser)
        vector_store.observed_by(AccountsObserver(self.library, self.accounts, self.pending))
        self._writing, self._kept = ReentrantLock(), Work()
        self._texts = EmbeddingTexts(embedder)
        self.settled = EnsureReport(0, 0, 0, 0, 0, 0.0)  # what the last budget took
        self._completing = False  # whether chunks that lack concepts get them before the next commit
        self._uploads: UploadQueue | None = None
        self._keywords: KeywordIndex | None = None
        super().__init__(
            index_struct=ConceptIndexStruct(storage_dir=str(storage_dir.absolute()) if storage_dir else ""),
            embed_model=embedder,
            storage_context=ConceptStorageContext.from_defaults(
                vector_store=vector_store, docstore=CatalogDocumentStore(kvstore)
            ),
            transformations=[self.parser],
        )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse what LlamaIndex's constructor takes and this one does not, by name."""
        known = inspect.signature(cls.__init__).parameters
        unknown = ["nodes"] if args and isinstance(args[0], list | tuple) else [k for k in kwargs if k not in known]
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            raise refused(*unknown, known=set(known) - {"self"})
        return super().__new__(cls)

    def use_transformations(self, transformations: Sequence[TransformComponent]) -> None:
        """From now on make nodes of documents by these, in place of the `ConceptNodeParser`.

        Chunks that are no runs of whole segments work as well; an edit then compresses more of them again. Documents
        that were split otherwise count as changed when they are brought in next.

        Args:
            transformations: LlamaIndex node parsers, extractors and the like; `[index.parser]` is the default again.
        """
        self.splitting.use(transformations)
        self._transformations = self.splitting.transformations

    @property
    def ref_doc_info(self) -> dict[str, RefDocInfo]:
        """The nodes of every document, with its metadata."""
        if isinstance(self.faiss, TrackedVectorStore):
            return self.faiss.ref_doc_info()
        return ref_doc_info(self.faiss.catalog)

    @property
    def compressor(self) -> ConceptCompressor:
        """The compressor all concepts in the storage come from; loaded now if nothing was compressed before."""
        return self.library.compressor

    @property
    def embedder(self) -> BaseEmbedding:
        """The embedder all vectors in the storage come from."""
        return self._embed_model

    @property
    def generation(self) -> GenerationConfig:
        """Limits of the answers."""
        return self._generation

    @property
    def metrics(self) -> Metrics:
        """What this process measured; `metrics` in `stats` is what the storage keeps."""
        return self.library.metrics

"""`ConceptIndex`: a VectorStoreIndex whose query engines read concepts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack, cast

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.indices.registry import INDEX_STRUCT_TYPE_TO_INDEX_CLASS
from llama_index.core.schema import Document
from llama_index.core.vector_stores.types import BasePydanticVectorStore

from compllm_rag.catalog.measures import storage_families
from compllm_rag.errors import ConfigurationError
from compllm_rag.generation.address import check_generator
from compllm_rag.generation.base import Generator
from compllm_rag.llamaindex.index_asking import IndexAsking
from compllm_rag.llamaindex.index_struct import TYPE, ConceptIndexStruct
from compllm_rag.llamaindex.index_writing import IndexWriting
from compllm_rag.llamaindex.opening import IndexParts, create_index, load_index
from compllm_rag.llamaindex.options import CreateOptions, LoadOptions
from compllm_rag.llamaindex.other_store import GarbageReport, adopt, collect_garbage, parts_beside
from compllm_rag.llamaindex.stock import StockOptions, check_folder, creating, loading
from compllm_rag.llamaindex.uploads import UploadQueue
from compllm_rag.metrics import exposition
from compllm_rag.storage.namespaces import existing_namespace, namespace_folder, prepare_namespace
from compllm_rag.storage.stats import stats_fields
from compllm_rag.store.compaction import CompactReport
from compllm_rag.store.memory import MemoryStore
from compllm_rag.store.redis import RedisStore

if TYPE_CHECKING:
    from compllm_rag.storage.compaction import StorageCompaction
    from compllm_rag.storage.verification import StorageCheck


class ConceptIndex(IndexAsking, IndexWriting):
    """Vectors, text and concepts of a corpus, kept together and committed together.

    Build one with `from_documents`, `create` or `load`; the constructor joins parts that are made already.

    Args:
        compressor: Makes concepts; a deferred one is loaded on the first miss.
        store: Keeps them.
        vector_store: Keeps vectors and text.
        embedder: LlamaIndex embedder of the vectors.
        config: Rate, chunk size and namespace.
        generation: Limits of the answers; None takes the generator's.
        generator: Runs the target LLM; None runs it in this process, `vllm:http://HOST:PORT` on a server.
        storage_dir: Where it all lies; None when it lies in memory.
        manifest: Of the storage; None describes the parts given.
    """

    @classmethod
    def from_documents(  # type: ignore[override]
        cls, documents: Iterable[Document], storage_dir: str | Path | None = None, **options: Any
    ) -> Self:
        """Ingest documents into a new or existing storage.

        Args:
            documents: LlamaIndex documents; a stream is consumed batch by batch.
            storage_dir: A folder; None keeps everything in memory.
            **options: See `create`, and `progress` of `ingest`.

        Raises:
            EmptyCorpusError: There are no documents.
            StorageMismatchError: The storage exists and was made with other settings.
        """
        progress = options.pop("progress", None)
        index = cls.create(storage_dir, **options)
        try:
            index.ingest(documents, progress=progress, show_progress=bool(options.get("show_progress")))
        except BaseException:
            index.close()
            raise
        return index

    @classmethod
    def create(
        cls,
        storage_dir: str | Path | None = None,
        *,
        namespace: str | None = None,
        generator: Generator | str | None = None,
        resume: bool = True,
        **options: Unpack[CreateOptions],
    ) -> Self:
        """Make an empty storage, or open an existing one for writing.

        Args:
            storage_dir: A folder; None keeps everything in memory.
            namespace: Tenant; those of one folder share nothing. None takes the folder's own.
            generator: Runs the target LLM; None runs it in this process, `vllm:http://HOST:PORT` on a server.
            resume: Go on, in the background, with uploads that an earlier process left without concepts.
            **options: See `llamaindex.opening.create_index`, and for what it raises; and of LlamaIndex's
                `transformations`, `embed_model`, `insert_batch_size`, `callback_manager`, `show_progress`, `use_async`,
                see `llamaindex.stock.StockOptions`.

        Raises:
            ConfigurationError: An option that is not heeded, such as `storage_context`.
        """
        return cls.create_for(None, storage_dir, namespace=namespace, generator=generator, resume=resume, **options)

    @classmethod
    def create_for(
        cls,
        longest: str | None,
        storage_dir: str | Path | None = None,
        *,
        namespace: str | None = None,
        generator: Generator | str | None = None,
        resume: bool = True,
        **options: Unpack[CreateOptions],
    ) -> Self:
        """The same for nodes that others have cut: a new storage has units that hold the longest of them.

        Args:
            longest: Text of the longest node; None where no node is known.
            storage_dir: See `create`.
            namespace: See `create`.
            generator: See `create`.
            resume: See `create`.
            **options: See `create`.

        Raises:
            ConfigurationError: See `create`.
        """
        storage_dir = None if storage_dir is None else check_folder(storage_dir)
        check_generator(generator)
        own: dict[str, Any] = {**options}
        stock = creating(own)
        if longest is not None:
            own["holds"] = longest
        if storage_dir is None:
            parts = create_index(None, namespace=namespace, **own)
            return cls.of(parts, generator=generator)._with(stock)
        folder = namespace_folder(storage_dir, namespace)
        prepare_namespace(Path(storage_dir), folder)
        parts = create_index(folder, namespace=namespace, **own)
        return cls.of(parts, generator=generator, resume=resume)._with(stock)

    @classmethod
    def load(
        cls,
        storage_dir: str | Path,
        *,
        namespace: str | None = None,
        generator: Generator | str | None = None,
        resume: bool = True,
        **options: Unpack[LoadOptions],
    ) -> Self:
        """Open a storage that exists.

        Args:
            storage_dir: Its folder.
            namespace: Tenant; None takes the folder's own.
            generator: Runs the target LLM; None runs it in this process, `vllm:http://HOST:PORT` on a server.
            resume: Go on, in the background, with uploads that an earlier process left without concepts.
            **options: See `llamaindex.opening.load_index`, and for what it raises; and those of LlamaIndex's that
                `create` takes.

        Raises:
            ConfigurationError: An option that is not heeded.
        """
        storage_dir = check_folder(storage_dir)
        check_generator(generator)
        own: dict[str, Any] = {**options}
        stock = loading(own)
        parts = load_index(existing_namespace(storage_dir, namespace), **own)
        return cls.of(parts, generator=generator, resume=resume)._with(stock)

    @classmethod
    def from_vector_store(
        cls,
        vector_store: BasePydanticVectorStore,
        embed_model: str | BaseEmbedding | None = None,
        *,
        storage_dir: str | Path | None = None,
        namespace: str | None = None,
        generator: Generator | str | None = None,
        resume: bool = True,
        read_only: bool = False,
        **options: Any,
    ) -> Self:
        """An index whose vectors and text lie in another vector store (Qdrant, Chroma, ...), and its concepts here.

        Args:
            vector_store: Of LlamaIndex, with nodes or without; those it has are known after `adopt`.
            embed_model: The embedder of its vectors; None takes the default.
            storage_dir: Folder of the concepts, made when missing; None keeps them in memory.
            namespace: Tenant; None takes the folder's own.
            generator: Runs the target LLM; None runs it in this process, `vllm:http://HOST:PORT` on a server.
            resume: Go on, in the background, with uploads that an earlier process left without concepts.
            read_only: Write no concepts.
            **options: See `create`.

        Raises:
            ConfigurationError: This is no vector store that concepts can be kept beside, or an option is not heeded.
            StorageMismatchError: The storage was made for another kind of store, or with other settings.
        """
        if embed_model is not None:
            options["embed_model"] = embed_model
        storage_dir = None if storage_dir is None else check_folder(storage_dir)
        check_generator(generator)
        stock = creating(options)
        parts = parts_beside(vector_store, storage_dir, namespace=namespace, read_only=read_only, **options)
        return cls.of(parts, generator=generator, resume=resume and storage_dir is not None)._with(stock)

    @classmethod
    def of(cls, parts: IndexParts, *, generator: Generator | str | None = None, resume: bool = False) -> Self:
        """Join parts that are open.

        Args:
            parts: See `opening.create_index` and `opening.load_index`.
            generator: Runs the target LLM; None runs it in this process, `vllm:http://HOST:PORT` on a server.
            resume: Go on, in the background, with uploads that an earlier process left without concepts.
        """
        index = cls(
            parts.compressor,
            parts.store,
            parts.vectors,
            parts.embedder,
            config=parts.manifest.ingest,
            generation=parts.generation,
            generator=generator,
            storage_dir=parts.folder,
            manifest=parts.manifest,
        )
        if resume and not parts.vectors.catalog.read_only and len(index.pending):
            UploadQueue(index)
        return index

    def _with(self, stock: StockOptions) -> Self:
        """Heed what was asked for in LlamaIndex's words."""
        self._insert_batch_size, self._show_progress = stock.insert_batch_size, stock.show_progress
        self._use_async = stock.use_async
        if stock.callback_manager is not None:
            self._callback_manager = self._embed_model.callback_manager = stock.callback_manager
        if stock.transformations is not None:
            self.use_transformations(stock.transformations)
        return self

    def verify(
        self, *, deep: bool = False, progress: Callable[[str, float | None], None] | None = None
    ) -> StorageCheck:
        """Look for damage in the storage, as committed; see `verify_storage`.

        Raises:
            ConfigurationError: The index lies in memory.
        """
        from compllm_rag.storage.verification import verify_storage

        return verify_storage(self._folder(), deep=deep, progress=progress)

    def compact(self, *, progress: Callable[[str, float | None], None] | None = None) -> StorageCompaction:
        """Reclaim what was deleted; see `compact_storage`.

        Raises:
            ConfigurationError: The index lies in memory.
            StoreLockedError: There is uncommitted work, here or elsewhere.
        """
        from compllm_rag.storage.compaction import compact_storage

        return compact_storage(self._folder(), progress=progress)

    def collect_garbage(self, *, progress: Callable[[str, float | None], None] | None = None) -> GarbageReport:
        """Drop the concepts that no node refers to, nodes included that were deleted in another vector store directly.

        Raises:
            ConfigurationError: That store cannot list its nodes.
            StoreLockedError: There is uncommitted work, here or elsewhere.
        """
        return collect_garbage(self, progress)

    def adopt(self, *, progress: Callable[[str, float | None], None] | None = None) -> int:
        """Make the concepts of nodes that others brought into the vector store; tells how many there were.

        Raises:
            ConfigurationError: The vectors lie in the storage, or their store cannot list its nodes or keeps no text.
        """
        return adopt(self, progress)

    def reclaim(self, progress: Callable[[str, float | None], None] | None = None) -> CompactReport:
        """Drop concepts that nothing refers to, on the disk (see `compact`) or in memory."""
        if isinstance(self.store, MemoryStore) or (isinstance(self.store, RedisStore) and self.storage_dir is None):
            return self.store.compact(self.accounts.references.live, progress=progress)
        return self.compact(progress=progress).concepts

    def _folder(self) -> Path:
        if self.storage_dir is None:
            raise ConfigurationError("this index lies in memory", next_step="give it a storage_dir")
        return self.storage_dir

    def stats(self) -> dict[str, Any]:
        """What the storage holds, as plain values."""
        return stats_fields(
            self.accounts,
            len(self.pending),
            self.store.stats(),
            self.manifest,
            trained=self.library.spec.config.trained,
        )

    def to_prometheus(self) -> str:
        """Both as Prometheus text."""
        families = self.metrics.families() + storage_families(self.stats())
        return exposition(families, {"namespace": self.config.namespace})

    def close(self, *, drain: bool = False) -> None:
        """Close files; what was not committed is dropped.

        Args:
            drain: Wait until all that was uploaded has its concepts; else the next open goes on with it.
        """
        if self._uploads is not None:
            self._uploads.close(drain=drain)
            self._keep_work()
        if self._own_generator is not None:
            self._own_generator.close()
        self.faiss.close()
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _opened(index_struct: ConceptIndexStruct, storage_context: object, **options: Any) -> ConceptIndex:
    """What `load_index_from_storage` calls for the index of a `ConceptIndexStruct`; options as of `load`."""
    return ConceptIndex.load(index_struct.folder(), **options)


INDEX_STRUCT_TYPE_TO_INDEX_CLASS[TYPE] = cast(Any, _opened)

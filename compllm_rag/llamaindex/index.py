"""`ConceptIndex`: a VectorStoreIndex whose query engines read concepts."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack, cast

from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.chat_engine.types import BaseChatEngine, ChatMode
from llama_index.core.data_structs.data_structs import IndexDict
from llama_index.core.indices.registry import INDEX_STRUCT_TYPE_TO_INDEX_CLASS
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import BaseNode, Document, ImageNode, IndexNode, MetadataMode, TransformComponent
from llama_index.core.storage.docstore.types import RefDocInfo
from llama_index.core.utils import iter_batch
from llama_index.core.vector_stores.types import BasePydanticVectorStore

from compllm_rag.catalog.accounts import Accounts
from compllm_rag.catalog.keywords import KeywordIndex
from compllm_rag.catalog.measures import storage_families
from compllm_rag.catalog.origins import Origins
from compllm_rag.catalog.pending import PendingChunks
from compllm_rag.compression.spec import ConceptCompressor, DeferredCompressor
from compllm_rag.config import GenerationConfig, IngestConfig
from compllm_rag.errors import CompLLMError, ConfigurationError
from compllm_rag.generation.base import Generator
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.generation.reuse import PrefixCache
from compllm_rag.handles import ProcessBound
from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.chat.options import chat_engine
from compllm_rag.llamaindex.embedding import embedder_identity
from compllm_rag.llamaindex.embedding_texts import EmbeddingTexts
from compllm_rag.llamaindex.engines import citation_engine, query_engine, sub_question_engine
from compllm_rag.llamaindex.heeded import refuse_options, update_options
from compllm_rag.llamaindex.index_struct import TYPE, ConceptIndexStruct, ConceptStorageContext
from compllm_rag.llamaindex.ingest import IngestReport, Progress, changed_documents, ingest_documents
from compllm_rag.llamaindex.kvstore import CatalogDocumentStore, CatalogKVStore
from compllm_rag.llamaindex.llm import ConceptLLM
from compllm_rag.llamaindex.node_parser import ConceptNodeParser
from compllm_rag.llamaindex.observer import AccountsObserver
from compllm_rag.llamaindex.opening import IndexParts, create_index, load_index
from compllm_rag.llamaindex.options import CreateOptions, LoadOptions
from compllm_rag.llamaindex.other_store import GarbageReport, adopt, collect_garbage, parts_beside
from compllm_rag.llamaindex.reentrant_lock import ReentrantLock
from compllm_rag.llamaindex.ref_docs import ref_doc_info
from compllm_rag.llamaindex.retrieval import hybrid_retriever
from compllm_rag.llamaindex.retriever import OPTIONS as RETRIEVER_OPTIONS
from compllm_rag.llamaindex.retriever import ConceptRetriever
from compllm_rag.llamaindex.retrievers import ConceptBM25Retriever, HybridRetriever, keyword_index
from compllm_rag.llamaindex.sound import sound_documents, sound_nodes
from compllm_rag.llamaindex.splitting import Splitting
from compllm_rag.llamaindex.stock import StockOptions, bar, check_folder, creating, loading, refused
from compllm_rag.llamaindex.synthesizer import ConceptSynthesizer
from compllm_rag.llamaindex.tracing import traced_ensure
from compllm_rag.llamaindex.tracked_store import NodeStore, TrackedVectorStore
from compllm_rag.llamaindex.uploads import UploadQueue, UploadReceipt
from compllm_rag.metrics import Metrics, Work, exposition
from compllm_rag.storage.manifest import Manifest
from compllm_rag.storage.namespaces import existing_namespace, namespace_folder, prepare_namespace
from compllm_rag.storage.stats import stats_fields
from compllm_rag.store.base import ConceptStore
from compllm_rag.store.compaction import CompactReport
from compllm_rag.store.memory import MemoryStore

if TYPE_CHECKING:
    from llama_index.core.llms.llm import LLM
    from llama_index.core.query_engine import CitationQueryEngine, SubQuestionQueryEngine
    from llama_index.core.question_gen.types import BaseQuestionGenerator
    from llama_index.core.tools import QueryEngineTool

    from compllm_rag.storage.compaction import StorageCompaction
    from compllm_rag.storage.verification import StorageCheck

logger = logging.getLogger(__name__)


class ConceptIndex(ProcessBound, VectorStoreIndex):
    """Vectors, text and concepts of a corpus, kept together and committed together.

    Build one with `from_documents`, `create` or `load`; the constructor joins parts that are made already.

    Args:
        compressor: Makes concepts; a deferred one is loaded on the first miss.
        store: Keeps them.
        vector_store: Keeps vectors and text.
        embedder: LlamaIndex embedder of the vectors.
        config: Rate, chunk size and namespace.
        generation: Limits of the answers; None takes the generator's.
        generator: Runs the target LLM; None runs it in this process.
        storage_dir: Where it all lies; None when it lies in memory.
        manifest: Of the storage; None describes the parts given.
    """

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
        generator: Generator | None = None,
        storage_dir: Path | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        self.config, self.storage_dir, self.store = config or IngestConfig(), storage_dir, store
        self.manifest = manifest or Manifest.of(
            compressor.spec, compressor.llm, *embedder_identity(embedder), vector_store.dim, self.config
        )
        self.library = ConceptLibrary(compressor, store, rate=self.config.rate, namespace=self.config.namespace)
        self.generator: Generator = generator or LocalGenerator(
            compressor.llm, generation, halves=compressor.halves, prefixes=PrefixCache()
        )
        self._generation = generation or self.generator.config
        self.faiss: NodeStore = vector_store
        self.parser = ConceptNodeParser(self.library.spec.segmenter, self.config.chunk_size, llm=compressor.llm.source)
        self.splitting = Splitting(vector_store.catalog, self.parser)
        kvstore = CatalogKVStore(vector_store.catalog)
        values = kvstore.values
        self.accounts, self.origins, self.pending = Accounts(values), Origins(values), PendingChunks(values)
        vector_store.observed_by(AccountsObserver(self.library, self.accounts, self.pending))
        self._writing, self._kept = ReentrantLock(), Work()
        self._texts = EmbeddingTexts(embedder)
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
            raise refused(unknown[0], set(known) - {"self"})
        return super().__new__(cls)

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
        generator: Generator | None = None,
        resume: bool = True,
        **options: Unpack[CreateOptions],
    ) -> Self:
        """Make an empty storage, or open an existing one for writing.

        Args:
            storage_dir: A folder; None keeps everything in memory.
            namespace: Tenant; those of one folder share nothing. None takes the folder's own.
            generator: Runs the target LLM; None runs it in this process.
            resume: Go on, in the background, with uploads that an earlier process left without concepts.
            **options: See `llamaindex.opening.create_index`, and for what it raises; and of LlamaIndex's
                `transformations`, `embed_model`, `insert_batch_size`, `callback_manager`, `show_progress`, `use_async`,
                see `llamaindex.stock.StockOptions`.

        Raises:
            ConfigurationError: An option that is not heeded, such as `storage_context`.
        """
        storage_dir = None if storage_dir is None else check_folder(storage_dir)
        own: dict[str, Any] = {**options}
        stock = creating(own)
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
        generator: Generator | None = None,
        resume: bool = True,
        **options: Unpack[LoadOptions],
    ) -> Self:
        """Open a storage that exists.

        Args:
            storage_dir: Its folder.
            namespace: Tenant; None takes the folder's own.
            generator: Runs the target LLM; None runs it in this process.
            resume: Go on, in the background, with uploads that an earlier process left without concepts.
            **options: See `llamaindex.opening.load_index`, and for what it raises; and those of LlamaIndex's that
                `create` takes.

        Raises:
            ConfigurationError: An option that is not heeded.
        """
        storage_dir = check_folder(storage_dir)
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
        generator: Generator | None = None,
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
            generator: Runs the target LLM; None runs it in this process.
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
        stock = creating(options)
        parts = parts_beside(vector_store, storage_dir, namespace=namespace, read_only=read_only, **options)
        return cls.of(parts, generator=generator, resume=resume and storage_dir is not None)._with(stock)

    @classmethod
    def of(cls, parts: IndexParts, *, generator: Generator | None = None, resume: bool = False) -> Self:
        """Join parts that are open.

        Args:
            parts: See `opening.create_index` and `opening.load_index`.
            generator: Runs the target LLM; None runs it in this process.
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

    def ingest(
        self,
        documents: Iterable[Document],
        *,
        progress: Progress | None = None,
        within: Iterable[str | Path] = (),
        prune: bool = False,
        show_progress: bool = False,
    ) -> IngestReport:
        """Bring documents into the storage: new ones added, changed ones replaced, others left alone.

        Only chunks that changed are embedded again, only segments that changed are compressed again. Work is
        committed about once a minute and at the end; an interrupted run is taken up by calling this again.

        Args:
            documents: A stream, consumed batch by batch; or a single document.
            progress: Called with a running report after each batch.
            within: The files and folders that the documents come from, as given to `load_documents`; where each came
                from is remembered for `prune`.
            prune: At the end, delete documents that came from within these paths and are not there any more.
            show_progress: Show a bar on standard error.

        Raises:
            ConfigurationError: `prune` without `within`, or a document that cannot be kept (see `llamaindex.metadata`).
            EmptyCorpusError: There are no documents at all; nothing is pruned then.
            PruneRefusedError: Not every file could be looked at; what was read is kept, and nothing is deleted.
            StoreLockedError: Another process writes, or compacts.
        """
        with bar(self, documents, progress, show_progress) as report:
            return ingest_documents(self, documents, progress=report, within=within, prune=prune)

    async def aingest(self, documents: Iterable[Document], **options: Any) -> IngestReport:
        """`ingest` in a thread; options as of it."""
        return await asyncio.to_thread(self.ingest, documents, **options)

    @property
    def uploads(self) -> UploadQueue:
        """The queue of this index; started on first use, with what earlier processes left to do."""
        if self._uploads is None:
            UploadQueue(self)
        return cast(UploadQueue, self._uploads)

    def attach(self, queue: UploadQueue) -> None:
        """Make a queue the one of this index; it does so itself.

        Raises:
            ConfigurationError: There is another.
        """
        if self._uploads is not None:
            raise ConfigurationError("this index has an upload queue already", next_step="use `index.uploads`")
        self._uploads = queue

    def upload(self, documents: Iterable[Document]) -> UploadReceipt:
        """Bring documents in without waiting for their concepts; see `UploadQueue.put`."""
        return self.uploads.put(documents)

    async def aupload(self, documents: Iterable[Document]) -> UploadReceipt:
        """`upload` in a thread."""
        return await asyncio.to_thread(self.upload, documents)

    @property
    def llm(self) -> ConceptLLM:
        """The target LLM of the storage as a LlamaIndex LLM, for components that want one."""
        return ConceptLLM(self.generator)

    def as_query_engine(self, llm: LLM | None = None, **kwargs: Any) -> RetrieverQueryEngine:  # type: ignore[override]
        """A query engine that reads concepts.

        Args:
            llm: None or the index's own `llm`, also with settings (`ConceptLLM(index.generator, temperature=0.7)`) or
                as a structured one: no other can read its concepts.
            **kwargs: Of `ConceptSynthesizer` (`mode`, `streaming`, `missing`, `overflow`, `choose`,
                `text_qa_template`, `refine_template`, `response_mode`, `output_cls`, `generation`, `callback_manager`),
                `response_synthesizer`, `node_postprocessors`, and of LlamaIndex's `VectorIndexRetriever`
                (`similarity_top_k`, `filters`, ...); `retrieval` (`vector`, `bm25` or `hybrid`, with the options of
                that retriever) or `retriever`, any other that gives nodes, such as an AutoMergingRetriever. `use_async`
                is allowed and changes nothing: prompts of one answer are read one after the other.

        Raises:
            ConfigurationError: An option that nothing here would heed, such as another `llm`, or a response mode that
                concepts cannot be read in.
        """
        return query_engine(self, llm, kwargs)

    def as_citation_engine(
        self, *, citation_chunk_size: int | None = None, citation_chunk_overlap: int | None = None, **options: Any
    ) -> CitationQueryEngine:
        """LlamaIndex's CitationQueryEngine, reading concepts; see `llamaindex.engines.citation_engine`.

        Args:
            citation_chunk_size: Most tokens of a source. None takes the retrieved nodes as they are; smaller sources
                are compressed within the query.
            citation_chunk_overlap: Tokens that neighbouring sources share, where nodes are cut; None takes a tenth.
            **options: Of `as_query_engine`.
        """
        return citation_engine(
            self,
            citation_chunk_size=citation_chunk_size,
            citation_chunk_overlap=citation_chunk_overlap,
            options=options,
        )

    def as_sub_question_engine(
        self,
        tools: Sequence[QueryEngineTool] | None = None,
        *,
        question_gen: BaseQuestionGenerator | None = None,
        verbose: bool = False,
        **options: Any,
    ) -> SubQuestionQueryEngine:
        """LlamaIndex's SubQuestionQueryEngine with the index's LLM; see `llamaindex.engines.sub_question_engine`.

        Args:
            tools: What answers sub-questions, such as the query engines of several indexes; None takes one over this.
            question_gen: Splits questions up; None lets the index's LLM do it (extra `structured`).
            verbose: Print sub-questions and their answers.
            **options: Of `as_query_engine`, where there are no `tools`.
        """
        return sub_question_engine(self, tools, question_gen=question_gen, verbose=verbose, options=options)

    def as_chat_engine(self, chat_mode: ChatMode | str = "best", llm: Any = None, **kwargs: Any) -> BaseChatEngine:
        """A chat engine that reads concepts.

        Passages stand as concepts behind the earlier turns, right in front of the newest question, so that the
        beginning of the prompt is that of the turn before and its KV cache is gone on with.

        Args:
            chat_mode: `best` or `condense_plus_context`: look for what the message means within the conversation, and
                answer the message; `context`: look for the message as it is; `condense_question`: answer the
                condensed question alone, without the conversation; `simple`: no passages.
            llm: Leave it out: only the storage's own LLM can read its concepts. `simple` takes any.
            **kwargs: `memory` (any of LlamaIndex's), `chat_history`, `system_prompt` or `prefix_messages`,
                `context_prompt` (the newest user turn, with `{context_str}`), `condense_prompt`, `condense_llm` (any),
                `skip_condense`, `verbose`; `generation`, `mode`, `missing`, `overflow`, `choose`,
                `node_postprocessors`, `callback_manager` and those of the retriever as in `as_query_engine`.
                `streaming` and `use_async` are allowed and change nothing: call `stream_chat`, `achat`, `astream_chat`.

        Raises:
            ConfigurationError: A mode, an LLM or an option that nothing here would heed.
        """
        return chat_engine(self, chat_mode, llm, kwargs, RETRIEVER_OPTIONS)

    @property
    def generation(self) -> GenerationConfig:
        """Limits of the answers."""
        return self._generation

    @property
    def keywords(self) -> KeywordIndex:
        """The words of all nodes, for BM25; made anew by the first search after the nodes have changed.

        Raises:
            ConfigurationError: bm25s is not installed.
        """
        if isinstance(self.faiss, TrackedVectorStore):
            raise ConfigurationError(
                "words are searched in text that lies in the storage",
                got=f"text in {type(self.faiss.client).__name__}",
                next_step="use that store's own search by words, or your retriever: as_query_engine(retriever=...)",
            )
        if self._keywords is None:
            self._keywords = keyword_index(self.faiss.catalog)
        return self._keywords

    def as_bm25_retriever(self, **options: Any) -> ConceptBM25Retriever:
        """A retriever by words: for names, numbers and rare terms; no embedder is asked.

        Args:
            **options: `similarity_top_k`, `filters`, `doc_ids`, `node_ids`; see `ConceptBM25Retriever`.

        Raises:
            ConfigurationError: bm25s is not installed.
        """
        return ConceptBM25Retriever(self.keywords, **options)

    def as_hybrid_retriever(self, **options: Any) -> HybridRetriever:
        """A retriever by vectors and words, joined by reciprocal rank fusion; no LLM is asked.

        Args:
            **options: `similarity_top_k`, `filters`, `doc_ids`, `node_ids`; `candidates`, how many nodes each of both
                gives (4 times `similarity_top_k`, and 20 at least); `weights`, of vectors and of words.

        Raises:
            ConfigurationError: A number makes no sense, or bm25s is not installed.
        """
        return hybrid_retriever(self, **options)

    def as_retriever(self, **kwargs: Any) -> ConceptRetriever:
        """A retriever over all nodes of the index; options as of LlamaIndex's `VectorIndexRetriever`.

        Raises:
            ConfigurationError: An option that it does not have.
        """
        given = {"callback_manager": self._callback_manager, "object_map": self._object_map}
        return ConceptRetriever(self, **{**given, **kwargs})

    def as_synthesizer(self, **options: Any) -> ConceptSynthesizer:
        """The synthesizer of this index; options as of `ConceptSynthesizer`."""
        options.setdefault("generation", self._generation)
        return ConceptSynthesizer(self.library, self.generator, queued=self.pending.among, **options)

    def _add_nodes_to_index(
        self,
        index_struct: IndexDict,
        nodes: Sequence[BaseNode],
        show_progress: bool = False,
        later: bool = False,
        **insert_kwargs: Any,
    ) -> None:
        """Concepts first, unless they are there already or to be made `later`; then vector and text."""
        if not isinstance(self.faiss, TrackedVectorStore):  # other stores have options of their own
            refuse_options("an insertion", insert_kwargs, ("show_progress",))
        nodes = list({node.node_id: node for node in sound_nodes(nodes)}.values())
        with self.bulk():
            if nodes:
                self.faiss.catalog.claim()  # see `ingest._ingest_batch`
            if not later:
                traced_ensure(self.library, (node.get_content(MetadataMode.NONE) for node in nodes))
            # Not by LlamaIndex's own method: it keeps some kinds of nodes in the document store as well, where nothing
            # deletes them, and has its retriever look among those alone from then on.
            for batch in iter_batch(nodes, self._insert_batch_size):
                self._vector_store.add(self._get_node_with_embedding(batch, show_progress), **insert_kwargs)

    def _get_node_with_embedding(self, nodes: Sequence[BaseNode], show_progress: bool = False) -> list[BaseNode]:
        """Copies of nodes with their embeddings, made where they have none; see `embedding_texts`."""
        lacking = [node for node in nodes if node.embedding is None]
        made = self._embed_model.get_text_embedding_batch(self._texts.of(lacking), show_progress=show_progress)
        fresh = {node.node_id: vector for node, vector in zip(lacking, made, strict=True)}
        return [node.model_copy(update={"embedding": fresh.get(node.node_id, node.embedding)}) for node in nodes]

    async def _async_add_nodes_to_index(
        self, index_struct: IndexDict, nodes: Sequence[BaseNode], show_progress: bool = False, **insert_kwargs: Any
    ) -> None:
        await asyncio.to_thread(self._add_nodes_to_index, index_struct, nodes, show_progress, **insert_kwargs)

    def insert(self, document: Document, **insert_kwargs: Any) -> None:
        """Insert a document; one of the same id is replaced.

        Raises:
            ConfigurationError: It is no document, or cannot be kept; see `llamaindex.metadata`.
        """
        (document,) = sound_documents([document])
        with self.bulk():
            nodes = self.splitting.nodes([document], show_progress=self._show_progress)
            self._forget(document.id_)
            with self._callback_manager.as_trace("insert"):
                self.insert_nodes(nodes, **insert_kwargs)
            self.docstore.set_document_hash(document.id_, self.splitting.hash_of(document))
            self.splitting.remember()

    async def ainsert(self, document: Document, **insert_kwargs: Any) -> None:
        """`insert` in a thread."""
        await asyncio.to_thread(self.insert, document, **insert_kwargs)

    def delete_nodes(self, node_ids: list[str], delete_from_docstore: bool = False, **delete_kwargs: Any) -> None:
        """Delete nodes: vector and text are gone; concepts that others share stay."""
        given: Any = node_ids
        node_ids = [given] if isinstance(given, str) else node_ids
        with self.bulk():
            self._vector_store.delete_nodes(node_ids, **delete_kwargs)
            for node_id in node_ids:
                kept = self.docstore.get_document(node_id, raise_error=False)
                # LlamaIndex's own methods put these two kinds there; a storage may have them from before this class.
                if kept is not None and (delete_from_docstore or isinstance(kept, ImageNode | IndexNode)):
                    self.docstore.delete_document(node_id, raise_error=False)

    async def adelete_nodes(
        self, node_ids: list[str], delete_from_docstore: bool = False, **delete_kwargs: Any
    ) -> None:
        """`delete_nodes` in a thread."""
        await asyncio.to_thread(self.delete_nodes, node_ids, delete_from_docstore, **delete_kwargs)

    def delete_ref_doc(self, ref_doc_id: str, delete_from_docstore: bool = False, **delete_kwargs: Any) -> None:
        """Delete a document, its nodes, and the memory of its hash (so that it can be refreshed back in).

        One that is not there is no error, but logged as a warning.

        Raises:
            ConfigurationError: An option that is not heeded.
        """
        refuse_options("deleting a document", delete_kwargs, ("delete_from_docstore",))
        if not isinstance(ref_doc_id, str):
            raise ConfigurationError("this is no id of a document", got=repr(ref_doc_id), expected="a text")
        with self.bulk():
            if not self._forget(ref_doc_id):
                logger.warning("there is no document %r, so none was deleted", ref_doc_id)

    async def adelete_ref_doc(self, ref_doc_id: str, delete_from_docstore: bool = False, **delete_kwargs: Any) -> None:
        """`delete_ref_doc` in a thread."""
        await asyncio.to_thread(self.delete_ref_doc, ref_doc_id, delete_from_docstore, **delete_kwargs)

    def update_ref_doc(self, document: Document, **update_kwargs: Any) -> None:
        """Replace a document, in one step: where the new one cannot be kept, the former one stays.

        Args:
            document: The new one.
            **update_kwargs: `insert_kwargs`, and `delete_kwargs`, of which `delete_from_docstore` makes no difference.

        Raises:
            ConfigurationError: It cannot be kept, or an option is not heeded.
        """
        self.insert(document, **update_options("an update", update_kwargs))

    async def aupdate_ref_doc(self, document: Document, **update_kwargs: Any) -> None:
        """`update_ref_doc` in a thread."""
        await asyncio.to_thread(self.update_ref_doc, document, **update_kwargs)

    def refresh_ref_docs(self, documents: Sequence[Document], **update_kwargs: Any) -> list[bool]:
        """Insert new documents and replace changed ones; tells for each whether it was.

        Raises:
            ConfigurationError: One cannot be kept, or an option is not heeded; they are those of `update_ref_doc`.
        """
        insert_kwargs = update_options("a refresh", update_kwargs)
        sound = list(sound_documents(documents))
        with self.bulk():
            refreshed = []
            for document in sound:  # one after the other: an id may come twice
                changed = changed_documents(self, [document])
                for each in changed:
                    self.insert(each, **insert_kwargs)
                refreshed.append(bool(changed))
            return refreshed

    async def arefresh_ref_docs(self, documents: Sequence[Document], **update_kwargs: Any) -> list[bool]:
        """`refresh_ref_docs` in a thread."""
        return await asyncio.to_thread(self.refresh_ref_docs, documents, **update_kwargs)

    def _forget(self, doc_id: str) -> bool:
        """Delete a document; tells whether there was one."""
        gone = self.faiss.node_ids(doc_id)
        known = bool(gone) or self.docstore.get_document_hash(doc_id) is not None
        if gone:
            self.delete_nodes(gone)
        self.docstore.delete_document(doc_id, raise_error=False)
        self.origins.forget(doc_id)
        return known

    @contextlib.contextmanager
    def bulk(self) -> Iterator[None]:
        """Commit once for everything inside; on an error nothing since the last commit is kept, concepts excepted.

        Concepts are known by their content, so those made before an error or a Ctrl-C are right, and save the next
        run their work. Threads take turns; what is called from within the block belongs to it.
        """
        with self._writing.acquired() as outermost:
            if outermost:
                self._texts.begin()
            try:
                yield
                if outermost:
                    self.commit()
            except BaseException:
                if outermost:
                    self.faiss.rollback()
                    with contextlib.suppress(CompLLMError):
                        self.store.flush()
                raise

    def commit(self) -> None:
        """Make everything durable: concepts first, then vectors and text together, in one step."""
        self.store.flush()
        work = self.metrics.work
        if self.faiss.catalog.pending and work != self._kept:
            self.accounts.measures.add(work.plus(self._kept, -1))
        self.faiss.commit()
        self._kept = work

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
        if isinstance(self.store, MemoryStore):
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

    @property
    def metrics(self) -> Metrics:
        """What this process measured; `metrics` in `stats` is what the storage keeps."""
        return self.library.metrics

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
        self.faiss.close()
        self.store.close()

    def _keep_work(self) -> None:
        """Note what workers did since the last commit, if nobody is in the way: it is worth no error."""
        work = self.metrics.work
        with contextlib.suppress(CompLLMError), self.faiss.catalog.own_transaction() as connection:
            if connection is not None and work != self._kept:
                self.accounts.measures.add(work.plus(self._kept, -1))
                self._kept = work

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _opened(index_struct: ConceptIndexStruct, storage_context: object, **options: Any) -> ConceptIndex:
    """What `load_index_from_storage` calls for the index of a `ConceptIndexStruct`; options as of `load`."""
    return ConceptIndex.load(index_struct.folder(), **options)


INDEX_STRUCT_TYPE_TO_INDEX_CLASS[TYPE] = cast(Any, _opened)

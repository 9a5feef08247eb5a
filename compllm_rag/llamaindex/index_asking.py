"""How a `ConceptIndex` is asked: retrievers, engines and the LLM behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.chat_engine.types import BaseChatEngine, ChatMode
from llama_index.core.query_engine import RetrieverQueryEngine

from compllm_rag.catalog.keywords import KeywordIndex
from compllm_rag.errors import ConfigurationError
from compllm_rag.generation.costs import CostModel
from compllm_rag.llamaindex.chat.options import chat_engine
from compllm_rag.llamaindex.engines import citation_engine, query_engine, sub_question_engine
from compllm_rag.llamaindex.index_base import IndexBase
from compllm_rag.llamaindex.llm import ConceptLLM
from compllm_rag.llamaindex.retrieval import hybrid_retriever
from compllm_rag.llamaindex.retriever import OPTIONS as RETRIEVER_OPTIONS
from compllm_rag.llamaindex.retriever import ConceptRetriever
from compllm_rag.llamaindex.retrievers import ConceptBM25Retriever, HybridRetriever, keyword_index
from compllm_rag.llamaindex.synthesizer import ConceptSynthesizer
from compllm_rag.llamaindex.tracked_store import TrackedVectorStore
from compllm_rag.reading.calibrated import calibrated

if TYPE_CHECKING:
    from llama_index.core.llms.llm import LLM
    from llama_index.core.query_engine import CitationQueryEngine, SubQuestionQueryEngine
    from llama_index.core.question_gen.types import BaseQuestionGenerator
    from llama_index.core.tools import QueryEngineTool


class IndexAsking(IndexBase):
    """What of a `ConceptIndex` finds passages and answers from their concepts."""

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
                `text_qa_template`, `refine_template`, `response_mode`, `output_cls`, `generation`, `callback_manager`;
                `rate`, `read_policy`, `relevance`, `relevance_cutoff`, `position_budget`, `prefill_budget`,
                `ttft_budget_s`, `costs`), `response_synthesizer`, `node_postprocessors`, and of LlamaIndex's
                `VectorIndexRetriever` (`similarity_top_k`, `filters`, ...); `retrieval` (`vector`, `bm25` or `hybrid`,
                with the options of that retriever) or `retriever`, any other that gives nodes, such as an
                AutoMergingRetriever. `use_async` is allowed and changes nothing: prompts of one answer are read one
                after the other.

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
                `skip_condense`, `verbose`; `generation`, `mode`, `missing`, `overflow`, `choose`, `rate`,
                `read_policy`, `relevance`, `relevance_cutoff`, `position_budget`, `prefill_budget`, `ttft_budget_s`,
                `costs`, `node_postprocessors`, `callback_manager` and those of the retriever as in `as_query_engine`.
                `streaming` and `use_async` are allowed and change nothing: call `stream_chat`, `achat`, `astream_chat`.

        Raises:
            ConfigurationError: A mode, an LLM or an option that nothing here would heed.
        """
        return chat_engine(self, chat_mode, llm, kwargs, RETRIEVER_OPTIONS)

    def calibrate(
        self, *, seconds: float = 20.0, progress: Callable[[str, float | None], None] | None = None
    ) -> CostModel:
        """Measure how fast this machine reads, for `ttft_budget_s` and `missing="auto"`; kept in the cache folder.

        Args:
            seconds: Time to spend, about.
            progress: Called with a message and a share from 0 to 1.

        Returns:
            What was found. Engines that are made from now on heed it.
        """
        return calibrated(self.library, seconds=seconds, progress=progress)

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

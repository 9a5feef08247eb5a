"""Query engines over an index, and LlamaIndex's own ones put together so that they read concepts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import CitationQueryEngine, SubQuestionQueryEngine
from llama_index.core.query_engine.citation_query_engine import (
    CITATION_QA_TEMPLATE,
    CITATION_REFINE_TEMPLATE,
    DEFAULT_CITATION_CHUNK_SIZE,
)
from llama_index.core.question_gen.prompts import build_tools_text
from llama_index.core.question_gen.types import BaseQuestionGenerator, SubQuestion
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.core.tools import QueryEngineTool, ToolMetadata
from pydantic import BaseModel, Field, create_model

from compllm_rag.errors import ConfigurationError
from compllm_rag.llamaindex.callbacks import ConceptQueryEngine, OneManager
from compllm_rag.llamaindex.heeded import postprocessors
from compllm_rag.llamaindex.llm import ConceptLLM
from compllm_rag.llamaindex.node_text import CitedNode
from compllm_rag.llamaindex.read_options import READ_OPTIONS
from compllm_rag.llamaindex.retrieval import VECTOR_OPTIONS, chosen_retriever

if TYPE_CHECKING:
    from llama_index.core.prompts.mixin import PromptDictType

    from compllm_rag.llamaindex.index_asking import IndexAsking

_SYNTHESIZER_OPTIONS = (
    "mode", "streaming", "missing", "overflow", "choose", "text_qa_template", "refine_template", "response_mode",
    "output_cls", "generation", "callback_manager", *READ_OPTIONS,
)  # fmt: skip

_OF_THE_WHOLE = ("generation", "streaming", "output_cls", "callback_manager")  # of an answer made of several

_QUESTIONS = PromptTemplate(
    "These tools answer questions:\n{tools_str}\n"
    "Split the question below into at most {most} questions that one tool each can answer.\n"
    "Question: {query_str}"
)


def query_engine(index: IndexAsking, llm: object, options: dict[str, Any]) -> ConceptQueryEngine:
    """A query engine over an index; see `ConceptIndex.as_query_engine`."""
    own = {name: options.pop(name) for name in _SYNTHESIZER_OPTIONS if name in options}
    llm = _settings_of(index, llm, own)
    options.pop("use_async", None)
    given = options.pop("response_synthesizer", None)
    after = postprocessors(options.pop("node_postprocessors", None))
    retriever = chosen_retriever(index, options)
    unheeded = sorted({*options} - VECTOR_OPTIONS) + ["llm"] * (llm is not None)
    if given is not None:
        unheeded += sorted(own)  # they are for a synthesizer of ours
    if unheeded:
        known = [*_SYNTHESIZER_OPTIONS, "response_synthesizer", "node_postprocessors", "retrieval", "retriever"]
        raise ConfigurationError(
            "a query engine of concepts has no such option",
            got=", ".join(unheeded),
            expected=", ".join([*known, *sorted(VECTOR_OPTIONS)]),
            next_step="leave it out"
            if given is None
            else "leave it out, or set it on the response_synthesizer that you pass",
        )
    if retriever is None:
        options.setdefault("similarity_top_k", 4)
        retriever = index.as_retriever(**options)
    return ConceptQueryEngine(retriever, given or index.as_synthesizer(**own), after)


def _settings_of(index: IndexAsking, llm: object, own: dict[str, Any]) -> object:
    """Take from an index's own LLM what it says of answers; None then, else the LLM, which is another.

    Args:
        index: Whose LLM it should be.
        llm: Of LlamaIndex; one that `as_structured_llm` made says the class of answers.
        own: Options of the synthesizer, completed here.
    """
    inner: object = llm
    said: dict[str, Any] = {}
    if isinstance(llm, StructuredLLM):
        inner, said = llm.llm, {"output_cls": llm.output_cls}
    if not isinstance(inner, ConceptLLM) or not inner.runs(index.generator) or inner.system_prompt:
        return llm
    if inner.generation != index.generator.config:
        said["generation"] = inner.generation
    if twice := sorted(set(said) & set(own)):
        raise ConfigurationError(
            "an option is given twice", got=f"{', '.join(twice)}, and an llm that says it", next_step="leave one out"
        )
    own |= said
    return None


class ConceptCitationEngine(OneManager, CitationQueryEngine):
    """A CitationQueryEngine whose sources are the retrieved nodes, so that their concepts are found in the store.

    LlamaIndex's own cuts nodes into smaller sources and writes `Source n:` into their text, which makes texts of them
    that were never ingested. Here that stands in front of the node's text, and the number is that of the sources that
    are read; nodes are cut only where a size is asked for.
    """

    cuts_nodes = False

    def _create_citation_nodes(self, nodes: list[NodeWithScore]) -> list[NodeWithScore]:
        if self.cuts_nodes:
            return super()._create_citation_nodes(nodes)
        return [CitedNode(node=found.node, score=found.score) for found in nodes]


def citation_engine(
    index: IndexAsking,
    *,
    citation_chunk_size: int | None,
    citation_chunk_overlap: int | None,
    options: dict[str, Any],
) -> ConceptCitationEngine:
    """A citation engine over an index.

    Args:
        index: Where to look.
        citation_chunk_size: Most tokens of a source; None takes nodes as they are.
        citation_chunk_overlap: Tokens that neighbouring sources share, where nodes are cut; None takes a tenth.
        options: Of `ConceptIndex.as_query_engine`.

    Raises:
        ConfigurationError: An overlap is given and no size.
    """
    if citation_chunk_size is None and citation_chunk_overlap is not None:
        raise ConfigurationError(
            "citation_chunk_overlap makes no sense without citation_chunk_size",
            got=citation_chunk_overlap,
            expected="both or none",
            next_step="give a size, or take the retrieved nodes as they are",
        )
    if options.get("response_synthesizer") is None:  # one that is given has templates of its own
        options.setdefault("text_qa_template", CITATION_QA_TEMPLATE)
        options.setdefault("refine_template", CITATION_REFINE_TEMPLATE)
    inner: Any = index.as_query_engine(**options)
    size = citation_chunk_size or DEFAULT_CITATION_CHUNK_SIZE
    made = ConceptCitationEngine(
        inner.retriever,
        llm=index.llm,
        response_synthesizer=inner._response_synthesizer,
        citation_chunk_size=size,
        citation_chunk_overlap=size // 10 if citation_chunk_overlap is None else citation_chunk_overlap,
        node_postprocessors=inner._node_postprocessors,
        callback_manager=inner.callback_manager,
    )
    made.cuts_nodes = citation_chunk_size is not None
    return made


class StructuredQuestionGenerator(BaseQuestionGenerator):
    """Splits a question into sub-questions, as an object: also a small LLM names tools that exist, in valid JSON.

    Args:
        llm: Writes the questions (extra `structured`).
        most: Most questions.
        max_new_tokens: Of all of them together.
    """

    def __init__(self, llm: ConceptLLM, *, most: int = 3, max_new_tokens: int = 256) -> None:
        self._llm, self._most, self._prompt = llm, most, _QUESTIONS
        self._options = {"max_tokens": max_new_tokens}

    def _get_prompts(self) -> PromptDictType:
        return {"question_gen_prompt": self._prompt}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        self._prompt = prompts.get("question_gen_prompt", self._prompt)  # type: ignore[assignment]

    def generate(self, tools: Sequence[ToolMetadata], query: QueryBundle) -> list[SubQuestion]:
        """Sub-questions, each with the tool that answers it.

        Raises:
            StructuredAnswerError: They do not fit `max_new_tokens`.
            MissingExtraError: The extra `structured` is not installed.
        """
        made: Any = self._llm.structured_predict(
            self._form(tools),
            self._prompt,
            llm_kwargs=self._options,
            tools_str=build_tools_text(tools),
            query_str=query.query_str,
            most=self._most,
        )
        return [SubQuestion(sub_question=item.sub_question, tool_name=item.tool_name) for item in made.items]

    async def agenerate(self, tools: Sequence[ToolMetadata], query: QueryBundle) -> list[SubQuestion]:
        """`generate` in a thread."""
        return await asyncio.to_thread(self.generate, tools, query)

    def _form(self, tools: Sequence[ToolMetadata]) -> type[BaseModel]:
        names = tuple(tool.name for tool in tools)
        if not names:
            raise ConfigurationError("there is no tool to ask", expected="at least one QueryEngineTool")
        tool: Any = Literal[names]
        question: Any = create_model("Question", sub_question=(str, Field(max_length=160)), tool_name=(tool, ...))
        return create_model("Questions", items=(list[question], Field(min_length=1, max_length=self._most)))


def sub_question_engine(
    index: IndexAsking,
    tools: Sequence[QueryEngineTool] | None,
    *,
    question_gen: BaseQuestionGenerator | None,
    verbose: bool,
    options: dict[str, Any],
) -> SubQuestionQueryEngine:
    """An engine that splits a question up, asks tools, and answers from what they said.

    Args:
        index: Whose LLM asks and answers.
        tools: What answers sub-questions; None takes one engine over the index.
        question_gen: Splits questions; None lets the index's LLM do it.
        verbose: Print sub-questions and their answers.
        options: Of `ConceptIndex.as_query_engine`, for the engine over the index.
    """
    if tools is not None and options:
        raise ConfigurationError(
            "tools have their own options", got=", ".join(sorted(options)), next_step="set them where a tool is made"
        )
    if tools is None:
        about = "Answers questions from the documents."
        # What is asked of the answer as a whole is not asked of its parts.
        inner = {name: value for name, value in options.items() if name not in ("streaming", "output_cls")}
        tools = [QueryEngineTool.from_defaults(index.as_query_engine(**inner), name="documents", description=about)]
    own = {name: options[name] for name in _OF_THE_WHOLE if name in options}
    first = getattr(tools[0], "query_engine", None) if tools else None
    manager = own.get("callback_manager") or getattr(first, "callback_manager", None)
    return SubQuestionQueryEngine(
        question_gen or StructuredQuestionGenerator(index.llm),
        # What tools said is an answer, not a passage: there is nothing to find in the store.
        index.as_synthesizer(mode="text", **{**own, "callback_manager": manager}),
        tools,
        callback_manager=manager,
        verbose=verbose,
        use_async=False,
    )

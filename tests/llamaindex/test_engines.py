"""LlamaIndex's engines and retrievers over an index: whatever they bring together, passages are read as concepts."""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.response.schema import StreamingResponse
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.indices.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.node_parser import HierarchicalNodeParser, SentenceWindowNodeParser, get_leaf_nodes
from llama_index.core.query_engine import RouterQueryEngine
from llama_index.core.question_gen.types import BaseQuestionGenerator, SubQuestion
from llama_index.core.retrievers import AutoMergingRetriever, QueryFusionRetriever, RecursiveRetriever
from llama_index.core.schema import Document, IndexNode, NodeWithScore, QueryBundle, TextNode
from llama_index.core.selectors import EmbeddingSingleSelector
from llama_index.core.tools import QueryEngineTool
from pydantic import BaseModel

import toy
from compllm_rag import Compressor, ConceptIndex, ConceptLLM, GenerationConfig
from compllm_rag.errors import ConfigurationError
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.llamaindex.engines import StructuredQuestionGenerator
from compllm_rag.prompt import PromptPlan
from toy_embedder import HashEmbedder

QUESTION = "Who built the lighthouse on Gull Rock?"
SHORT = GenerationConfig(max_new_tokens=8)


@pytest.fixture
def index(compressor: Compressor) -> ConceptIndex:
    made = ConceptIndex.create(
        None, compressor=compressor, embedder=HashEmbedder(), chunk_size=60, rate=2, generation=SHORT
    )
    made.ingest([Document(id_="rock", text=toy.TEXT, metadata={"title": "Rock"})])
    return made


def used(response: Any) -> set[str]:
    return {facts["used"] for facts in response.metadata["compllm"]["nodes"].values()}


async def test_citations_find_their_concepts_in_the_store(index: ConceptIndex) -> None:
    records = index.store.stats().records
    engine = index.as_citation_engine(similarity_top_k=2)
    for response in (engine.query(QUESTION), await engine.aquery(QUESTION)):
        account = response.metadata["compllm"]
        assert used(response) == {"concepts"}
        assert account["store"]["misses"] == 0 and account["store"]["hits"] > 0
        assert len(response.source_nodes) == 2
    assert index.store.stats().records == records
    synthesizer = engine._response_synthesizer
    nodes = engine._create_citation_nodes(index.as_retriever(similarity_top_k=2).retrieve(QUESTION))
    plan = synthesizer._planner.plan(QUESTION, nodes, 2000).plan
    shown = readable(plan)
    assert "Source 1:\nRock\n" in shown and "Source 2:\nRock\n" in shown and "Every answer should include" in shown
    assert "[1]\n" not in shown[shown.index("Below are") :]


def readable(plan: PromptPlan) -> str:
    """The tokens of a prompt, those that concepts stand for among them."""
    return toy.tokenizer().decode([i for span in plan.spans for i in getattr(span, "ids", ())])


def test_sources_are_numbered_as_they_are_read(index: ConceptIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Source n` is `source_nodes[n - 1]`, whatever did not fit, and through all prompts of an answer."""
    texts = {"a": "Ada built it.", "b": toy.TEXT * 6, "c": "Bo painted it."}
    found = [NodeWithScore(node=TextNode(id_=name, text=text)) for name, text in texts.items()]

    class Given(BaseRetriever):
        def _retrieve(self, query: QueryBundle) -> list[NodeWithScore]:
            return list(found)

    prompts: list[str] = []
    stream = LocalGenerator.stream

    def watched(self: LocalGenerator, plan: PromptPlan, *args: Any, **options: Any) -> Any:
        prompts.append(readable(plan))
        return stream(self, plan, *args, **options)

    monkeypatch.setattr(LocalGenerator, "stream", watched)
    response = index.as_citation_engine(retriever=Given(), mode="text").query(QUESTION)
    assert [node.node.node_id for node in response.source_nodes] == ["a", "c"]
    assert response.metadata["compllm"]["dropped"] == ["b"]
    body = prompts[-1][prompts[-1].index("Below are") :]
    assert "Source 1:\nAda built it." in body and "Source 2:\nBo painted it." in body and "Source 3" not in body
    del found[1]
    response = index.as_citation_engine(retriever=Given(), mode="text", response_mode="refine").query(QUESTION)
    assert len(response.source_nodes) == 2
    assert "Source 1:\nAda" in prompts[-2] and "Source 2:\nBo" in prompts[-1] and "Source 1:\nBo" not in prompts[-1]


def test_a_citation_keeps_what_a_node_says_of_itself(index: ConceptIndex) -> None:
    plain = TextNode(text="Ada built it.", metadata={"title": "Rock", "author": "Brown"})
    own = TextNode(text="Bo.", metadata={"author": "Clay"}, text_template="BEGIN {metadata_str} {content} END")
    engine = index.as_citation_engine(mode="text")
    nodes = engine._create_citation_nodes([NodeWithScore(node=plain), NodeWithScore(node=own)])
    shown = readable(engine._response_synthesizer._planner.plan(QUESTION, nodes, 2000).plan)
    assert "Source 1:\nRock\nauthor: Brown\nAda built it." in shown
    assert "Source 2:\nBEGIN author: Clay Bo. END" in shown
    assert nodes[1].node.get_content() == own.get_content()


def test_a_citation_engine_refuses_questions_and_takes_synthesizers_as_the_plain_one(index: ConceptIndex) -> None:
    with pytest.raises(ConfigurationError, match="question"):
        index.as_citation_engine().query(123)
    assert str(index.as_citation_engine(response_synthesizer=index.as_synthesizer()).query(QUESTION))


def test_one_set_on_a_citation_engine_is_heard_by_all_its_parts(index: ConceptIndex) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    engine = index.as_citation_engine()
    engine.callback_manager = CallbackManager([debug])
    engine.query(QUESTION)
    heard = {pair[0].event_type for pair in debug.get_event_pairs()}
    assert heard >= {CBEventType.QUERY, CBEventType.RETRIEVE, CBEventType.SYNTHESIZE, CBEventType.LLM}


def test_options_of_sub_questions_are_those_of_the_whole_answer(index: ConceptIndex) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    options: dict[str, Any] = {"generation": GenerationConfig(max_new_tokens=3), "similarity_top_k": 2}
    manager = CallbackManager([debug])
    engine = index.as_sub_question_engine(question_gen=Splitter(), callback_manager=manager, **options)
    response = engine.query(QUESTION)
    assert response.metadata["compllm"]["new_tokens"] <= 3
    heard = [pair[0].event_type for pair in debug.get_event_pairs()]
    assert heard.count(CBEventType.SUB_QUESTION) == 2 and heard.count(CBEventType.LLM) == 3
    assert heard.count(CBEventType.SYNTHESIZE) == 3 and heard.count(CBEventType.QUERY) == 3
    streaming = index.as_sub_question_engine(question_gen=Splitter(), streaming=True, **options).query(QUESTION)
    assert isinstance(streaming, StreamingResponse) and str(streaming) == str(response)


def test_citations_may_be_smaller_than_nodes(index: ConceptIndex) -> None:
    response = index.as_citation_engine(
        similarity_top_k=2, citation_chunk_size=30, citation_chunk_overlap=0, response_mode="compact"
    ).query(QUESTION)
    assert used(response) == {"concepts"}
    assert len(response.source_nodes) > 2
    assert "Source 2:" in response.source_nodes[1].node.get_content()
    with pytest.raises(ConfigurationError, match="similarity_topk"):
        index.as_citation_engine(similarity_topk=2)


class Splitter(BaseQuestionGenerator):
    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: Any) -> None:
        pass

    def generate(self, tools: Any, query: Any) -> list[SubQuestion]:
        return [SubQuestion(sub_question=text, tool_name=tools[0].name) for text in ("Who?", "When?")]

    async def agenerate(self, tools: Any, query: Any) -> list[SubQuestion]:
        return self.generate(tools, query)


async def test_sub_questions_are_answered_from_concepts(index: ConceptIndex) -> None:
    asked = []
    engine = index.as_sub_question_engine(question_gen=Splitter(), similarity_top_k=2)
    inner = engine._query_engines["documents"]._response_synthesizer
    synthesize = inner.synthesize

    def watched(*args: Any, **options: Any) -> Any:
        asked.append(synthesize(*args, **options))
        return asked[-1]

    inner.synthesize = watched
    records = index.store.stats().records
    response = engine.query(QUESTION)
    assert str(response)
    assert [used(response) for response in asked] == [{"concepts"}, {"concepts"}]
    assert used(response) == {"text"}  # what the tools said
    assert index.store.stats().records == records
    assert str(await engine.aquery(QUESTION)) == str(response)
    tools = [QueryEngineTool.from_defaults(index.as_query_engine(), name="rock", description="The rock.")]
    assert str(index.as_sub_question_engine(tools, question_gen=Splitter()).query(QUESTION))
    with pytest.raises(ConfigurationError, match="similarity_top_k"):
        index.as_sub_question_engine(tools, similarity_top_k=1)


async def test_the_own_llm_splits_questions(index: ConceptIndex) -> None:
    made = StructuredQuestionGenerator(index.llm, most=2, max_new_tokens=700)
    tools = [
        QueryEngineTool.from_defaults(index.as_query_engine(), name=name, description=name).metadata
        for name in ("rock", "village")
    ]
    from llama_index.core.schema import QueryBundle

    found = made.generate(tools, QueryBundle(QUESTION))
    assert 1 <= len(found) <= 2
    assert {question.tool_name for question in found} <= {"rock", "village"}
    assert await made.agenerate(tools, QueryBundle(QUESTION)) == found


def empty(compressor: Compressor) -> ConceptIndex:
    return ConceptIndex.create(
        None, compressor=compressor, embedder=HashEmbedder(), chunk_size=60, rate=2, generation=SHORT
    )


def test_sentence_windows(compressor: Compressor) -> None:
    parser = SentenceWindowNodeParser.from_defaults(window_size=1)
    with empty(compressor) as index:
        index.insert_nodes(parser.get_nodes_from_documents([Document(text=toy.TEXT)]))
        engine = index.as_query_engine(
            similarity_top_k=2, node_postprocessors=[MetadataReplacementPostProcessor(target_metadata_key="window")]
        )
        response = engine.query(QUESTION)
        assert used(response) == {"concepts"}
        source = response.source_nodes[0].node
        assert len(source.get_content()) > len(source.metadata["original_text"])


def test_merged_parents(compressor: Compressor) -> None:
    parser = HierarchicalNodeParser.from_defaults(chunk_sizes=[120, 40], chunk_overlap=0)
    nodes = parser.get_nodes_from_documents([Document(text=toy.TEXT)])
    with empty(compressor) as index:
        with index.bulk():
            index.docstore.add_documents(nodes)
            index.insert_nodes(get_leaf_nodes(nodes))
        retriever = AutoMergingRetriever(
            index.as_retriever(similarity_top_k=6), index.storage_context, simple_ratio_thresh=0.3
        )
        response = index.as_query_engine(retriever=retriever).query(QUESTION)
        leaves = {node.node_id for node in get_leaf_nodes(nodes)}
        assert any(found.node.node_id not in leaves for found in response.source_nodes)
        assert used(response) == {"concepts"}


async def test_fused_and_recursive_retrievers_and_routers(index: ConceptIndex) -> None:
    fused = QueryFusionRetriever(
        [index.as_retriever(similarity_top_k=2), index.as_retriever(similarity_top_k=3)],
        llm=index.llm,
        num_queries=1,
        use_async=False,
        similarity_top_k=3,
    )
    engine = index.as_query_engine(retriever=fused)
    response = engine.query(QUESTION)
    assert len(response.source_nodes) == 3 and used(response) == {"concepts"}
    assert str(await engine.aquery(QUESTION)) == str(response)
    assert used(index.as_query_engine(retriever=fused, mode="text").query(QUESTION)) == {"text"}
    with pytest.raises(ConfigurationError, match="similarity_top_k"):
        index.as_query_engine(retriever=fused, similarity_top_k=2)

    inner = index.as_query_engine(similarity_top_k=1)
    root = IndexNode(text="The rock", index_id="rock", obj=None)
    recursive = RecursiveRetriever(
        "root",
        retriever_dict={"root": Fixed([root]), "rock": index.as_retriever(similarity_top_k=2)},
    )
    response = index.as_query_engine(retriever=recursive).query(QUESTION)
    assert len(response.source_nodes) == 2 and used(response) == {"concepts"}

    tools = [
        QueryEngineTool.from_defaults(inner, name=name, description=about)
        for name, about in (("rock", "Who built the lighthouse"), ("other", "Cooking"))
    ]
    router = RouterQueryEngine(EmbeddingSingleSelector.from_defaults(embed_model=index.embedder), tools, llm=index.llm)
    response = router.query(QUESTION)
    assert used(response) == {"concepts"}
    assert str(response) == str(inner.query(QUESTION))


def Fixed(nodes: list[Any]) -> Any:
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.schema import NodeWithScore

    class Retriever(BaseRetriever):
        def _retrieve(self, query_bundle: Any) -> list[NodeWithScore]:
            return [NodeWithScore(node=node, score=1.0) for node in nodes]

    return Retriever()


class Built(BaseModel):
    tall: bool


def test_the_indexs_own_llm_is_no_other(index: ConceptIndex) -> None:
    assert str(index.as_query_engine(llm=index.llm).query(QUESTION)) == str(index.as_query_engine().query(QUESTION))
    assert index.llm.complete("Who?").text
    three = ConceptLLM(index.generator, max_tokens=3)
    assert index.as_query_engine(llm=three).query(QUESTION).metadata["compllm"]["new_tokens"] == 3
    with pytest.raises(ConfigurationError, match="generation.*llm"):
        index.as_query_engine(llm=three, generation=SHORT)
    with pytest.raises(ConfigurationError, match="llm"):
        index.as_query_engine(llm=ConceptLLM(index.generator, system_prompt="Be rude."))
    structured = ConceptLLM(index.generator, max_tokens=100).as_structured_llm(Built)
    assert isinstance(index.as_query_engine(llm=structured).query(QUESTION).response, Built)
    other = empty(index.compressor)
    with pytest.raises(ConfigurationError, match="llm"):
        index.as_query_engine(llm=other.llm)


def test_text_nodes_of_no_document_are_read_too(index: ConceptIndex) -> None:
    index.insert_nodes([TextNode(text="The keeper was called Brand.")])
    assert used(index.as_query_engine(similarity_top_k=9).query("Brand?")) == {"concepts"}

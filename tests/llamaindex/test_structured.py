"""`output_cls`: engines and LLM answer with validated objects, or say why not."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.base.response.schema import PydanticResponse
from llama_index.core.llms import ChatMessage
from llama_index.core.schema import NodeWithScore, TextNode
from pydantic import BaseModel, Field, field_validator

import toy
from compllm_rag import (
    Compressor,
    ConceptIndex,
    ConceptLLM,
    ConceptSynthesizer,
    GenerationConfig,
    LocalGenerator,
    MemoryStore,
)
from compllm_rag.errors import ConfigurationError, StructuredAnswerError
from compllm_rag.library import ConceptLibrary
from compllm_rag.models.llm import TargetLLM
from toy_embedder import HashEmbedder

LONG = GenerationConfig(max_new_tokens=200)
QUESTION = "What is it?"


class Building(BaseModel):
    """A building on the rock."""

    kind: Literal["lighthouse", "museum"]
    lit: bool = Field(description="whether its lamp burns")


def nodes() -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(id_=f"n{i}", text=t)) for i, t in enumerate(toy.TEXT.split("\n\n"))]


@pytest.fixture
def library(compressor: Compressor) -> ConceptLibrary:
    return ConceptLibrary(compressor, MemoryStore(compressor.hidden_size))


@pytest.mark.parametrize("options", [{}, {"mode": "text"}, {"response_mode": "refine"}])
async def test_an_engine_answers_with_an_object(library: ConceptLibrary, options: dict[str, Any]) -> None:
    made = ConceptSynthesizer(library, generation=LONG, output_cls=Building, **options)
    for response in (made.synthesize(QUESTION, nodes()), await made.asynthesize(QUESTION, nodes())):
        assert isinstance(response, PydanticResponse)
        assert isinstance(response.response, Building)
        assert response.kind in ("lighthouse", "museum")
        assert len(response.source_nodes) == 3
        assert response.metadata["compllm"]["finish_reason"] == "stop"
        assert {f["used"] for f in response.metadata["compllm"]["nodes"].values()} == {options.get("mode", "concepts")}
    assert isinstance(made.get_response(QUESTION, ["one"]), Building)


def test_the_llm_is_told_the_form(library: ConceptLibrary) -> None:
    made = ConceptSynthesizer(library, output_cls=Building)
    plan = made._planner.plan(QUESTION, nodes(), 2000).plan
    shown = toy.tokenizer().decode([i for span in plan.spans for i in getattr(span, "ids", ())])
    assert "JSON schema" in shown and "whether its lamp burns" in shown
    assert shown.index(QUESTION) < shown.index("JSON schema")


def test_an_index_takes_output_cls(compressor: Compressor) -> None:
    with ConceptIndex.create(None, compressor=compressor, embedder=HashEmbedder(), chunk_size=60) as index:
        index.insert_nodes([found.node for found in nodes()])
        response = index.as_query_engine(output_cls=Building, generation=LONG).query(QUESTION)
        assert isinstance(response.response, Building)
        with pytest.raises(ConfigurationError, match="not streamed"):
            index.as_query_engine(output_cls=Building, streaming=True)
        with pytest.raises(ConfigurationError, match="no pydantic model"):
            index.as_query_engine(output_cls=dict)


def test_an_answer_that_is_cut_off_says_so(library: ConceptLibrary) -> None:
    made = ConceptSynthesizer(library, generation=GenerationConfig(max_new_tokens=4), output_cls=Building)
    with pytest.raises(StructuredAnswerError, match=r"cut off.*4 tokens.*max_new_tokens"):
        made.synthesize(QUESTION, nodes())


class Never(BaseModel):
    kind: Literal["lighthouse", "museum"]

    @field_validator("kind")
    @classmethod
    def refuse(cls, value: str) -> str:
        raise ValueError("never right")


def test_a_rule_that_no_schema_tells_is_checked(library: ConceptLibrary) -> None:
    made = ConceptSynthesizer(library, generation=LONG, output_cls=Never)
    with pytest.raises(StructuredAnswerError, match=r"no Never.*never right"):
        made.synthesize(QUESTION, nodes())


async def test_the_llm_predicts_objects(llm: TargetLLM) -> None:
    made = ConceptLLM(LocalGenerator(llm, LONG))
    prompt = PromptTemplate("What is {name}?")
    found = made.structured_predict(Building, prompt, name="Gull Rock")
    assert isinstance(found, Building)
    assert await made.astructured_predict(Building, prompt, name="Gull Rock") == found
    structured = made.as_structured_llm(Building)
    assert isinstance(structured.complete("What is Gull Rock?").raw, Building)
    assert isinstance((await structured.achat([ChatMessage(content="What?")])).raw, Building)
    with pytest.raises(ConfigurationError, match="not streamed"):
        list(structured.stream_chat([ChatMessage(content="What?")]))
    with pytest.raises(ConfigurationError, match="not streamed"):
        made.stream_structured_predict(Building, prompt, name="x")
    with pytest.raises(StructuredAnswerError, match="cut off"):
        made.structured_predict(Building, prompt, llm_kwargs={"max_tokens": 3}, name="x")

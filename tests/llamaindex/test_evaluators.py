"""LlamaIndex's evaluators with the target LLM as the judge, and with one that always says the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core import Document
from llama_index.core.evaluation import (
    AnswerRelevancyEvaluator,
    BatchEvalRunner,
    ContextRelevancyEvaluator,
    FaithfulnessEvaluator,
    PairwiseComparisonEvaluator,
    RelevancyEvaluator,
    RetrieverEvaluator,
    SemanticSimilarityEvaluator,
)

import toy
from compllm_rag import Compressor, ConceptIndex, ConceptLLM, GenerationConfig
from compllm_rag.generation.base import Generation
from toy_embedder import HashEmbedder

QUESTION = "Who built the lighthouse?"


@pytest.fixture(scope="module")
def index() -> Iterator[ConceptIndex]:
    documents = [Document(id_=f"d{i}", text=text) for i, text in enumerate(toy.TEXT.split("\n\n"))]
    with ConceptIndex.from_documents(
        documents,
        compressor=Compressor(toy.llm(window=8192)),
        embedder=HashEmbedder(),
        generation=GenerationConfig(max_new_tokens=8),
    ) as index:
        yield index


class Says:
    """A judge that has made up its mind."""

    def __init__(self, index: ConceptIndex, verdict: str) -> None:
        of = index.generator
        self.name, self.tokenizer, self.window, self.config = "judge", of.tokenizer, of.window, of.config
        self.verdict, self.asked = verdict, list[Any]()

    def generate(self, plans: Any, config: Any = None) -> list[Generation]:
        self.asked += plans
        return [Generation(self.verdict, [1], "stop", plan.positions, 0.0, 0.0, 0.0) for plan in plans]


def judged(index: ConceptIndex, verdict: str | None) -> ConceptLLM:
    return ConceptLLM(index.generator if verdict is None else Says(index, verdict))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "yes", "no"),
    [
        (FaithfulnessEvaluator, "YES", "NO"),
        (RelevancyEvaluator, "YES", "NO"),
        (AnswerRelevancyEvaluator, "Good. [RESULT] 2", "Bad. [RESULT] 0"),
        (ContextRelevancyEvaluator, "Good. [RESULT] 4", "Bad. [RESULT] 0"),
    ],
)
async def test_judges_of_a_response(index: ConceptIndex, kind: Any, yes: str, no: str) -> None:
    response = index.as_query_engine().query(QUESTION)
    assert kind(llm=judged(index, yes)).evaluate_response(query=QUESTION, response=response).score == 1.0
    verdict = await kind(llm=judged(index, no)).aevaluate_response(query=QUESTION, response=response)
    assert verdict.score == 0.0
    own = await kind(llm=judged(index, None)).aevaluate_response(query=QUESTION, response=response)
    assert own.query in (QUESTION, None)  # a random LLM judges something, and nothing breaks


async def test_two_answers_are_compared(index: ConceptIndex) -> None:
    judge = PairwiseComparisonEvaluator(llm=judged(index, "[[A]]"), enforce_consensus=False)
    found = await judge.aevaluate(query=QUESTION, response="Ada Marsh", second_response="Tom", reference="Ada Marsh")
    assert found.score == 1.0
    own = PairwiseComparisonEvaluator(llm=judged(index, None))
    assert own.evaluate(query=QUESTION, response="Ada", second_response="Tom").invalid_result


async def test_similarity_and_retrieval(index: ConceptIndex) -> None:
    same = SemanticSimilarityEvaluator(embed_model=index.embedder)
    assert (await same.aevaluate(response="Ada Marsh", reference="Ada Marsh")).score == pytest.approx(1.0)
    retriever = index.as_retriever(similarity_top_k=2)
    [expected, _] = [node.node_id for node in retriever.retrieve("Who built the lighthouse on Gull Rock?")]
    evaluator = RetrieverEvaluator.from_metric_names(["hit_rate", "mrr"], retriever=retriever)
    found = await evaluator.aevaluate("Who built the lighthouse on Gull Rock?", expected_ids=[expected])
    assert found.metric_vals_dict == {"hit_rate": 1.0, "mrr": 1.0}


async def test_a_batch_of_queries(index: ConceptIndex) -> None:
    kinds = {"faithful": FaithfulnessEvaluator, "relevant": RelevancyEvaluator}
    runner = BatchEvalRunner({name: kind(llm=judged(index, "YES")) for name, kind in kinds.items()}, workers=2)
    queries = [QUESTION, "Where is the lens kept?"]
    found = await runner.aevaluate_queries(index.as_query_engine(), queries=queries)
    assert {name: [result.passing for result in results] for name, results in found.items()} == {
        "faithful": [True, True], "relevant": [True, True],
    }  # fmt: skip
    responses = [index.as_query_engine().query(query) for query in queries]
    own = BatchEvalRunner({"faithful": FaithfulnessEvaluator(llm=judged(index, None))}, workers=1)
    assert len((await own.aevaluate_responses(queries=queries, responses=responses))["faithful"]) == 2

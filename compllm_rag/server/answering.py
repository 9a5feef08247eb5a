"""Questions to answers, as a sequence of events. All of it blocks: it is iterated in a thread of `Workers`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from llama_index.core.memory import BaseMemory
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from compllm_rag.config import GenerationConfig, Mode
from compllm_rag.llamaindex.account import empty_account
from compllm_rag.llamaindex.answer import retrieve
from compllm_rag.llamaindex.chat.engine import ConceptChatEngine
from compllm_rag.llamaindex.decoding import generation_of
from compllm_rag.llamaindex.llm import ConceptLLM
from compllm_rag.server.abandoning import AbandonableGenerator
from compllm_rag.server.answer_schemas import Answer, Citation, FoundNode, Plan, PlannedNode, Retrieved, Timings, Token
from compllm_rag.server.failures import Refusal
from compllm_rag.server.reading import ReadDefaults
from compllm_rag.server.work import Cancelled, Ticket

if TYPE_CHECKING:
    from compllm_rag.llamaindex.index import ConceptIndex

Event = Retrieved | Plan | Token | Answer


class Asked(NamedTuple):
    """A question.

    Attributes:
        question: In words.
        mode: Read the passages as concepts or as text.
        top_k: Chunks to retrieve.
        generation: How the answer is decoded.
        retrieval: By `vector`, `bm25` or `hybrid`; of no meaning in a conversation.
        reading: What the server was told of how passages are read.
    """

    question: str
    mode: Mode
    top_k: int
    generation: GenerationConfig
    retrieval: str = "vector"
    reading: ReadDefaults = ReadDefaults()


class Conversation(NamedTuple):
    """What a question stands in.

    Attributes:
        memory: What was said; question and answer are added to it.
        system: In place of the default system turn; None keeps that.
        session_id: Its name; None where the client keeps it.
    """

    memory: BaseMemory
    system: str | None = None
    session_id: str | None = None


def decoding(index: ConceptIndex, most_tokens: int, **asked: Any) -> GenerationConfig:
    """How an answer is decoded: as the index does it, but for what was asked for.

    Args:
        index: The index.
        most_tokens: The longest answer that may be asked for.
        **asked: `max_tokens`, `temperature`, `top_p`, `seed`, `stop`; None leaves one as it is.

    Raises:
        Refusal: A value is out of bounds, or would not be heeded.
    """
    if (asked.get("max_tokens") or 0) > most_tokens:
        raise Refusal(
            422, "invalid_request", f"max_tokens may be {most_tokens} here at most. Next step: ask for fewer",
            param="max_tokens",
        )  # fmt: skip
    stop = asked.get("stop")
    texts = [stop] if isinstance(stop, str) else list(stop or ())
    if any(not text or len(text) > 200 for text in texts):
        raise Refusal(422, "invalid_request", "stop texts have 1 to 200 characters", param="stop")
    if asked.get("seed") is not None and asked.get("temperature") is None and asked.get("top_p") is None:
        asked["temperature"] = 0.0  # greedy: the same each time, as a seed asks for
    return generation_of(index.generation, {**asked, "stop": tuple(texts) or None})


def answer(index: ConceptIndex, asked: Asked, ticket: Ticket) -> Iterator[Event]:
    """Answer one question.

    Raises:
        Cancelled: Nobody waits for it any more.
        PromptTooLongError, ReadBudgetError, MissingConceptsError, CorruptRecordError: See
            `ConceptSynthesizer.synthesize`.
    """
    begun = time.perf_counter()
    found = retrieve(index, asked.question, asked.top_k, retrieval=asked.retrieval)
    told = Retrieved(nodes=_found(found), retrieval_s=time.perf_counter() - begun)
    yield told
    _go_on(ticket)
    if not found:
        yield _answer(asked, empty_account(""), [], ticket, told.retrieval_s, begun)
        return
    reading = asked.reading.of(asked.mode)
    synthesizer = index.as_synthesizer(mode=asked.mode, streaming=True, generation=asked.generation, **reading)
    response: Any = synthesizer.synthesize(QueryBundle(asked.question), found)
    account: dict[str, Any] = response.metadata["compllm"]
    yield _plan(index, asked, account)
    _go_on(ticket)  # who goes away at the passages costs no prefill
    with closing(response.response_gen) as pieces:
        for piece in pieces:
            _go_on(ticket)
            yield Token(text=piece)
    yield _answer(asked, account, response.source_nodes, ticket, told.retrieval_s, begun)


def converse(index: ConceptIndex, asked: Asked, said: Conversation, ticket: Ticket) -> Iterator[Event]:
    """Answer one message of a conversation; `retrieval_s` includes making a question of its own out of it.

    Raises:
        Cancelled: Nobody waits for it any more.
        PromptTooLongError, ReadBudgetError, MissingConceptsError, CorruptRecordError: See `ConceptChatEngine.chat`.
    """
    begun = time.perf_counter()
    options: dict[str, Any] = asked.reading.of(asked.mode)
    options |= {} if said.system is None else {"system_prompt": said.system}
    made: Any = index.as_chat_engine(
        "condense_plus_context",
        memory=said.memory,
        mode=asked.mode,
        similarity_top_k=asked.top_k,
        generation=asked.generation,
        condense_llm=ConceptLLM(AbandonableGenerator(index.generator, ticket.cancel)),
        **options,
    )
    stream = cast(ConceptChatEngine, made).stream_chat(asked.question)
    account: dict[str, Any] = (stream.metadata or {})["compllm"]
    planned_s = sum(account.get(name, 0.0) for name in ("fetch_s", "compress_s", "layout_s"))
    retrieval_s = max(0.0, time.perf_counter() - begun - planned_s)
    yield Retrieved(nodes=_found(stream.source_nodes), retrieval_s=retrieval_s)
    if account["nodes"]:
        yield _plan(index, asked, account)
    _go_on(ticket)
    with closing(stream.response_gen) as pieces:
        for piece in pieces:
            _go_on(ticket)
            yield Token(text=piece)
    yield _answer(asked, account, stream.source_nodes, ticket, retrieval_s, begun, said)


def _go_on(ticket: Ticket) -> None:
    if ticket.cancel.is_set():
        raise Cancelled


def _found(nodes: Sequence[NodeWithScore]) -> list[FoundNode]:
    return [
        FoundNode(
            number=number,
            node_id=found.node.node_id,
            document_id=found.node.ref_doc_id or found.node.node_id,
            title=str(found.node.metadata.get("title") or ""),
            score=None if found.score is None else float(found.score),
            text=found.node.get_content(metadata_mode=MetadataMode.NONE),
        )
        for number, found in enumerate(nodes, 1)
    ]


def _plan(index: ConceptIndex, asked: Asked, account: dict[str, Any]) -> Plan:
    spec = index.library.spec
    depth, each = spec.depth, index.library.llm.kv_bytes
    upper = _layers_of_a_concept(depth, spec.config.entry_layer, account)
    nodes, saved = [], 0
    for node_id, facts in account["nodes"].items():
        as_text = facts.get("n_text")  # where some of it is read as text, and some as concepts
        if as_text is None:
            as_text = facts["n_tokens"] if facts["used"] == "text" else 0
        passed = as_text * depth + facts["n_concepts"] * upper  # positions times layers
        saved += facts["n_tokens"] - as_text - facts["n_concepts"]
        nodes.append(
            PlannedNode(
                node_id=node_id,
                mode=facts["used"],
                n_tokens=facts["n_tokens"],
                n_concepts=facts["n_concepts"],
                positions=facts["positions"],
                prefill_cost=passed / (facts["n_tokens"] * depth) if facts["n_tokens"] else 1.0,
                kv_bytes=round(passed * each),
                why=facts.get("why"),
                parts=facts.get("parts"),
                guard=facts.get("guard"),
            )
        )
    text_positions = account["prompt_positions"] + saved
    return Plan(
        mode=asked.mode,
        nodes=nodes,
        positions=account["prompt_positions"],
        prefill_cost=account["prefill_cost"],
        kv_bytes=account["kv_bytes"],
        text_positions=text_positions,
        text_kv_bytes=text_positions * depth * each,
        dropped=account["dropped"],
        reading=asked.reading.account(asked.mode, account),
    )


def _layers_of_a_concept(depth: int, entry_layer: int, account: dict[str, Any]) -> float:
    """Layers that a concept passes; in the mean over the prompt's where it is narrowed, whatever passage it is of."""
    narrowing, n = account.get("narrowing"), sum(int(facts["n_concepts"]) for facts in account["nodes"].values())
    if narrowing is None or not n:
        return depth - entry_layer
    layer, kept = int(narrowing["layer"]), int(narrowing["concepts"])
    return layer - entry_layer + kept / n * (depth - layer)


def _answer(
    asked: Asked,
    account: dict[str, Any],
    nodes: Sequence[NodeWithScore],
    ticket: Ticket,
    retrieval_s: float,
    begun: float,
    said: Conversation | None = None,
) -> Answer:
    read = account["nodes"]
    citations = [
        Citation(
            **found.model_dump(exclude={"text"}),
            mode=read[found.node_id]["used"],
            n_tokens=read[found.node_id]["n_tokens"],
            n_concepts=read[found.node_id]["n_concepts"],
        )
        for found in _found(nodes)
        if found.node_id in read
    ]
    times = {name: float(account.get(name, 0.0)) for name in ("fetch_s", "layout_s", "prefill_s", "decode_s")}
    return Answer(
        answer=account["answer"],
        mode=asked.mode,
        citations=citations,
        finish_reason=account["finish_reason"],
        positions=account["prompt_positions"],
        new_tokens=account.get("new_tokens", 0),
        reused_positions=account.get("reused_positions", 0),
        prefill_cost=account.get("prefill_cost"),
        kv_bytes=account.get("kv_bytes", 0),
        reading=asked.reading.account(asked.mode, account),
        ttft_s=account.get("ttft_s", 0.0),
        timings=Timings(
            queue_s=ticket.queue_s + float(account.get("queue_s", 0.0)),
            retrieval_s=retrieval_s,
            total_s=time.perf_counter() - begun,
            **times,
        ),
        session_id=said.session_id if said else None,
        question=account.get("question") if said else None,
        turns=account.get("turns", 0),
        turns_dropped=account.get("turns_dropped", 0),
    )

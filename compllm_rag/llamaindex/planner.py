"""From retrieved nodes to a prompt plan: which passage enters how, what fits, and what each cost."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llama_index.core.llms import ChatMessage, MessageRole
from llama_index.core.prompts import BasePromptTemplate, ChatPromptTemplate
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle

from compllm_rag.config import MissingPolicy, Mode, OverflowPolicy
from compllm_rag.errors import PromptTooLongError
from compllm_rag.library import ConceptLibrary, Fetched
from compllm_rag.prompt import (
    QUESTION,
    SLOT,
    ConceptSpan,
    Message,
    PromptPlan,
    PromptTemplate,
    Slot,
    Span,
    TextSpan,
    qa_messages,
)

if TYPE_CHECKING:
    from llama_index.core.llms.llm import LLM

Chooser = Callable[[NodeWithScore], Mode]
Queued = Callable[[Sequence[str]], Collection[str]]

# The very messages of `compllm_rag.prompt.QAPrompt`, as LlamaIndex writes them.
DEFAULT_TEMPLATE = ChatPromptTemplate(
    message_templates=[
        ChatMessage(
            role=MessageRole(message.role),
            content="".join("{context_str}" if isinstance(piece, Slot) else piece for piece in message.content),
        )
        for message in qa_messages(QUESTION + "{query_str}")
    ]
)


@dataclass(frozen=True)
class NodeFacts:
    """What became of one node in the prompt; plain values only, it ends up in `response.metadata`."""

    node_id: str
    used: Mode
    n_tokens: int
    n_concepts: int
    positions: int
    hits: int
    misses: int


@dataclass(frozen=True)
class PromptCost:
    """What a prompt takes of the LLM.

    Attributes:
        prefill: Positions times the layers they pass, as a share of what the same prompt as text would take.
        kv_bytes: Bytes of its KV cache.
    """

    prefill: float
    kv_bytes: int

    @classmethod
    def of(cls, plan: PromptPlan, facts: Sequence[NodeFacts], library: ConceptLibrary) -> PromptCost:
        """The cost of a plan; concepts pass the layers from the entry layer on, text all of them."""
        concepts = sum(fact.n_concepts for fact in facts)
        replaced = sum(fact.n_tokens for fact in facts if fact.used == "concepts")
        depth, upper = library.spec.depth, library.spec.depth - library.spec.config.entry_layer
        passed = (plan.positions - concepts) * depth + concepts * upper  # positions times layers
        return cls(passed / ((plan.positions - concepts + replaced) * depth), passed * library.llm.kv_bytes)


@dataclass(frozen=True)
class PlannedPrompt:
    """A plan, the nodes in it, and the account of both.

    Attributes:
        plan: What the LLM will read.
        nodes: The nodes in it, in the order of their markers.
        facts: One entry per node in it.
        dropped: Ids of the nodes that did not fit.
        fetch_s: Seconds spent reading concepts from the store.
        compress_s: Seconds spent compressing what was missing.
        layout_s: Seconds spent on tokens and spans.
        seconds: Wall time from nodes in hand to the plan.
        cost: What reading it takes, beside the same prompt as text.
    """

    plan: PromptPlan
    nodes: list[NodeWithScore]
    facts: list[NodeFacts]
    dropped: list[str]
    fetch_s: float
    compress_s: float
    layout_s: float
    seconds: float
    cost: PromptCost

    def account(self) -> dict[str, Any]:
        """The account as plain values."""
        return {
            "prompt_positions": self.plan.positions,
            "prefill_cost": self.cost.prefill,
            "kv_bytes": self.cost.kv_bytes,
            "fetch_s": self.fetch_s,
            "compress_s": self.compress_s,
            "layout_s": self.layout_s,
            "nodes": {f.node_id: {k: v for k, v in asdict(f).items() if k != "node_id"} for f in self.facts},
            "dropped": self.dropped,
            "store": {"hits": sum(f.hits for f in self.facts), "misses": sum(f.misses for f in self.facts)},
        }


@dataclass(frozen=True)
class NodeBody:
    """What stands for one node's text, and what it took to have it.

    Attributes:
        spans: In reading order; text and concepts may mix.
        hits: Segments found in the store.
        misses: Segments not found.
        fetch_s: Seconds spent reading concepts from the store.
        compress_s: Seconds spent compressing what was missing.
    """

    spans: Sequence[Span]
    hits: int = 0
    misses: int = 0
    fetch_s: float = 0.0
    compress_s: float = 0.0


class Planner:
    """Lays out, for each node, a plain-text marker `[i] title` and then the node's text, as concepts or as text.

    Args:
        library: Knows every passage's segments and concepts.
        text_qa_template: Any LlamaIndex template with `{context_str}` and `{query_str}`; may be set anew at any time.
        llm: For templates that differ by LLM.
        mode: How passages enter, unless `choose` says otherwise.
        missing: What to do when concepts are not stored.
        overflow: Drop the nodes of lowest rank that do not fit (and say so), or raise.
        choose: Decides for each node by itself.
        queued: Tells which of some node ids have concepts in the making; those are read as text meanwhile.
    """

    def __init__(
        self,
        library: ConceptLibrary,
        text_qa_template: BasePromptTemplate = DEFAULT_TEMPLATE,
        *,
        llm: LLM | None = None,
        mode: Mode = "concepts",
        missing: MissingPolicy = "recompress",
        overflow: OverflowPolicy = "drop",
        choose: Chooser | None = None,
        queued: Queued | None = None,
    ) -> None:
        self.library, self.mode, self.missing, self.overflow, self.choose = library, mode, missing, overflow, choose
        self.text_qa_template, self.llm, self.queued = text_qa_template, llm, queued
        self.template = PromptTemplate(library.llm.tokenizer)

    def plan(self, query: str | QueryBundle, nodes: Sequence[NodeWithScore], budget: int) -> PlannedPrompt:
        """Plan one prompt.

        Args:
            query: What is asked.
            nodes: Best first.
            budget: Positions the prompt may take.

        Raises:
            PromptTooLongError: The question alone does not fit, or the passages do not and `overflow` is "error".
            MissingConceptsError: See `ConceptLibrary.fetch`.
            ConfigurationError: See `PromptTemplate.spans`.
        """
        begun = time.perf_counter()
        bundle = QueryBundle(query) if isinstance(query, str) else query
        messages = self.messages(bundle.query_str)
        left = budget - sum(map(len, self.template.spans(messages, [])))
        if left < 0:
            raise PromptTooLongError(
                "question and prompt template do not fit the window of the LLM",
                got=f"{budget - left} positions",
                expected=f"at most {max(budget, 0)}, the answer's positions set aside",
                next_step="shorten the question or lower max_new_tokens",
            )
        spans: list[Span] = []
        facts: list[NodeFacts] = []
        fetch_s = compress_s = 0.0
        queued = self.queued([node.node.node_id for node in nodes]) if self.queued else ()
        for i, node in enumerate(nodes):
            missing: MissingPolicy = "text" if node.node.node_id in queued else self.missing
            body = self.body(bundle, node, i, missing)
            fetch_s, compress_s = fetch_s + body.fetch_s, compress_s + body.compress_s
            title, metadata = shown_metadata(node.node)
            passage = self.template.passage(i + 1, title, body.spans, metadata)
            fact = self._facts(node, body, sum(map(len, passage)))
            extent = sum(span.extent for span in passage)
            if extent > left:
                break
            left -= extent
            spans += passage
            facts.append(fact)
        dropped = [node.node.node_id for node in nodes[len(facts) :]]
        if dropped and self.overflow == "error":
            raise PromptTooLongError(
                "retrieved passages do not fit the window of the LLM",
                got=f"{len(nodes)} passages, {len(dropped)} of them too many",
                expected=f"{budget} positions in all",
                next_step='lower similarity_top_k, raise the compression rate, or set overflow="drop"',
            )
        plan = PromptPlan(tuple(self.template.spans(messages, spans)))
        seconds = time.perf_counter() - begun
        layout_s = seconds - fetch_s - compress_s
        cost = PromptCost.of(plan, facts, self.library)
        used = list(nodes[: len(facts)])
        return PlannedPrompt(plan, used, facts, dropped, fetch_s, compress_s, layout_s, seconds, cost)

    def messages(self, query: str) -> list[Message]:
        """The turns of the prompt, with a slot for the passages; a planner of your own may add earlier turns."""
        return messages_of(self.text_qa_template, self.llm, query)

    def mode_of(self, query: QueryBundle, node: NodeWithScore) -> Mode:
        """How a node enters; a planner of your own may decide by the query."""
        return self.choose(node) if self.choose else self.mode

    def body(self, query: QueryBundle, node: NodeWithScore, passage: int, missing: MissingPolicy) -> NodeBody:
        """What stands for a node's text; a planner of your own may mix text and concepts within one node.

        Args:
            query: What is asked.
            node: Whose text.
            passage: Number of the passage, from 0.
            missing: What to do when concepts are not stored.
        """
        text = _text(node)
        fetched, fetch_s = Fetched(None, 0, 0, 0.0), 0.0
        if self.mode_of(query, node) == "concepts":
            begun = time.perf_counter()
            fetched = self.library.fetch(text, missing=missing)
            fetch_s = time.perf_counter() - begun - fetched.compress_s
        span: Span = (
            TextSpan(self.library.passage(text).ids, passage) if fetched.concepts is None else fetched.span(passage)
        )
        return NodeBody([span], fetched.hits, fetched.misses, fetch_s, fetched.compress_s)

    def _facts(self, node: NodeWithScore, body: NodeBody, positions: int) -> NodeFacts:
        concepts = [span for span in body.spans if isinstance(span, ConceptSpan)]
        return NodeFacts(
            node.node.node_id,
            "concepts" if concepts else "text",
            len(self.library.passage(_text(node)).ids),
            sum(map(len, concepts)),
            positions,
            body.hits,
            body.misses,
        )


def _text(node: NodeWithScore) -> str:
    return node.node.get_content(metadata_mode=MetadataMode.NONE)


def shown_metadata(node: BaseNode) -> tuple[str, dict[str, Any]]:
    """Title of a node, and whatever other metadata the LLM may see."""
    shown = {k: v for k, v in node.metadata.items() if k not in node.excluded_llm_metadata_keys}
    title = shown.pop("title", None) or shown.pop("file_name", "")
    return str(title), shown


def messages_of(template: BasePromptTemplate, llm: LLM | None, query: str) -> list[Message]:
    """The turns of a LlamaIndex prompt template, with `{context_str}` as the slot for the passages."""
    mark = f"\ue010{secrets.token_hex(8)}\ue011"
    turns: list[ChatMessage] = template.format_messages(llm=llm, context_str=mark, query_str=query)
    out = []
    for turn in turns:
        content: list[str | Slot] = []
        for i, part in enumerate((turn.content or "").split(mark)):
            content += [SLOT, part] if i else [part]
        out.append(Message(turn.role.value, tuple(content)))
    return out

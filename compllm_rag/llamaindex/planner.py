"""From retrieved nodes to a prompt plan: which passage enters how, what fits, and what each cost."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore

from compllm_rag.config import MissingPolicy, Mode, OverflowPolicy
from compllm_rag.errors import PromptTooLongError
from compllm_rag.library import ConceptLibrary
from compllm_rag.prompt import SLOT, ConceptSpan, Message, PromptPlan, PromptTemplate, Slot, Span, TextSpan

if TYPE_CHECKING:
    from llama_index.core.llms.llm import LLM

Chooser = Callable[[NodeWithScore], Mode]
Queued = Callable[[Sequence[str]], Collection[str]]


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
    """

    plan: PromptPlan
    nodes: list[NodeWithScore]
    facts: list[NodeFacts]
    dropped: list[str]
    fetch_s: float
    compress_s: float
    layout_s: float
    seconds: float

    def account(self) -> dict[str, Any]:
        """The account as plain values."""
        return {
            "prompt_positions": self.plan.positions,
            "fetch_s": self.fetch_s,
            "compress_s": self.compress_s,
            "layout_s": self.layout_s,
            "nodes": {f.node_id: {k: v for k, v in asdict(f).items() if k != "node_id"} for f in self.facts},
            "dropped": self.dropped,
            "store": {"hits": sum(f.hits for f in self.facts), "misses": sum(f.misses for f in self.facts)},
        }


@dataclass
class _Clock:
    fetch_s: float = 0.0
    compress_s: float = 0.0
    begun: float = field(default_factory=lambda: time.perf_counter())

    def ended(self) -> tuple[float, float]:
        """Seconds of layout, and of all."""
        seconds = time.perf_counter() - self.begun
        return seconds - self.fetch_s - self.compress_s, seconds


class Planner:
    """Lays out, for each node, a plain-text marker `[i] title` and then the node's text, as concepts or as text.

    Args:
        library: Knows every passage's segments and concepts.
        mode: How passages enter, unless `choose` says otherwise.
        missing: What to do when concepts are not stored.
        overflow: Drop the nodes of lowest rank that do not fit (and say so), or raise.
        choose: Decides for each node by itself.
        queued: Tells which of some node ids have concepts in the making; those are read as text meanwhile.
    """

    def __init__(
        self,
        library: ConceptLibrary,
        *,
        mode: Mode = "concepts",
        missing: MissingPolicy = "recompress",
        overflow: OverflowPolicy = "drop",
        choose: Chooser | None = None,
        queued: Queued | None = None,
    ) -> None:
        self.library, self.mode, self.missing, self.overflow, self.choose = library, mode, missing, overflow, choose
        self.queued = queued
        self.template = PromptTemplate(library.llm.tokenizer)

    def plan(self, messages: Sequence[Message], nodes: Sequence[NodeWithScore], budget: int) -> PlannedPrompt:
        """Plan one prompt.

        Args:
            messages: The conversation around the passages.
            nodes: Best first.
            budget: Positions the prompt may take.

        Raises:
            PromptTooLongError: The question alone does not fit, or the passages do not and `overflow` is "error".
            MissingConceptsError: See `ConceptLibrary.fetch`.
        """
        clock = _Clock()
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
        queued = self.queued([node.node.node_id for node in nodes]) if self.queued else ()
        for i, node in enumerate(nodes):
            missing: MissingPolicy = "text" if node.node.node_id in queued else self.missing
            passage, fact = self._passage(node, i, clock, missing)
            if fact.positions > left:
                break
            left -= fact.positions
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
        used = list(nodes[: len(facts)])
        return PlannedPrompt(plan, used, facts, dropped, clock.fetch_s, clock.compress_s, *clock.ended())

    def _passage(
        self, node: NodeWithScore, i: int, clock: _Clock, missing: MissingPolicy
    ) -> tuple[list[Span], NodeFacts]:
        text = node.node.get_content(metadata_mode=MetadataMode.NONE)
        mode = self.choose(node) if self.choose else self.mode
        hits = misses = 0
        body: Span | None = None
        if mode == "concepts":
            begun = time.perf_counter()
            fetched = self.library.fetch(text, missing=missing)
            clock.fetch_s += time.perf_counter() - begun - fetched.compress_s
            clock.compress_s += fetched.compress_s
            hits, misses = fetched.hits, fetched.misses
            body = None if fetched.concepts is None else ConceptSpan(fetched.concepts, i)
        ids = self.library.passage(text).ids
        n_concepts = len(body) if body is not None else 0
        used: Mode = "text" if body is None else "concepts"
        body = TextSpan(ids, i) if body is None else body
        spans: list[Span] = [self._text(marker(node.node, i + 1)), body, self._text("\n\n")]
        facts = NodeFacts(node.node.node_id, used, len(ids), n_concepts, sum(map(len, spans)), hits, misses)
        return spans, facts

    def _text(self, text: str) -> TextSpan:
        return TextSpan(tuple(self.template.plain(text)))


def marker(node: BaseNode, number: int) -> str:
    """The line in front of a passage: `[i] title`, then whatever other metadata the LLM may see."""
    shown = {k: v for k, v in node.metadata.items() if k not in node.excluded_llm_metadata_keys}
    title = shown.pop("title", None) or shown.pop("file_name", "")
    lines = [f"[{number}] {title}".rstrip(), *(f"{key}: {value}" for key, value in shown.items())]
    return "\n".join(lines) + "\n"


def messages_of(template: BasePromptTemplate, llm: LLM, query: str) -> list[Message]:
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

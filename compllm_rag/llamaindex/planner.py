"""From retrieved nodes to a prompt plan: which passage enters how, what fits, and what each cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.schema import NodeWithScore, QueryBundle

from compllm_rag.compression.rate_policies.guard import guard_facts
from compllm_rag.config import MissingChoice, Mode, OverflowPolicy
from compllm_rag.errors import ConfigurationError, PromptTooLongError
from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.account import LaidOut, NodeBody, NodeFacts, PlannedPrompt, PromptCost
from compllm_rag.llamaindex.heeded import refuse_options
from compllm_rag.llamaindex.node_text import CitedNode, found_spans, text_of_node
from compllm_rag.llamaindex.read_options import (
    READ_OPTIONS,
    ReadOptions,
    known_costs,
    narrowing_of,
    passage_reading,
)
from compllm_rag.llamaindex.read_planning import fixed_body, read_nodes, told
from compllm_rag.llamaindex.templates import (
    DEFAULT_REFINE_TEMPLATE,
    DEFAULT_TEMPLATE,
    chosen,
    concepts_unseen,
    messages_of,
    wants_text,
)
from compllm_rag.prompt import ConceptSpan, Message, PromptPlan, PromptTemplate, TextSpan

if TYPE_CHECKING:
    from llama_index.core.llms.llm import LLM

Chooser = Callable[[NodeWithScore], Mode]
Queued = Callable[[Sequence[str]], Collection[str]]

__all__ = ["Chooser", "NodeBody", "NodeFacts", "PlannedPrompt", "Planner", "PromptCost", "Queued"]


class Planner:
    """Lays out, for each node, a plain-text marker `[i] title` and then the node's text, as concepts or as text.

    Args:
        library: Knows every passage's segments and concepts.
        text_qa_template: Any LlamaIndex template with `{context_str}` and `{query_str}`; may be set anew at any time.
        llm: For templates that differ by LLM.
        mode: How passages enter, unless `choose` says otherwise.
        missing: What to do when concepts are not stored; `auto` is `recompress` or `text`, whichever is sooner.
        overflow: Leave out the nodes that do not fit (and say so), or raise.
        choose: Decides for each node by itself.
        queued: Tells which of some node ids have concepts in the making; those are read as text meanwhile.
        refine_template: The same with `{context_msg}`, `{query_str}` and `{existing_answer}`, to refine an answer.
        instructions: Stand at the end of the request, such as the form of the answer.
        reading: What decides in place of the fixed choice, the rate of concepts, and how they are narrowed; see
            `passage_reading` and `narrowing_of`.

    Raises:
        ConfigurationError: A setting is none that there is, a function of a template would have to see concepts, or
            see `passage_reading` and `narrowing_of`.
        NotCalibratedError, RateOutOfReachError: See `passage_reading`.
    """

    def __init__(
        self,
        library: ConceptLibrary,
        text_qa_template: BasePromptTemplate = DEFAULT_TEMPLATE,
        *,
        llm: LLM | None = None,
        mode: Mode = "concepts",
        missing: MissingChoice = "recompress",
        overflow: OverflowPolicy = "drop",
        choose: Chooser | None = None,
        queued: Queued | None = None,
        refine_template: BasePromptTemplate = DEFAULT_REFINE_TEMPLATE,
        instructions: str = "",
        reading: ReadOptions | None = None,
    ) -> None:
        _check_setting("mode", mode, Mode)
        _check_setting("missing", missing, MissingChoice)
        _check_setting("overflow", overflow, OverflowPolicy)
        self.library, self.mode, self.missing, self.overflow, self.choose = library, mode, missing, overflow, choose
        self.text_qa_template, self.refine_template, self.instructions = text_qa_template, refine_template, instructions
        self.llm, self.queued = llm, queued
        self.template = PromptTemplate(library.llm.tokenizer)
        self.options: ReadOptions = reading or {}
        refuse_options("reading passages", set(self.options) - set(READ_OPTIONS), READ_OPTIONS)
        self.reading = passage_reading(
            library, mode=mode, missing=missing, decides_otherwise=choose is not None, options=self.options
        )
        self.narrowing = narrowing_of(library, mode=mode, decides_otherwise=choose is not None, options=self.options)
        self._at_rate = library.at_rate(self.options.get("rate"))
        self._costs = self.options.get("costs") or known_costs(library, missing)
        if not self._text_alone:
            for template, slot in ((text_qa_template, "context_str"), (refine_template, "context_msg")):
                if slot in (chosen(template, llm).function_mappings or {}):
                    raise concepts_unseen(slot)

    @property
    def _text_alone(self) -> bool:
        """Whether no passage can enter as concepts."""
        return self.mode == "text" and self.choose is None and self.reading is None

    def plan(
        self,
        query: str | QueryBundle,
        nodes: Sequence[NodeWithScore],
        budget: int,
        *,
        existing: str | None = None,
        bodies: Sequence[NodeBody] | None = None,
        overflow: OverflowPolicy | None = None,
        cited: int = 0,
    ) -> PlannedPrompt:
        """Plan one prompt: every node that fits what those before it left, in the order given.

        Args:
            query: What is asked.
            nodes: Best first.
            budget: Positions the prompt may take.
            existing: An answer to refine; None for a first answer.
            bodies: What stands for each node, if that was found out before.
            overflow: For this prompt; None takes the planner's.
            cited: How many sources earlier prompts of the same answer have; those of this one are counted on.

        Raises:
            PromptTooLongError: The question alone does not fit, or no passage does, or not all of them do and
                `overflow` is "error".
            ReadBudgetError: Nothing fits the budget.
            MissingConceptsError: See `ConceptLibrary.fetch`.
            ConfigurationError: See `PromptTemplate.spans`, `templates.messages_of` and `node_text.node_spans`.
        """
        begun = time.perf_counter()
        bundle = QueryBundle(query) if isinstance(query, str) else query
        template = self.text_qa_template if existing is None else self.refine_template
        if self._text_alone and wants_text(template, self.llm, existing=existing):
            return self._plan_text(bundle, nodes, budget, existing, overflow, cited)
        messages = self.messages(bundle.query_str, existing=existing)
        left = self._room(messages, budget)
        prompt = LaidOut([], [], [], [])
        dropped: list[NodeWithScore] = []
        fetch_s = compress_s = 0.0
        queued = self.queued([node.node.node_id for node in nodes]) if self.queued else ()
        made, policy = bodies, None
        if self.reading is not None and bodies is None and nodes:
            tokens = sum(map(len, self.template.spans(self.unread(messages), [])))
            # Whoever asks for an error where something does not fit is not to be spared it by leaving that out.
            window = left if (overflow or self.overflow) == "drop" else None
            read = read_nodes(self.reading, self.template, bundle.query_str, nodes, tokens, queued, window)
            nodes, made, policy = read.nodes, read.bodies, read.account
        for i, node in enumerate(nodes):
            number = len(prompt.nodes)
            head, tail = found_spans(self.template, _label(number + 1, node, cited), node, [])
            if made is None and len(head) + len(tail) + self.least(node) > left:
                dropped.append(node)  # nothing is read or compressed for it
                continue
            missing: MissingChoice = "text" if node.node.node_id in queued else self.missing
            body = self.body(bundle, node, number, missing) if made is None else made[i]
            fetch_s, compress_s = fetch_s + body.fetch_s, compress_s + body.compress_s
            passage = [head, *body.spans, tail]
            extent = sum(span.extent for span in passage)
            if extent > left:
                dropped.append(node)
                continue
            left -= extent
            prompt.add(node, self._facts(node, body, sum(map(len, passage))), body, passage)
        self.check_dropped(prompt.nodes, dropped, budget, overflow)
        if bodies is not None:  # their time belongs to this answer, too
            begun -= fetch_s + compress_s
        plan = PromptPlan(tuple(self.template.spans(messages, prompt.spans)), self.narrowing)
        return replace(self._planned(plan, prompt, dropped, begun, fetch_s, compress_s), read_policy=policy)

    def unread(self, messages: list[Message]) -> list[Message]:
        """Of the turns of a prompt, those that a time as budget has to reckon with; here all of them."""
        return messages

    def _plan_text(
        self,
        query: QueryBundle,
        nodes: Sequence[NodeWithScore],
        budget: int,
        existing: str | None,
        overflow: OverflowPolicy | None,
        cited: int,
    ) -> PlannedPrompt:
        """The same where functions of the template look at the passages' text, or change it.

        How long the prompt is, only they know: all nodes are tried, and if that is too long, one more at a time.
        """
        begun = time.perf_counter()

        def laid_out(tried: Sequence[NodeWithScore]) -> PromptPlan:
            text = "".join(self._readable(_label(number, node, cited), node) for number, node in enumerate(tried, 1))
            messages = self.messages(query.query_str, existing=existing, passages=text)
            return PromptPlan(tuple(self.template.spans(messages, [])))

        self._room([Message("user", (query.query_str,))], budget)
        read: list[NodeWithScore] = list(nodes)
        plan = laid_out(read)
        if plan.extent > budget:
            read = []
            for node in nodes:
                longer = laid_out([*read, node])
                if longer.extent <= budget:
                    read, plan = [*read, node], longer
        dropped = [node for node in nodes if not any(node is other for other in read)]
        self.check_dropped(read, dropped, budget, overflow)
        prompt = LaidOut([], [], [], [])
        for number, node in enumerate(read, 1):
            body = NodeBody([TextSpan(self.library.passage(text_of_node(node.node)).ids, number - 1)])
            spans = found_spans(self.template, _label(number, node, cited), node, body.spans)
            prompt.add(node, self._facts(node, body, sum(map(len, spans))), body, [])
        return self._planned(plan, prompt, dropped, begun, 0.0, 0.0)

    def _readable(self, number: int, node: NodeWithScore) -> str:
        """A node as a function of a template sees it: as it would stand in the prompt."""
        before, after = found_spans(self.template, number, node, [])
        decode = self.template.tokenizer.decode
        return f"{decode(list(before.ids))}{text_of_node(node.node)}{decode(list(after.ids))}"

    def messages(self, query: str, *, existing: str | None = None, passages: str | None = None) -> list[Message]:
        """The turns of the prompt; a planner of your own may add earlier turns.

        Args:
            query: What is asked.
            existing: An answer to refine; None for a first answer.
            passages: Their text, to stand in the prompt; None leaves a slot for them.
        """
        template = self.text_qa_template if existing is None else self.refine_template
        messages = messages_of(template, self.llm, query, existing=existing, passages=passages)
        if self.instructions:
            last = messages[-1]
            messages[-1] = Message(last.role, (*last.content, self.instructions))
        return messages

    def _room(self, messages: list[Message], budget: int) -> int:
        left = budget - sum(map(len, self.template.spans(messages, [])))
        if left < 0:
            raise PromptTooLongError(
                "question and prompt template do not fit the window of the LLM",
                got=f"{budget - left} positions",
                expected=f"at most {max(budget, 0)}, the answer's positions set aside",
                next_step="shorten the question or lower max_new_tokens",
            )
        return left

    def check_dropped(
        self,
        read: Sequence[NodeWithScore],
        dropped: Sequence[NodeWithScore],
        budget: int,
        overflow: OverflowPolicy | None = None,
    ) -> None:
        """Refuse to answer from nothing, and, if so asked, from less than all.

        Raises:
            PromptTooLongError: Nothing was read although there were nodes; or nodes were left out and `overflow` (None:
                the planner's) is "error".
        """
        if not dropped or (read and (overflow or self.overflow) == "drop"):
            return
        names = ", ".join(node.node.node_id for node in dropped)
        raise PromptTooLongError(
            "retrieved passages do not fit the window of the LLM"
            if read
            else "none of the retrieved passages fits the window of the LLM",
            got=f"{len(dropped)} of {len(read) + len(dropped)} passages too many ({names})",
            expected=f"{budget} positions in all",
            next_step='lower similarity_top_k, raise the compression rate, or set overflow="drop"'
            if read
            else "ingest in smaller chunks, or keep long metadata from the LLM (excluded_llm_metadata_keys)",
        )

    def _planned(
        self,
        plan: PromptPlan,
        prompt: LaidOut,
        dropped: Sequence[NodeWithScore],
        begun: float,
        fetch_s: float,
        compress_s: float,
    ) -> PlannedPrompt:
        seconds = time.perf_counter() - begun
        return PlannedPrompt(
            plan,
            prompt.nodes,
            prompt.facts,
            [node.node.node_id for node in dropped],
            fetch_s,
            compress_s,
            seconds - fetch_s - compress_s,
            seconds,
            PromptCost.of(plan, prompt.facts, self.library),
            prompt.bodies,
        )

    def cut(self, answer: str, limit: int) -> str:
        """An answer so far, cut to so many tokens where spelling it anew takes more than generating it did."""
        ids = self.template.plain(answer)
        return answer if len(ids) <= limit else str(self.template.tokenizer.decode(ids[:limit]))

    def mode_of(self, query: QueryBundle, node: NodeWithScore) -> Mode:
        """How a node enters; a planner of your own may decide by the query."""
        if self.choose is None:
            return self.mode
        chosen_mode = self.choose(node)
        _check_setting("choose", chosen_mode, Mode)
        return chosen_mode

    def least(self, node: NodeWithScore) -> int:
        """Fewest positions of the window that a node's body takes, told without its concepts.

        A planner of your own whose `body` takes fewer overrides this too.
        """
        passage = self._at_rate.passage(text_of_node(node.node))
        whole = self.library.spec.config.deep or passage.reason is not None
        return len(passage.ids) if whole else sum(passage.n_concepts)

    def body(self, query: QueryBundle, node: NodeWithScore, passage: int, missing: MissingChoice) -> NodeBody:
        """What stands for a node's text; a planner of your own may mix text and concepts within one node.

        Args:
            query: What is asked.
            node: Whose text.
            passage: Number of the passage, from 0.
            missing: What to do when concepts are not stored; `auto` is `recompress` or `text`, whichever is sooner.
        """
        as_concepts = self.mode_of(query, node) == "concepts"
        return fixed_body(
            self._at_rate,
            text_of_node(node.node),
            passage,
            missing if as_concepts else None,
            self._costs,
            self.narrowing,
        )

    def _facts(self, node: NodeWithScore, body: NodeBody, positions: int) -> NodeFacts:
        concepts = [span for span in body.spans if isinstance(span, ConceptSpan)]
        known = self._at_rate.passage(text_of_node(node.node))
        decided = body.reading is not None
        guarded = f"kept as text by the {known.reason}" if known.reason and not concepts else None
        return NodeFacts(
            node.node.node_id,
            "concepts" if concepts else "text",
            len(known.ids),
            sum(map(len, concepts)),
            positions,
            body.hits,
            body.misses,
            sum(map(len, body.spans)) - sum(map(len, concepts)) if decided else None,
            body.why or guarded,
            told(body.reading) if body.reading is not None else None,
            guard_facts(self.library.chooser.guard, known.expected) if known.reason and not concepts else None,
        )


def _check_setting(name: str, value: object, kind: Any) -> None:
    if value not in get_args(kind):
        raise ConfigurationError(
            f"unknown {name}", got=repr(value), expected=" or ".join(get_args(kind)), next_step="correct it"
        )


def _label(number: int, node: NodeWithScore, cited: int) -> int:
    """The number that a node has in a prompt; sources to be cited are counted through all prompts."""
    return number + cited if isinstance(node, CitedNode) else number

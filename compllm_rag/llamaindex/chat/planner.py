"""The prompt of one turn: opening and earlier turns as text, then this turn's passages and question.

In this order the beginning of a prompt is that of the turn before, so that its KV cache can be gone on with; passages
change from turn to turn and stand behind. An earlier turn is its question and its answer: its passages are not read
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from compllm_rag.errors import PromptTooLongError
from compllm_rag.llamaindex.chat.turns import most_that_fit
from compllm_rag.llamaindex.node_text import shown_metadata
from compllm_rag.llamaindex.planner import PlannedPrompt, Planner
from compllm_rag.llamaindex.templates import messages_of
from compllm_rag.prompt import QUESTION, SLOT, Message

_STEP = 4  # turns that are given up together


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation, as far as it is known before the prompt.

    Attributes:
        message: What the user said.
        question: What passages are looked for by: the message, or the question it was condensed to.
        asked: Which of both the LLM answers.
        system: The system turn; "" leaves it to the chat template.
        head: Messages in front of all turns.
        turns: Earlier turns, the oldest first.
        turns_before: How many there were, those included that a memory gave up by itself.
        condense_s: Seconds that condensing took.
    """

    message: str
    question: str
    asked: str
    system: str = ""
    head: Sequence[Message] = ()
    turns: Sequence[Sequence[Message]] = ()
    turns_before: int = 0
    condense_s: float = 0.0


@dataclass(frozen=True)
class PlannedTurn(PlannedPrompt):
    """A planned prompt with what became of the conversation: `conversation` is added to the account."""

    conversation: dict[str, Any] = field(default_factory=dict)

    def account(self) -> dict[str, Any]:
        """The account as plain values."""
        return {**super().account(), **self.conversation}


class ChatPlanner(Planner):
    """Plans one turn; the oldest turns give way where they do not fit beside passages and question.

    Args:
        base: How passages enter.
        turn: The turn.
        context_prompt: Template of the newest user turn with `{context_str}` and perhaps `{query_str}`; None gives the
            passages and `Question: ...`.
    """

    def __init__(self, base: Planner, turn: Turn, context_prompt: BasePromptTemplate | None) -> None:
        super().__init__(
            base.library,
            base.text_qa_template,
            llm=base.llm,
            mode=base.mode,
            missing=base.missing,
            overflow=base.overflow,
            choose=base.choose,
            queued=base.queued,
            reading=base.options,
        )
        self.turn, self.context_prompt, self._n_turns, self._passages = turn, context_prompt, len(turn.turns), True

    def messages(self, query: str, *, existing: str | None = None, passages: str | None = None) -> list[Message]:
        """The conversation, as much of it as fits, and the newest user turn."""
        return self._messages(self._n_turns)

    def unread(self, messages: list[Message]) -> list[Message]:
        """Without the earlier turns, which the turn before has read."""
        return self._messages(0)

    def plan(
        self, query: str | QueryBundle, nodes: Sequence[NodeWithScore], budget: int, **options: Any
    ) -> PlannedPrompt:
        """Plan the turn; see `Planner.plan`."""
        bundle = QueryBundle(query) if isinstance(query, str) else query
        self._passages = bool(nodes)
        if self.reading is not None and nodes:
            n, planned = self._plan_read(bundle, nodes, budget, options)
        else:
            extents = [self._extent(bundle, node, i) for i, node in enumerate(nodes)]
            n = self._in_steps(most_that_fit(len(self.turn.turns), lambda n: self._fits(n, sum(extents), budget)))
            if not n and self.turn.turns and self.overflow == "drop" and self._fits(1, sum(extents[:1]), budget):
                n = 1  # what was just said is worth more than the last passages
            self._n_turns = n
            planned = super().plan(bundle, nodes, budget, **options)
        conversation = {
            "question": self.turn.question,
            "condense_s": self.turn.condense_s,
            "turns": n,
            "turns_dropped": self.turn.turns_before - n,
        }
        return PlannedTurn(**{f.name: getattr(planned, f.name) for f in fields(planned)}, conversation=conversation)

    def _plan_read(
        self, query: QueryBundle, nodes: Sequence[NodeWithScore], budget: int, options: dict[str, Any]
    ) -> tuple[int, PlannedPrompt]:
        """A turn whose passages a read policy decides about: only then is it known what they leave to earlier turns."""
        self._n_turns = min(1, len(self.turn.turns))  # what was just said is worth more than the last passages
        try:
            first = super().plan(query, nodes, budget, **options)
        except PromptTooLongError:
            if not self._n_turns:
                raise
            self._n_turns = 0
            first = super().plan(query, nodes, budget, **options)
        passages = first.plan.extent - sum(map(len, self.template.spans(self._messages(self._n_turns), [])))
        n = self._in_steps(most_that_fit(len(self.turn.turns), lambda n: self._fits(n, passages, budget)))
        if n <= self._n_turns:
            return self._n_turns, first
        self._n_turns = n
        again = super().plan(query, first.nodes, budget, **{**options, "bodies": first.bodies})
        spent = max(0.0, again.seconds - again.fetch_s - again.compress_s)  # they count in both
        return n, replace(
            again,
            read_policy=first.read_policy,
            dropped=[*first.dropped, *again.dropped],
            seconds=first.seconds + spent,
        )

    def _in_steps(self, n: int) -> int:
        """Turns to keep of `n` that fit: some are given up together, so that the beginning then stays for a while."""
        given_up = self.turn.turns_before - n
        if n == len(self.turn.turns):
            return n
        return max(min(n, 1), self.turn.turns_before - -(-given_up // _STEP) * _STEP)

    def _messages(self, n_turns: int) -> list[Message]:
        kept = self.turn.turns[len(self.turn.turns) - n_turns :]
        system = [Message("system", (self.turn.system,))] if self.turn.system else []
        return [*system, *self.turn.head, *(message for turn in kept for message in turn), self._newest()]

    def _newest(self) -> Message:
        asked = self.turn.asked
        if not self._passages:
            return Message("user", (asked,))
        if self.context_prompt is None:
            return Message("user", (SLOT, QUESTION + asked))
        [message] = messages_of(self.context_prompt, self.llm, asked, optional=("query_str",))
        if "query_str" in self.context_prompt.template_vars:
            return Message("user", message.content)
        return Message("user", (*message.content, "\n\n" + asked))

    def _fits(self, n_turns: int, passages: int, budget: int) -> bool:
        return sum(map(len, self.template.spans(self._messages(n_turns), []))) + passages <= budget

    def _extent(self, query: QueryBundle, node: NodeWithScore, number: int) -> int:
        """Positions that a passage takes, near enough: what is missing in the store may be read as text."""
        passage = self._at_rate.passage(node.node.get_content(MetadataMode.NONE))
        deep = self.library.spec.config.deep
        sure = not deep and self.missing not in ("text", "auto") and self.reading is None
        concepts = sure and self.mode_of(query, node) == "concepts"
        body = sum(passage.n_concepts) if concepts and passage.reason is None else len(passage.ids)
        title, metadata = shown_metadata(node.node)
        return body + sum(map(len, self.template.passage(number + 1, title, [], metadata)))

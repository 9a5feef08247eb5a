"""Which nodes are read in which prompt: LlamaIndex's response modes, as far as they make sense with concepts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from llama_index.core.response_synthesizers.type import ResponseMode as StockMode
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from compllm_rag.errors import ConfigurationError, PromptTooLongError
from compllm_rag.llamaindex.account import PlannedPrompt
from compllm_rag.llamaindex.planner import Planner
from compllm_rag.llamaindex.tracing import traced_plan

ResponseMode = Literal["simple_summarize", "compact", "refine", "no_text", "context_only"]
DEFAULT_MODE: ResponseMode = "simple_summarize"


def checked_mode(mode: str | StockMode | None) -> ResponseMode:
    """A response mode by its name, LlamaIndex's enumeration or None for the default.

    Raises:
        ConfigurationError: It is none of those that concepts can be read in.
    """
    name = mode.value if isinstance(mode, StockMode) else mode or DEFAULT_MODE
    for known in get_args(ResponseMode):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise ConfigurationError(
        "response_mode is not supported",
        got=name,
        expected=", ".join(get_args(ResponseMode)),
        next_step="take one of these; compact reads passages that exceed the window in several prompts",
    )


def silent_answer(mode: ResponseMode, nodes: Sequence[NodeWithScore]) -> str | None:
    """What a mode that never runs the LLM answers; None for those that run it."""
    if mode == "no_text":
        return ""
    if mode == "context_only":
        return "\n\n".join(node.node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes)
    return None


def allot(
    planner: Planner,
    query: QueryBundle,
    nodes: Sequence[NodeWithScore],
    *,
    mode: ResponseMode,
    budget: int,
    answer_room: int,
) -> tuple[list[PlannedPrompt], list[str]]:
    """The prompts of one answer, before anything is generated.

    `simple_summarize` makes one prompt and leaves out what does not fit. `compact` fills one prompt after the other,
    `refine` takes a prompt for each node; both leave out only what does not fit a prompt by itself.

    Args:
        planner: Lays them out.
        query: What is asked.
        nodes: Best first, at least one.
        mode: One that runs the LLM.
        budget: Positions a prompt may take.
        answer_room: Of these, positions to keep free in every prompt but the first for the answer so far.

    Returns:
        At least one prompt (all but the first lack the answer so far), and the ids of the nodes left out.

    Raises:
        PromptTooLongError: No node fits, or not all of them do and the planner's `overflow` is "error".
    """
    if mode == "simple_summarize":
        planned = traced_plan(planner, query, nodes, budget)
        return [planned], planned.dropped
    prompts: list[PlannedPrompt] = []
    waiting = [[node] for node in nodes] if mode == "refine" else [list(nodes)]
    dropped: list[NodeWithScore] = []
    while waiting:
        group = waiting.pop(0)
        try:
            made = (
                traced_plan(planner, query, group, budget - answer_room, existing="", overflow="drop")
                if prompts
                else traced_plan(planner, query, group, budget, overflow="drop")
            )
        except PromptTooLongError:
            dropped += group
            continue
        prompts.append(made)
        rest = [node for node in group if not any(node is read for read in made.nodes)]
        waiting += [rest] if rest else []
    if not prompts:
        planner.plan(query, [], budget)  # says so if it is the question that is too long
    planner.check_dropped([node for made in prompts for node in made.nodes], dropped, budget)
    return prompts, [node.node.node_id for node in dropped]

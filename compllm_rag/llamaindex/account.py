"""What a planned prompt is made of, and the account of it that ends up in `response.metadata["compllm"]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llama_index.core.schema import NodeWithScore

from compllm_rag.config import Mode
from compllm_rag.generation.costs import layers_passed
from compllm_rag.library import ConceptLibrary
from compllm_rag.models.narrowing import kept_concepts
from compllm_rag.prompt import PromptPlan, Span
from compllm_rag.reading.choice import Reading as NodeReading


@dataclass(frozen=True)
class NodeFacts:
    """What became of one node in the prompt; plain values only, it ends up in `response.metadata`.

    Attributes:
        node_id: Of the node.
        used: `concepts` if any of it was read as such.
        n_tokens: Of its text.
        n_concepts: Those read.
        positions: Prompt positions, its number, title and metadata included.
        hits: Segments found in the store.
        misses: Segments not found.
        n_text: Of its tokens, those read as text; None where all of it was read in one way.
        why: Why it was read like that, where something was decided.
        parts: Where a read policy decided: what each run of its tokens was read as.
        guard: Where it was left as text when it was ingested: `by` which guard, what was `expected` of it, the `limit`.
    """

    node_id: str
    used: Mode
    n_tokens: int
    n_concepts: int
    positions: int
    hits: int
    misses: int
    n_text: int | None = None
    why: str | None = None
    parts: list[dict[str, Any]] | None = None
    guard: dict[str, Any] | None = None

    @property
    def read_as_text(self) -> int:
        """Its tokens that were read as text."""
        if self.n_text is not None:
            return self.n_text
        return self.n_tokens if self.used == "text" else 0

    def account(self) -> dict[str, Any]:
        """As it stands in the account, without what there is not."""
        held = asdict(self)
        optional = ("n_text", "why", "parts", "guard")
        return {k: v for k, v in held.items() if k != "node_id" and (k not in optional or v is not None)}


@dataclass(frozen=True)
class PromptCost:
    """What a prompt takes of the LLM.

    Attributes:
        passed: Positions times the layers they pass.
        as_text: The same for the same prompt as text.
        kv_bytes: Bytes of its KV cache.
        kept: Where it is narrowed: concepts that are read from layer T on.
    """

    passed: int
    as_text: int
    kv_bytes: int
    kept: int | None = None

    @property
    def prefill(self) -> float:
        """What it takes to read it, as a share of what the same prompt as text would take."""
        return self.passed / self.as_text

    @classmethod
    def of(cls, plan: PromptPlan, facts: Sequence[NodeFacts], library: ConceptLibrary) -> PromptCost:
        """The cost of a plan; concepts pass the layers from the entry layer on, or up to layer T, text all of them."""
        concepts = sum(fact.n_concepts for fact in facts)
        replaced = sum(fact.n_tokens - fact.read_as_text for fact in facts)  # as concepts, or left out of what is read
        depth, layer, narrowing = library.spec.depth, library.spec.config.entry_layer, plan.narrowing
        passed = (plan.positions - concepts) * depth  # positions times layers
        passed += layers_passed(concepts, entry_layer=layer, depth=depth, narrowing=narrowing)
        kept = None if narrowing is None else kept_concepts(concepts, narrowing.share)
        return cls(passed, (plan.positions - concepts + replaced) * depth, passed * library.llm.kv_bytes, kept)


@dataclass(frozen=True)
class NodeBody:
    """What stands for one node's text, and what it took to have it.

    Attributes:
        spans: In reading order; text and concepts may mix.
        hits: Segments found in the store.
        misses: Segments not found.
        fetch_s: Seconds spent reading concepts from the store.
        compress_s: Seconds spent compressing what was missing.
        reading: What a read policy decided.
        why: Why it is read like that, where something was decided.
        bypassed: Its concepts are missing, and text is sooner than making them.
    """

    spans: Sequence[Span]
    hits: int = 0
    misses: int = 0
    fetch_s: float = 0.0
    compress_s: float = 0.0
    reading: NodeReading | None = None
    why: str | None = None
    bypassed: bool = False


@dataclass(frozen=True)
class LaidOut:
    """The nodes in a prompt so far, and their spans."""

    nodes: list[NodeWithScore]
    facts: list[NodeFacts]
    bodies: list[NodeBody]
    spans: list[Span]

    def add(self, node: NodeWithScore, facts: NodeFacts, body: NodeBody, spans: Sequence[Span]) -> None:
        """Put one more node behind them."""
        self.nodes.append(node)
        self.facts.append(facts)
        self.bodies.append(body)
        self.spans.extend(spans)


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
        bodies: What stands for the nodes in it, so that the prompt can be laid out once more around them.
        read_policy: Where one decided: its name, the budget and what is taken of it, and whom it left out, and why.
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
    bodies: list[NodeBody]
    read_policy: dict[str, Any] | None = None

    def account(self) -> dict[str, Any]:
        """The account as plain values."""
        return {
            "prompts": 1,
            "prompt_positions": self.plan.positions,
            "prefill_cost": self.cost.prefill,
            "kv_bytes": self.cost.kv_bytes,
            "fetch_s": self.fetch_s,
            "compress_s": self.compress_s,
            "layout_s": self.layout_s,
            "nodes": {f.node_id: f.account() for f in self.facts},
            "dropped": self.dropped,
            "store": {"hits": sum(f.hits for f in self.facts), "misses": sum(f.misses for f in self.facts)},
            "bypassed": sum(body.bypassed for body in self.bodies),
            **({} if self.read_policy is None else {"read_policy": self.read_policy}),
            **self._narrowed(),
        }

    def _narrowed(self) -> dict[str, Any]:
        if self.plan.narrowing is None or self.cost.kept is None:
            return {}
        return {"narrowing": {**self.plan.narrowing.model_dump(), "concepts": self.cost.kept}}


@dataclass(frozen=True)
class Reading:
    """The last prompt of an answer, and what came before it.

    Attributes:
        planned: The prompt that the answer is still to be generated from.
        nodes: Those of all prompts, in the order in which they are read.
        account: Of all prompts; completed when the answer ends.
        earlier: Completed accounts of the prompts before the last.
    """

    planned: PlannedPrompt
    nodes: list[NodeWithScore]
    account: dict[str, Any]
    earlier: list[dict[str, Any]]


def empty_account(answer: str) -> dict[str, Any]:
    """The account of an answer that no prompt was made for: nothing was retrieved, or nothing was to be answered."""
    names = ("fetch_s", "compress_s", "layout_s", "prefill_s", "decode_s", "ttft_s", "queue_s")
    return {
        "prompts": 0,
        "prompt_positions": 0,
        "prefill_cost": None,
        "kv_bytes": 0,
        "nodes": {},
        "dropped": [],
        "store": {"hits": 0, "misses": 0},
        "bypassed": 0,
        "answer": answer,
        "finish_reason": "stop",
        "new_tokens": 0,
        "reused_positions": 0,
        **dict.fromkeys(names, 0.0),
    }


def joined_account(prompts: Sequence[PlannedPrompt], dropped: Sequence[str]) -> dict[str, Any]:
    """The account of an answer that several prompts were made for, one behind the other.

    Counts and times are sums; `kv_bytes` is that of the largest prompt, since each cache is gone before the next.

    Args:
        prompts: At least one.
        dropped: Ids of the nodes that fitted none of them.
    """
    accounts = [planned.account() for planned in prompts]
    out = {
        **accounts[0],
        "prompts": len(prompts),
        "prefill_cost": sum(p.cost.passed for p in prompts) / sum(p.cost.as_text for p in prompts),
        "kv_bytes": max(p.cost.kv_bytes for p in prompts),
        "nodes": {name: facts for account in accounts for name, facts in account["nodes"].items()},
        "dropped": list(dropped),
        "store": {name: sum(account["store"][name] for account in accounts) for name in ("hits", "misses")},
    }
    narrowed = [account["narrowing"] for account in accounts if "narrowing" in account]
    if narrowed:
        out["narrowing"] = {**narrowed[0], "concepts": sum(each["concepts"] for each in narrowed)}
    for name in ("prompt_positions", "fetch_s", "compress_s", "layout_s", "bypassed"):
        out[name] = sum(account[name] for account in accounts)
    return out


def add_earlier(account: dict[str, Any], earlier: Sequence[dict[str, Any]]) -> None:
    """Add what earlier prompts of the same answer took to a completed account.

    Args:
        account: Of the answer, completed by its last prompt.
        earlier: Completed accounts of the prompts before it.
    """
    for done in earlier:
        for name in ("new_tokens", "reused_positions", "prefill_s", "decode_s", "layout_s", "queue_s"):
            account[name] += done[name]
        account["ttft_s"] += done["ttft_s"] + done["decode_s"]

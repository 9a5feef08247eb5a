"""Where concepts are missing: is a passage read sooner as text than compressed in line and read as concepts?"""

from __future__ import annotations

from dataclasses import dataclass

from compllm_rag.config import CompressorConfig, Narrowing
from compllm_rag.generation.costs import CostModel
from compllm_rag.library import ConceptLibrary


@dataclass(frozen=True)
class Crossover:
    """Both ways to read a passage whose concepts are missing.

    Attributes:
        text: What reading it as text takes.
        concepts: What making its missing concepts takes, and reading them.
        unit: `s`, or `text tokens` where no cost model tells the seconds.
        compress_s: Of that, seconds of making them; 0 where no cost model tells.
    """

    text: float
    concepts: float
    unit: str
    compress_s: float = 0.0

    @property
    def reads_text(self) -> bool:
        """Whether text is sooner; of equals text, which loses nothing."""
        return self.text <= self.concepts

    @property
    def why(self) -> str:
        """In plain words."""
        made, read = (
            f"{value:.2f} s" if self.unit == "s" else f"{value:.0f} {self.unit}" for value in (self.concepts, self.text)
        )
        return f"its concepts are not stored: making and reading them takes about {made}, reading its text {read}"


def crossover(
    library: ConceptLibrary, text: str, costs: CostModel | None = None, narrowing: Narrowing | None = None
) -> Crossover | None:
    """Compare both ways for one passage; None where no concepts are missing.

    Args:
        library: Knows what is stored, at the rate that is meant.
        text: The passage.
        costs: What was measured on this machine; None counts the layers that every token passes.
        narrowing: Of the prompt. Where seconds were measured, they are those of whole prompts, and are taken to shrink
            as the layers do.
    """
    there = library.at_hand(text)
    if all(there):
        return None
    passage, spec = library.passage(text), library.spec
    missing = [i for i, stored in enumerate(there) if not stored]
    tokens, new = sum(len(passage.segments[i]) for i in missing), sum(passage.n_concepts[i] for i in missing)
    n, concepts, depth = len(passage.ids), sum(passage.n_concepts), spec.depth
    if costs is None:
        passes = _layers_passed(spec.config, depth, tokens, new, len(missing))
        return Crossover(n, passes / depth + concepts * spec.prefill_cost(1.0, narrowing), "text tokens")
    made = costs.compress_s(tokens)
    reads = costs.upper(concepts) if costs.upper is not None else costs.whole(concepts)
    reads *= spec.prefill_cost(1.0, narrowing) / spec.prefill_cost(1.0)
    return Crossover(costs.prefill_s(n, 0), made + reads, "s", made)


def _layers_passed(config: CompressorConfig, depth: int, tokens: int, concepts: int, units: int) -> float:
    """Layers times positions of making concepts."""
    if not config.deep:  # the segment, and behind it a position for each concept
        return float((config.layers or depth) * (tokens + concepts))
    positions = tokens + units * len(config.opening)
    choosing = 0
    if concepts < tokens:  # a choice of tokens wants scores, which take a pass of their own
        choosing = {"information+surprisal": depth, "learned": config.entry_layer}.get(config.selector, 0)
    return float((config.entry_layer + choosing) * positions)

"""The speed of this machine with the LLM and the compressor of a library."""

from __future__ import annotations

from collections.abc import Callable

from compllm_rag.generation.calibration import calibrate, save_costs
from compllm_rag.generation.costs import CostModel
from compllm_rag.library import ConceptLibrary


def calibrated(
    library: ConceptLibrary, *, seconds: float = 20.0, progress: Callable[[str, float | None], None] | None = None
) -> CostModel:
    """Measure, and keep in the user's cache folder; see `compllm_rag.generation.calibration.calibrate`.

    Args:
        library: With the LLM and the compressor; this is where it is loaded.
        seconds: Time to spend, about.
        progress: Called with a message and a share from 0 to 1.
    """
    compressor, longest = library.compressor, library.spec.config.longest_unit

    def compress(ids: list[int]) -> object:
        units = [ids[at : at + longest] for at in range(0, len(ids), longest)]
        return compressor.compress(units, library.policy.n_concepts(units))

    halves = None if library.halves is None else library.halves.merged()
    found = calibrate(library.llm, halves, compress, seconds=seconds, progress=progress)
    save_costs(found)
    return found

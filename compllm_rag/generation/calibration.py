"""How fast this machine reads: measured once, and kept in the user's cache folder for each LLM, dtype and so on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from compllm_rag.errors import NotCalibratedError
from compllm_rag.fingerprint import mapping_digest
from compllm_rag.generation.costs import CostModel, Curve
from compllm_rag.generation.forward import WholeForward
from compllm_rag.models.cache import default_cache_dir
from compllm_rag.models.halves import Halves
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import PromptInputs

Progress = Callable[[str, float | None], None]
LENGTHS = (32, 128, 256, 512, 1024)
_ROUNDS = 5
_CHUNK = 200  # tokens that are compressed to see what that takes


@dataclass(frozen=True)
class Machine:
    """What a calibration holds for.

    Attributes:
        identity: Of the LLM.
        entry_layer: L; 0 where there are no halves.
        dtype: Compute dtype.
        device: The kind of device.
        threads: Of torch.
    """

    identity: str
    entry_layer: int
    dtype: str
    device: str
    threads: int

    @classmethod
    def of(cls, llm: TargetLLM, entry_layer: int) -> Machine:
        """This process, with an LLM."""
        dtype = str(llm.dtype).removeprefix("torch.")
        return cls(llm.identity, entry_layer, dtype, llm.device.type, torch.get_num_threads())

    def file(self, folder: Path | None = None) -> Path:
        """Where its calibration lies.

        Args:
            folder: Cache folder; None is the user's.
        """
        fields = {name: str(getattr(self, name)) for name in self.__dataclass_fields__}
        name = mapping_digest("compllm-rag/calibration", fields)[:16]
        return (folder or default_cache_dir()) / "calibration" / f"{name}.json"


def saved_costs(llm: TargetLLM, entry_layer: int, folder: Path | None = None) -> CostModel | None:
    """What was measured for this LLM in a process like this; None where nothing was.

    Args:
        llm: The target LLM.
        entry_layer: L.
        folder: Cache folder; None is the user's.

    Raises:
        UnsupportedFormatError: The file is damaged.
    """
    file = Machine.of(llm, entry_layer).file(folder)
    return CostModel.from_json(file.read_text(encoding="utf-8")) if file.exists() else None


def needed_costs(llm: TargetLLM, entry_layer: int) -> CostModel:
    """What was measured for this LLM in a process like this.

    Raises:
        NotCalibratedError: Nothing was.
        UnsupportedFormatError: The file is damaged.
    """
    found = saved_costs(llm, entry_layer)
    if found is None:
        here = Machine.of(llm, entry_layer)
        raise NotCalibratedError(
            "nobody has measured how fast this machine reads",
            got=f"no calibration of {llm.source} in {here.dtype} on {here.device} with {here.threads} threads",
            expected="one, measured once",
            next_step="compllm-rag calibrate --storage STORAGE, or index.calibrate()",
        )
    return found


def save_costs(costs: CostModel, folder: Path | None = None) -> Path:
    """Keep a calibration; one that was there before is replaced as a whole."""
    fields = {name: getattr(costs, name) for name in Machine.__dataclass_fields__}
    file = Machine(**fields).file(folder)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{time.time_ns()}.tmp")
    scratch.write_text(costs.to_json(), encoding="utf-8")
    scratch.replace(file)
    return file


def calibrate(
    llm: TargetLLM,
    halves: Halves | None,
    compress: Callable[[list[int]], object],
    *,
    seconds: float = 20.0,
    lengths: Sequence[int] = LENGTHS,
    progress: Progress | None = None,
) -> CostModel:
    """Measure what an LLM takes: whole, its halves, and making concepts.

    Prompts of ordinary tokens, all lengths in turns, so that a noisy machine bothers all alike; medians count. One
    round is measured however long it takes, further ones while there is time.

    Args:
        llm: The target LLM.
        halves: Of deep concepts, merged as generation has them; None for concepts at the input embeddings.
        compress: Makes concepts of token ids.
        seconds: Time to spend, about.
        lengths: Positions of the prompts; those that the LLM's window does not hold are left out.
        progress: Called with a message and a share from 0 to 1.
    """
    fitting = [n for n in lengths if n <= llm.window] or [llm.window]
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    for n in fitting:
        embeddings = llm.embed(_tokens(llm, n))[None]  # (1, n, hidden_size)
        calls["whole", n] = _whole(llm, embeddings)
        if halves is not None and halves.layer:
            calls["lower", n], calls["upper", n] = _lower(halves, embeddings), _upper(halves, embeddings)
    chunk = min(_CHUNK, llm.window)
    calls["compress", chunk] = lambda: compress(_tokens(llm, chunk))
    found = _measured(llm, calls, seconds, progress)
    curves = {name: _curve(name, fitting, found) for name in ("whole", "lower", "upper")}
    here = Machine.of(llm, 0 if halves is None else halves.layer)
    return CostModel(
        llm=llm.source,
        **{name: getattr(here, name) for name in Machine.__dataclass_fields__},
        depth=llm.depth,
        whole=Curve.fitted(fitting, [found["whole", n] for n in fitting]),
        lower=curves["lower"],
        upper=curves["upper"],
        compress_s_per_token=found["compress", chunk] / chunk,
        longest=max(fitting),
    )


def _curve(name: str, lengths: Sequence[int], found: dict[tuple[str, int], float]) -> Curve | None:
    there = [n for n in lengths if (name, n) in found]
    return Curve.fitted(there, [found[name, n] for n in there]) if there else None


def _measured(
    llm: TargetLLM, calls: dict[tuple[str, int], Callable[[], object]], seconds: float, progress: Progress | None
) -> dict[tuple[str, int], float]:
    """Median seconds of each call, after a short one that warms up."""
    calls[min(calls, key=lambda key: key[1])]()
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    begun = time.perf_counter()
    for round_ in range(_ROUNDS):
        for number, (key, call) in enumerate(calls.items()):
            start = time.perf_counter()
            call()
            if llm.device.type == "cuda":
                torch.cuda.synchronize()
            taken[key].append(time.perf_counter() - start)
            if progress is not None:
                done = (round_ * len(calls) + number + 1) / (_ROUNDS * len(calls))
                share = max(done, (time.perf_counter() - begun) / seconds)
                progress("measuring how fast this machine reads", min(share, 1.0))
        spent = time.perf_counter() - begun
        if spent + spent / (round_ + 1) > seconds:
            break
    return {key: statistics.median(each) for key, each in taken.items()}


def _tokens(llm: TargetLLM, n: int) -> list[int]:
    """Ordinary tokens from all over the vocabulary, (n,)."""
    rows = llm.embedding.weight.shape[0]
    return [int(token) for token in torch.randint(rows // 8, rows, (n,), generator=torch.Generator().manual_seed(n))]


def _whole(llm: TargetLLM, embeddings: torch.Tensor) -> Callable[[], object]:
    return lambda: WholeForward(llm, PromptInputs(embeddings, None, None, [[]])).prefill()


def _lower(halves: Halves, embeddings: torch.Tensor) -> Callable[[], object]:
    mask, at = _laid_out(embeddings)

    @torch.inference_mode()
    def run() -> object:
        return halves.below(embeddings, mask, at, halves.caches()[0])

    return run


def _upper(halves: Halves, embeddings: torch.Tensor) -> Callable[[], object]:
    mask, at = _laid_out(embeddings)

    @torch.inference_mode()
    def run() -> object:
        return halves.above(embeddings, mask, at, halves.caches()[1], keep=1)

    return run


def _laid_out(embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask and positions (1, n) each."""
    at = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
    return torch.ones_like(at), at

"""LLMLingua and LLMLingua-2 (arXiv 2310.05736 and 2403.12968) by Microsoft's package, at the rate concepts achieve.

LLMLingua-2 needs its published weights. Its recipe, on a small encoder that is trained here, is `trained.lingua2`.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.rivals.base import LeftOutError, Outcome, Outside, Task, ask_made
from benchmarks.rivals.folders import for_transformers_4
from benchmarks.rivals.matching import TOLERANCE, Match, match
from benchmarks.rivals.process import Runner
from compllm_rag.errors import ModelFetchError
from compllm_rag.models import resolve_model
from compllm_rag.models.llm import TargetLLM
from compllm_rag.models.plaintext import encode_plain

# The published weights; the commit is of the branch `main`.
TWO = "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank@5f0c82792b7ea14c6484e015b6a072009496b7f2"
# The package tells the kind of word pieces by the folder's name.
_KINDS = ("bert-base-multilingual-cased", "xlm-roberta-large")


class Lingua(Outside):
    """LLMLingua with the target LLM (without reader) as its scorer, or LLMLingua-2 with a token classifier.

    Args:
        environments: See `Outside`.
        classifier: Folder or hub id of a token classifier; None is LLMLingua.
        runner: See `Outside`.
    """

    def __init__(self, environments: Path | None, classifier: str | None = None, runner: tuple[str, ...] = ()) -> None:
        two = "2" if classifier else ""
        super().__init__(f"llmlingua{two}", f"LLMLingua{two and '-2'}", "llmlingua", environments, runner)
        self.classifier = classifier

    def settings(self) -> dict[str, Any]:
        """Weights, pins and how closely tokens are matched."""
        return {"classifier": self.classifier, "tolerance": TOLERANCE, "pins": self.pins()}

    def ask(self, task: Task, rate: float) -> Outcome:
        """See `Baseline.ask`."""
        found: dict[str, Match] = {}
        with self._started(task) as (runner, notes):
            tokenizer = task.compressor.llm.tokenizer

            def make(text: str) -> tuple[int, ...]:
                def compress(asked: float) -> tuple[int, ...]:
                    return tuple(
                        encode_plain(tokenizer, runner.ask(op="compress", text=text, rate=asked)["text"])["input_ids"]
                    )

                found[text] = match(compress, task.segmented.n_tokens(text), task.budget(text, rate))
                if len(found) % 10 == 0:
                    task.progress(f"{self.name}: {len(found)} of {len(task.texts)} passages")
                return found[text].ids

            outcome = ask_made(task, make, notes)
            notes["versions"] = runner.versions
        off = [m.off(task.budget(text, rate)) for text, m in found.items()]
        notes["asked_rate"] = statistics.median(m.asked for m in found.values())
        notes["calls_per_passage"] = statistics.mean(m.tries for m in found.values())
        notes["passages_within_tolerance"] = sum(o <= TOLERANCE for o in off) / len(off)
        notes["farthest_off"] = max(off)
        return outcome

    @contextmanager
    def _started(self, task: Task) -> Iterator[tuple[Runner, dict[str, Any]]]:
        start = self.runner()
        notes: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as scratch:
            source = self._classifier() if self.classifier else resolve_model(task.llm).path
            # Under the name that tells the package which word pieces these are, if it is one.
            named = None if self.classifier else type(task.compressor.llm.model).__name__
            folder = for_transformers_4(source, Path(scratch), named)
            words = [*start, "--model", str(folder), *(["--two"] if self.classifier else [])]
            with Runner(words, environment=_variables()) as runner:
                if self.classifier:
                    notes["classifier"] = source.name if Path(self.classifier).exists() else self.classifier
                else:
                    notes["scorer_check"] = _same_scorer(runner, task)
                yield runner, notes

    def _classifier(self) -> Path:
        name = str(self.classifier)
        try:
            path = resolve_model(name).path
        except ModelFetchError as error:
            raise LeftOutError(
                "weights of LLMLingua-2 cannot be had",
                got=str(error.got),
                next_step="run it where the hub can be reached",
            ) from error
        kind = next((kind for kind in _KINDS if kind in str(path)), None)
        if kind is None:
            raise LeftOutError(
                "LLMLingua-2 knows no such classifier",
                got=path.name,
                expected=f"a folder with {' or '.join(_KINDS)} in its name",
                next_step="rename the folder",
            )
        return path


def _variables() -> dict[str, str]:
    """The package counts with a tokenizer of OpenAI's that it fetches; LlamaIndex ships the file."""
    spec = importlib.util.find_spec("llama_index.core")
    places = list(spec.submodule_search_locations or []) if spec else []
    found = [p for place in places if (p := Path(place) / "_static" / "tiktoken_cache").is_dir()]
    return {"TIKTOKEN_CACHE_DIR": str(found[0])} if found else {}


def _same_scorer(runner: Runner, task: Task) -> dict[str, float]:
    """Nats per token of the first passage under the scorer there and under the same LLM here."""
    import torch

    text = task.texts[0]
    base = TargetLLM.from_pretrained(task.llm, dtype="float32")
    with torch.inference_mode():
        ids = base.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(base.device)
        logits = base.model(input_ids=ids).logits[0, :-1].float()
        here = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    return {"nll_here": float(here), "nll_there": float(runner.ask(op="nll", text=text)["nll"])}

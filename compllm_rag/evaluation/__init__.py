"""Measuring answers, from Python; the names load on first use.

`evaluate` asks questions over given passages in one mode and compares with text and with no passages. Evaluators of
LlamaIndex, which judge the answers of an engine, take `ConceptLLM` as any other LLM.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compllm_rag.evaluation.journal import Journal as Journal
    from compllm_rag.evaluation.metrics import exact_match as exact_match
    from compllm_rag.evaluation.metrics import f1 as f1
    from compllm_rag.evaluation.metrics import subspan_match as subspan_match
    from compllm_rag.evaluation.probes import ProbeResult as ProbeResult
    from compllm_rag.evaluation.probes import run_probes as run_probes
    from compllm_rag.evaluation.questions import Question as Question
    from compllm_rag.evaluation.questions import QuestionFile as QuestionFile
    from compllm_rag.evaluation.questions import SourcePassage as SourcePassage
    from compllm_rag.evaluation.questions import read_questions as read_questions
    from compllm_rag.evaluation.results import EvalConfig as EvalConfig
    from compllm_rag.evaluation.results import EvalResult as EvalResult
    from compllm_rag.evaluation.runner import evaluate as evaluate
    from compllm_rag.evaluation.runner import evaluate_many as evaluate_many

_HOME = {
    "EvalConfig": "results",
    "EvalResult": "results",
    "Journal": "journal",
    "ProbeResult": "probes",
    "Question": "questions",
    "QuestionFile": "questions",
    "SourcePassage": "questions",
    "evaluate": "runner",
    "evaluate_many": "runner",
    "exact_match": "metrics",
    "f1": "metrics",
    "read_questions": "questions",
    "run_probes": "probes",
    "subspan_match": "metrics",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    """Load a public name from its module (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(
            f"module 'compllm_rag.evaluation' has no attribute {name!r}; public names: {', '.join(__all__)}"
        )
    value = getattr(importlib.import_module(f"compllm_rag.evaluation.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

"""The package as an API: names that load on first use, and no others."""

from __future__ import annotations

import subprocess
import sys

import pytest

import compllm_rag.evaluation as evaluation


def test_every_name_loads_and_is_documented() -> None:
    assert {"evaluate", "read_questions", "EvalConfig", "exact_match"} <= set(evaluation.__all__)
    for name in evaluation.__all__:
        assert getattr(evaluation, name).__doc__, name
        assert name in dir(evaluation)
    with pytest.raises(AttributeError, match="public names"):
        evaluation.evalute  # noqa: B018


def test_the_package_stays_cheap() -> None:
    script = "import sys, compllm_rag.evaluation; print('torch' in sys.modules or 'llama_index' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"

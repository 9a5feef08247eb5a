"""How long until the command line answers, and the package is imported? Whole processes, an empty one beside."""

from __future__ import annotations

import statistics
import subprocess
import sys
from functools import partial
from typing import Any

from benchmarks.common import in_turns, parser, write

_QUIET: dict[str, Any] = {"check": True, "capture_output": True}
_COMMANDS = {
    "empty process": "pass",
    "import compllm_rag": "import compllm_rag",
    "compllm-rag --help": "import sys; sys.argv[1:] = ['--help']; from compllm_rag.cli.main import main; main()",
}


def main() -> None:
    """Command line."""
    args = parser(__doc__).parse_args()
    calls = {name: partial(subprocess.run, [sys.executable, "-c", code], **_QUIET) for name, code in _COMMANDS.items()}
    seconds = in_turns(calls, args.repeats)
    medians = {name: statistics.median(series) for name, series in seconds.items()}
    write({"seconds": seconds, "median_s": medians}, args.json)


if __name__ == "__main__":
    main()

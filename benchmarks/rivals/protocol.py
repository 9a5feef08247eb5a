"""The runner's side of the protocol: one JSON object a line in, one a line out. Standard library alone.

A runner first says `{"ready": true, ...}` with versions, or `{"error": ...}`; then it answers each request with an
object, which may be an error, in the order in which they came, until its standard input ends.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

Answer = Callable[[dict[str, Any]], dict[str, Any]]


def serve(load: Callable[[], Answer], packages: tuple[str, ...]) -> None:
    """Load once, then answer requests until there are no more.

    Args:
        load: Loads the package and its model; returns what answers a request.
        packages: Whose versions are reported.
    """
    # Libraries print; what they print must not stand between the lines of the protocol.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        out.write(json.dumps(reply) + "\n")
        out.flush()

    try:
        answer = load()
    except Exception as error:  # noqa: BLE001 - whatever it is, the other side has to hear of it
        traceback.print_exc()
        say({"error": _told(error)})
        sys.exit(1)
    say({"ready": True, "versions": {name: importlib.metadata.version(name) for name in packages}})
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:  # noqa: BLE001 - as above
            traceback.print_exc()
            reply = {"error": _told(error)}
        say(reply)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

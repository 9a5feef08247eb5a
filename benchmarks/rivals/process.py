"""Our side of the protocol: a runner as a child process that answers JSON lines."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from compllm_rag.errors import CompLLMError

ROOT = Path(__file__).parents[2]


class RunnerError(CompLLMError, RuntimeError):
    """A runner does not start, does not answer, or answers with an error."""


class Runner:
    """A child process; use it in a `with` statement.

    Args:
        command: Program and arguments; started in the repository's root, so that `-m benchmarks...` is found.
        environment: Variables besides those of this process.
        start_s: Seconds it may take to load.
        reply_s: Seconds one answer may take.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        start_s: float = 300.0,
        reply_s: float = 600.0,
    ) -> None:
        self._command, self._start_s, self._reply_s = list(command), start_s, reply_s
        self._environment = dict(environment or {})
        self._replies: queue.Queue[str | None] = queue.Queue()
        self.versions: dict[str, str] = {}

    def __enter__(self) -> Runner:
        fixed = {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",  # all it needs lies in local folders
        }
        self._errors: IO[bytes] = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env={**os.environ, **fixed, **self._environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            self._errors.close()
            raise RunnerError(
                "runner does not start", got=f"{self._command[0]} ({error.strerror})", next_step="make it again"
            ) from error
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            self.versions = dict(self._receive(self._start_s).get("versions", {}))
        except RunnerError:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            RunnerError: The answer is an error, or none comes.
        """
        try:
            self._stdin.write(json.dumps(request) + "\n")
            self._stdin.flush()
        except OSError:
            pass  # it is gone; what it said last is what `_receive` reports
        return self._receive(self._reply_s)

    @property
    def _stdin(self) -> IO[str]:
        if self._process.stdin is None:
            raise RunnerError("runner has no standard input")
        return self._process.stdin

    def _listen(self) -> None:
        for line in self._process.stdout or ():
            self._replies.put(line)
        self._replies.put(None)

    def _receive(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._replies.get(timeout=seconds)
        except queue.Empty:
            self._process.kill()
            raise RunnerError(
                "runner gives no answer",
                got=f"nothing for {seconds:g} s",
                next_step="run it again, or give it more time",
            ) from None
        if line is None:
            raise RunnerError("runner ended before its answer", got=self._last_words(), expected="a line of JSON")
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise RunnerError("runner does not keep to the protocol", got=repr(line[:200]), expected="a JSON object")
        if "error" in reply:
            raise RunnerError("runner reports an error", got=str(reply["error"])[:500])
        return reply

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:300] if lines else "nothing on its standard error"

    def _end(self) -> None:
        try:
            self._stdin.close()
            self._process.wait(timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._errors.close()

"""What was found out about a vLLM server, and for how long that holds.

Under the same name and address a server may come back that holds another LLM, such as one without its reader, whose
answers are wrong without an error. So what was checked holds until the server may have been started anew: a connection
to it failed or broke, or nothing was heard of it for a while, in which nobody would have noticed.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from compllm_rag.errors import GeneratorUnavailableError
from compllm_rag.generation.vllm.client import VLLMClient
from compllm_rag.generation.vllm.matching import check_embeddings, check_model, own_logprobs, served_model
from compllm_rag.models.halves import Halves
from compllm_rag.models.llm import TargetLLM


class ServerChecks:
    """Checks of one server, made once until it may be another one. Several generators may share them.

    Args:
        client: Of the server.
        llm: That it must run.
        halves: See `VLLMGenerator`.
    """

    def __init__(self, client: VLLMClient, llm: TargetLLM, halves: Halves | None = None) -> None:
        self._client, self._llm, self._halves = client, llm, halves
        self._lock = threading.Lock()
        self._served: tuple[str, int] | None = None
        self._name: str | None = None
        self._sound: set[str] = set()
        self._losses = self._failures = 0
        self._failure: GeneratorUnavailableError
        self._ours: torch.Tensor | None = None

    @property
    def name(self) -> str:
        """Of the model at the server, as it was when somebody looked last.

        Raises:
            GeneratorMismatchError, GeneratorUnavailableError, GeneratorRefusedError: See `model`.
        """
        return self.model()[0] if self._name is None else self._name

    def model(self) -> tuple[str, int]:
        """Name of the model, and positions that a prompt and its answer may take at the server.

        Raises:
            GeneratorMismatchError, GeneratorUnavailableError, GeneratorRefusedError: See `served_model`.
        """
        with self._turn():
            return self._model()

    def match(self, *, text: bool) -> None:
        """See that the server runs this LLM and, unless a prompt is text alone, that it reads embeddings.

        Raises:
            GeneratorMismatchError, GeneratorUnavailableError, GeneratorRefusedError: See `check_model` and
                `check_embeddings`.
        """
        with self._turn():
            name, _ = self._model()
            if "model" not in self._sound:
                if self._ours is None:
                    self._ours = own_logprobs(self._llm, self._halves)
                check_model(self._client, name, self._llm, self._ours)
                self._sound.add("model")
            if not text and "embeddings" not in self._sound:
                check_embeddings(self._client, name, self._llm, self._halves)
                self._sound.add("embeddings")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One asks at a time. Who waited while a server was not there is not to wait for its own tries as well.

        Raises:
            GeneratorUnavailableError: That is so.
        """
        seen = self._failures
        with self._lock:
            if self._failures != seen:
                raise copy.copy(self._failure)
            try:
                yield
            except GeneratorUnavailableError as error:
                self._failures, self._failure = self._failures + 1, error
                raise

    def _model(self) -> tuple[str, int]:
        silent_s, losses = time.monotonic() - self._client.heard, self._client.losses
        if losses != self._losses or silent_s > self._client.settings.recheck_s:
            self._served, self._losses = None, losses
            self._sound.clear()
        if self._served is None:
            self._served = served_model(self._client)
            self._name = self._served[0]
        return self._served

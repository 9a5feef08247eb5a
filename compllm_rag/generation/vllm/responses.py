"""What a vLLM server answers in place of an answer: as errors that say what to do."""

from __future__ import annotations

import json
from contextlib import suppress

import httpx

from compllm_rag.errors import GeneratorRefusedError, PromptTooLongError
from compllm_rag.generation.base import FinishReason
from compllm_rag.generation.vllm.settings import VLLMSettings

_BUSY = (429, 502, 503)
_MOST_ERROR_BYTES = 4096
_NEXT = {
    401: "set COMPLLM_VLLM_API_KEY to the key that it was started with",
    404: "check the address and the served name; the server may have been started anew with another model",
    413: "a proxy in front of it limits requests: raise its limit",
}


_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


def reason_of(told: str) -> FinishReason:
    """Why an answer ended, as vLLM says it.

    Raises:
        GeneratorRefusedError: It was given up, so that it is no answer.
    """
    if told not in _REASONS:
        raise GeneratorRefusedError("vLLM gave up on an answer", got=f"finish_reason {told}", next_step="see its log")
    return _REASONS[told]


class Retry(Exception):
    """A try that failed before the first token; another may succeed.

    Args:
        got: What happened.
        after_s: When the server says to come again.
    """

    def __init__(self, got: str, after_s: float | None = None) -> None:
        super().__init__(got)
        self.after_s = after_s


def too_large(n_bytes: int, settings: VLLMSettings) -> PromptTooLongError:
    """The error for a request that is longer than may be sent."""
    return PromptTooLongError(
        "prompt is too long to be sent",
        got=f"about {n_bytes} bytes",
        expected=f"at most {settings.max_payload_bytes} (max_payload_bytes)",
        next_step="retrieve fewer chunks, raise the compression rate, or run vLLM's engine in this process",
    )


async def checked(response: httpx.Response) -> None:
    """Let an answer pass, or raise what it says.

    Raises:
        GeneratorRefusedError: The server refuses.
        Retry: It has no time now.
    """
    if response.status_code == 200:
        return
    if response.status_code in _BUSY:
        raise Retry(f"status {response.status_code}", _seconds(response.headers.get("retry-after")))
    read = b""
    async for chunk in response.aiter_bytes():
        read += chunk
        if len(read) > _MOST_ERROR_BYTES:
            break
    raise GeneratorRefusedError(
        "the vLLM server refuses a request",
        got=f"status {response.status_code}: {_message(read)}",
        next_step=_NEXT.get(response.status_code, "see its log, and how it was started"),
    )


def _message(body: bytes) -> str:
    with suppress(ValueError, AttributeError, TypeError):
        told = json.loads(body)
        return str(told.get("error", told).get("message", told))[:300]
    return body[:300].decode(errors="replace").strip() or "no reason given"


def _seconds(value: str | None) -> float | None:
    with suppress(TypeError, ValueError):
        return max(0.0, float(value or ""))
    return None


def said(error: Exception) -> str:
    """An error by its kind, and its words where it has some."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

"""What goes to a vLLM server and what comes back: one prompt as JSON, an answer as server-sent events.

A prompt of text goes as token ids. One with concepts goes as embeddings as a whole: a server that gets both in one
request leaves out of its prefix cache's keys which is which (vLLM issue 56655), so that another prompt could hit. Of a
whole embedded prompt each block is keyed by the bytes of its embeddings, and the cache may stay on.

Chat completions with embeddings between texts are not used: the server would lay out and tokenize the texts itself,
and nothing in a passage or question may become a special token (`PromptTemplate`).
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from compllm_rag.config import GenerationConfig
from compllm_rag.errors import ConfigurationError, GeneratorRefusedError
from compllm_rag.generation.vllm.deep_rows import RowLayout, deep_rows
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import PromptPlan, TextSpan, embed_spans

_LONGEST_LINE = 1 << 20
_FRAME = 4096  # what torch's file format and the other fields of a request add, about


@dataclass(frozen=True)
class Piece:
    """What one event of a stream brought.

    Attributes:
        token_ids: New tokens.
        finish_reason: `stop` or `length` with the last of them.
        cached: Positions of the prompt that the server had read before; None where it does not say.
    """

    token_ids: list[int]
    finish_reason: str | None
    cached: int | None


def is_text(plan: PromptPlan) -> bool:
    """Whether a prompt has no concepts."""
    return all(isinstance(span, TextSpan) for span in plan.spans)


def refuse_deep(plan: PromptPlan) -> None:
    """Refuse what enters above the input embeddings.

    Raises:
        ConfigurationError: The plan has deep concepts.
    """
    if plan.deep:
        raise ConfigurationError(
            "vLLM cannot read deep concepts",
            got="a prompt with concepts that enter the LLM at a middle layer",
            expected="text, or concepts at the input embeddings, which is all that an ordinary vLLM takes",
            next_step="ask with mode text, make the storage with `--codec input`, use the generator of this process, "
            "or serve what `models export --deep` writes and give vllm-deep: in place of vllm:",
        )


def prompt_fields(plan: PromptPlan, llm: TargetLLM, layout: RowLayout | None = None) -> dict[str, Any]:
    """A prompt as fields of a request to `/v1/completions`.

    Args:
        plan: Text and concepts; deep ones where there is a `layout`.
        llm: Whose embedding module turns token ids into what stands beside concepts.
        layout: Of the rows that a server of a deep checkpoint takes.

    Raises:
        InvalidConceptsError: Concepts are deep without a layout, or of another width.
        ConfigurationError: See `deep_rows`.
    """
    if is_text(plan):
        ids = [token for span in plan.spans if isinstance(span, TextSpan) for token in span.ids]
        return {"prompt": ids, "add_special_tokens": False}
    if layout is not None:
        return {"prompt_embeds": encoded(deep_rows(plan, llm, layout))}
    return {"prompt_embeds": encoded(embed_spans(plan.spans, llm.embedding, llm.device))}


def encoded(embeddings: torch.Tensor) -> str:
    """Embeddings (seq_len, hidden_size) as base64 of a file that `torch.save` writes.

    Nothing in this package is ever read by `torch.load`; this is written, for a server that takes no other format.
    """
    # A clone: of a view, torch writes the whole storage that lies behind it.
    file = io.BytesIO()
    torch.save(embeddings.detach().cpu().clone().contiguous(), file)
    return base64.b64encode(file.getbuffer()).decode("ascii")


def payload_bytes(plan: PromptPlan, llm: TargetLLM, layout: RowLayout | None = None) -> int:
    """Bytes of a request, about, without making it: 4 a digit-coded token of text, or embeddings in base64."""
    if is_text(plan):
        return _FRAME + 8 * plan.positions
    width = llm.hidden_size if layout is None else layout.row_width
    return _FRAME + (plan.positions * width * llm.dtype.itemsize * 4 + 2) // 3


def sampling_fields(config: GenerationConfig, stop_ids: Sequence[int]) -> dict[str, Any]:
    """How an answer is decoded, as fields of a request.

    All are written out: a server fills in what is left out from the model's own generation settings. Stop texts are
    not among them, the client looks for them itself.

    Raises:
        ConfigurationError: A setting that vLLM understands otherwise.
    """
    if config.repetition_penalty != 1.0:
        raise ConfigurationError(
            "vLLM's repetition penalty is another",
            got=f"repetition_penalty {config.repetition_penalty:g}",
            expected="1: vLLM would punish what stands in the prompt, and sees no words in embeddings",
            next_step="leave it out, or use the generator of this process",
        )
    fields: dict[str, Any] = {
        "max_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": 1.0 if config.top_p is None else config.top_p,
        "top_k": 0 if config.top_k is None else config.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(stop_ids),
    }
    if config.seed is not None:
        fields["seed"] = config.seed
    if config.json_schema is not None:
        try:
            fields["structured_outputs"] = {"json": json.loads(config.json_schema)}
        except ValueError as error:
            raise ConfigurationError(
                "the schema of the answer cannot be followed",
                got=f"{config.json_schema[:80]!r}: {error}",
                expected="a JSON schema",
                next_step="make it JSON",
            ) from error
    return fields


async def pieces_of(chunks: AsyncIterator[bytes]) -> AsyncIterator[Piece]:
    """Pieces of an answer from the body of a streamed completion.

    Args:
        chunks: Its bytes, cut anywhere.

    Raises:
        GeneratorRefusedError: The server reports an error, or does not say what it was asked for.
        httpx.RemoteProtocolError: The body ends before the answer does.
    """
    rest = b""
    async for chunk in chunks:
        rest += chunk
        *lines, rest = rest.split(b"\n")
        if len(rest) > _LONGEST_LINE:
            raise _nonsense(f"a line of more than {_LONGEST_LINE} bytes")
        for line in lines:
            data = line.strip().removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or not data:
                continue
            if data == b"[DONE]":
                return
            yield _piece(data)
    raise httpx.RemoteProtocolError("the connection was closed before the answer's end")


def _piece(data: bytes) -> Piece:
    try:
        event: Any = json.loads(data)
        if "error" in event:
            raise GeneratorRefusedError(
                "the vLLM server gave up on an answer",
                got=str(event["error"].get("message", event["error"]))[:300],
                next_step="look at its log",
            )
        details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens")
        if not event["choices"]:  # the last event: usage alone
            return Piece([], None, cached)
        [choice] = event["choices"]
        return Piece([int(token) for token in choice["token_ids"] or ()], choice.get("finish_reason"), cached)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _nonsense(data[:80].decode(errors="replace")) from error


def _nonsense(got: str) -> GeneratorRefusedError:
    return GeneratorRefusedError(
        "the server's answer makes no sense",
        got=got,
        expected="server-sent events of /v1/completions with token ids, as vLLM 0.32 sends them",
        next_step="check that the address is that of a vLLM server, and no proxy changes what it sends",
    )

"""Whether a vLLM server runs the LLM that prompts are made for; `checks` says when that is asked.

A name says little: a server of the right name may hold the LLM without the reader that was merged into ours, or
another revision of it. So the server is asked how likely it finds the tokens of a short text, and the LLM here is asked
the same. Whether it takes embeddings, and reads ours as it reads its own, is seen from one prompt sent as both.
"""

from __future__ import annotations

from typing import Any

import torch

from compllm_rag.errors import GeneratorMismatchError, GeneratorRefusedError
from compllm_rag.generation.vllm.client import VLLMClient
from compllm_rag.generation.vllm.deep_rows import RowLayout, deep_rows
from compllm_rag.generation.vllm.wire import encoded
from compllm_rag.models.halves import Halves
from compllm_rag.models.llm import TargetLLM, decoder_of
from compllm_rag.models.plaintext import encode_plain
from compllm_rag.prompt import ConceptSpan, PromptPlan

_TEXT = (
    "The lighthouse on Gull Rock was built in 1871 by Ada Marsh. It stands 42 metres tall, and its lamp turned for "
    "ninety years before the last keeper rowed home."
)
_MOST_TOKENS = 64
_GREEDY: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "stream": False}
_EXPORT = "`compllm-rag models export` writes the LLM with its reader as a checkpoint"


def served_model(client: VLLMClient) -> tuple[str, int]:
    """Name of the model, and positions that a prompt and its answer may take at the server.

    Raises:
        GeneratorMismatchError: It serves no model of the name that is asked for, or several where none is.
        GeneratorUnavailableError, GeneratorRefusedError: See `VLLMClient.stream`.
    """
    found = client.get("/v1/models")
    try:
        windows = {str(card["id"]): int(card["max_model_len"]) for card in found["data"]}
    except (KeyError, TypeError, ValueError) as error:
        raise GeneratorMismatchError(
            "this is no vLLM server",
            got=f"{str(found)[:80]} at {client.url}/v1/models",
            expected="models with their max_model_len",
            next_step="check the address; other servers of OpenAI's API take no embeddings",
        ) from error
    asked = client.settings.model
    if asked is None and len(windows) == 1:
        [asked] = windows
    if asked not in windows:
        raise GeneratorMismatchError(
            "the vLLM server serves another model" if asked else "the vLLM server serves several models",
            got=", ".join(sorted(windows)),
            expected=asked or "one",
            next_step="name one of them behind the address: vllm:http://HOST:PORT#NAME",
        )
    return asked, windows[asked]


def check_model(client: VLLMClient, model: str, llm: TargetLLM, ours: torch.Tensor) -> None:
    """Refuse a server whose LLM finds a text otherwise likely than ours does.

    Args:
        client: Of the server.
        model: Its name there.
        llm: Ours.
        ours: See `own_logprobs`.

    Raises:
        GeneratorMismatchError: It does, or its vocabulary is another.
        GeneratorUnavailableError, GeneratorRefusedError: See `VLLMClient.stream`.
    """
    ids = probe(llm)
    found = client.post(
        "/v1/completions",
        {"model": model, "prompt": ids, "add_special_tokens": False, "prompt_logprobs": 0, **_GREEDY},
    )
    refuse_another(_logprobs(found, ids), ours, llm, client.settings.tolerance)


@torch.inference_mode()
def own_logprobs(llm: TargetLLM, halves: Halves | None = None) -> torch.Tensor:
    """How likely our LLM finds each token of `probe` but the first, (n_tokens - 1,).

    Args:
        llm: Ours.
        halves: Ours as it reads deep concepts, where it should be that.
    """
    ids = probe(llm)
    rows = torch.tensor([ids], device=llm.device)
    logits = llm.model(input_ids=rows).logits if halves is None else _by_halves(halves, rows)
    logits = logits[0, :-1].float().cpu()  # (n_tokens - 1, vocab_size)
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def refuse_another(theirs: list[float], ours: torch.Tensor, llm: TargetLLM, tolerance: float) -> None:
    """Refuse an LLM that finds a text otherwise likely than ours does.

    Args:
        theirs: Log-probability of each token of `probe` but the first.
        ours: The same of our LLM.
        llm: Ours.
        tolerance: Most mean difference.

    Raises:
        GeneratorMismatchError: It does.
    """
    apart = float((torch.tensor(theirs) - ours).abs().mean())
    if not apart <= tolerance:
        raise GeneratorMismatchError(
            "vLLM runs another LLM",
            got=f"log-probabilities of a text that are {apart:.3g} apart, on the mean over {len(ours)} tokens",
            expected=f"those of {llm.source}{' with its reader' if llm.reader else ''}, at most {tolerance:g} apart "
            "(tolerance)",
            next_step=f"serve the same LLM ({_EXPORT}); where only its weights are rounded more, raise the tolerance",
        )


@torch.inference_mode()
def _rows_of_themselves(halves: Halves, ids: list[int]) -> torch.Tensor:
    rows = torch.tensor([ids], device=halves.llm.device)
    mask, positions = torch.ones_like(rows), torch.arange(len(ids), device=rows.device)
    states = halves.below(halves.llm.embedding(rows), mask, positions[None])[0]  # (n_tokens, hidden_size)
    span = ConceptSpan(states, 0, positions, len(ids), tuple(ids))
    return deep_rows(PromptPlan((span,)), halves.llm, RowLayout.of(decoder_of(halves.llm.model).config, halves.layer))


def _by_halves(halves: Halves, ids: torch.Tensor) -> torch.Tensor:
    mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1], device=ids.device)[None]
    return halves.above(halves.below(halves.llm.embedding(ids), mask, positions), mask, positions)


def check_embeddings(client: VLLMClient, model: str, llm: TargetLLM, halves: Halves | None = None) -> None:
    """Refuse a server that takes no embeddings, or reads ours otherwise than its own.

    With halves, tokens are sent as deep concepts of themselves: what stands in front of the entry layer anyway.

    Raises:
        GeneratorMismatchError: It does.
        GeneratorUnavailableError, GeneratorRefusedError: See `VLLMClient.stream`.
    """
    ids = probe(llm)
    asked = {"model": model, "logprobs": 1, "return_tokens_as_token_ids": True, **_GREEDY}
    embeddings = llm.embed(ids) if halves is None else _rows_of_themselves(halves, ids)
    try:
        found = client.post("/v1/completions", {**asked, "prompt_embeds": encoded(embeddings)})
    except GeneratorRefusedError as error:
        raise GeneratorMismatchError(
            "the vLLM server does not read concepts",
            got=error.got,
            expected=f"a server that takes prompt embeddings of width {embeddings.shape[1]}",
            next_step="start it by `vllm serve MODEL --enable-prompt-embeds`, with the LLM of the storage"
            + ("" if halves is None else " as `models export --deep` writes it")
            + "; or ask with mode text",
        ) from error
    same = client.post("/v1/completions", {**asked, "prompt": ids, "add_special_tokens": False})
    apart = abs(_first(found) - _first(same))
    if not apart <= client.settings.tolerance:
        raise GeneratorMismatchError(
            "the vLLM server reads embeddings otherwise than tokens",
            got=f"log-probabilities {apart:.3g} apart for one prompt sent as both",
            expected=f"at most {client.settings.tolerance:g} (tolerance)",
            next_step="serve the LLM whose embeddings these are, unquantised",
        )


def probe(llm: TargetLLM) -> list[int]:
    """Token ids of a short text, as many as are compared."""
    return [int(token) for token in encode_plain(llm.tokenizer, _TEXT)["input_ids"]][:_MOST_TOKENS]


def _logprobs(found: Any, ids: list[int]) -> list[float]:
    """How likely each token of a prompt was but the first."""
    try:
        told = found["choices"][0]["prompt_logprobs"]
        return [float(at[str(token)]["logprob"]) for at, token in zip(told[1:], ids[1:], strict=True)]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise GeneratorMismatchError(
            "the vLLM server does not say how likely a prompt is",
            got=str(found)[:80],
            expected="prompt_logprobs of the tokens that were sent",
            next_step="check that this is vLLM, and serves the same tokenizer",
        ) from error


def _first(found: Any) -> float:
    """Log-probability of the token that came first."""
    try:
        return float(found["choices"][0]["logprobs"]["token_logprobs"][0])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise GeneratorMismatchError(
            "the vLLM server does not say how likely an answer is", got=str(found)[:80], expected="logprobs"
        ) from error

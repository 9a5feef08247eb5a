"""Runner of KV pruning: presses of NVIDIA's `kvpress` at their own defaults, in an environment of its own.

A request `{"press", "prefix", "kept", "questions": [{"suffix", "gold"}], "max_new_tokens", "stop"}` holds token ids.
The prefix is prefilled under the press, which keeps `kept` positions of it in each layer and head; each question is
then read behind it, at the positions it has in the whole prompt, and answered greedily, as the package's own pipeline
does. Without a press nothing is removed. Nothing of compllm_rag is imported here.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from typing import Any

from benchmarks.rivals.protocol import Answer, serve

# Query-agnostic presses: they see the passage without the question, as a compressor does.
PRESSES = {
    "expected_attention": "ExpectedAttentionPress",
    "snapkv": "SnapKVPress",
    "knorm": "KnormPress",
}


def load() -> Answer:
    """Load the target LLM with its reader merged."""
    options = argparse.ArgumentParser()
    options.add_argument("--model", required=True, help="folder of the model")
    options.add_argument("--dtype", default="float32")
    args = options.parse_args()
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), local_files_only=True, trust_remote_code=False
    )
    model.to(device).eval()

    @torch.inference_mode()
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        from transformers import DynamicCache

        prefix, kept = request["prefix"], request["kept"]
        cache: Any = DynamicCache()
        press: Any = contextlib.nullcontext()
        if request["press"]:
            import kvpress

            # The package removes a fraction and rounds down what is left; half a position keeps that from tipping.
            chosen = getattr(kvpress, PRESSES[request["press"]])(compression_ratio=1 - (kept + 0.5) / len(prefix))
            if getattr(chosen, "window_size", 0) >= len(prefix):
                chosen.window_size = max(1, len(prefix) // 2)
            press = chosen(model)
        with press:
            model.model(input_ids=torch.tensor([prefix], device=device), past_key_values=cache)
        lengths = [int(layer.keys.shape[2]) for layer in cache.layers]
        if set(lengths) != {kept}:
            raise ValueError(f"press {request['press']} kept {sorted(set(lengths))} positions, not {kept}")
        found = [_one(model, copy.deepcopy(cache), len(prefix), q, request) for q in request["questions"]]
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return {"answers": found, "kv_bytes": sum(t.numel() * t.element_size() for t in tensors)}

    return answer


def _one(model: Any, cache: Any, at: int, question: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Greedy answer to one question, and the log-likelihood of its gold answer.

    Args:
        model: The causal LM.
        cache: Of the prefix, `kept` positions a layer; used up.
        at: Position of the question's first token in the whole prompt.
        question: Token ids of what follows the passages (`suffix`) and of the gold answer (`gold`).
        request: With `max_new_tokens` and `stop`.
    """
    import torch

    def step(ids: list[int], first: int, past: Any) -> Any:
        where = torch.arange(first, first + len(ids), device=model.device)[None]
        tokens = torch.tensor([ids], device=model.device)
        return model(input_ids=tokens, position_ids=where, past_key_values=past, use_cache=True).logits[0].float()

    suffix, gold, position = question["suffix"], question["gold"], at + len(question["suffix"])
    last = step(suffix, at, cache)[-1:]
    scored = last if len(gold) == 1 else torch.cat([last, step(gold[:-1], position, copy.deepcopy(cache))])
    likelihoods = scored.log_softmax(-1).gather(1, torch.tensor(gold, device=scored.device)[:, None])
    ids: list[int] = []
    for count in range(request["max_new_tokens"]):
        token = int(last[-1].argmax())
        if token in request["stop"]:
            break
        ids.append(token)
        if count + 1 < request["max_new_tokens"]:
            last = step([token], position + count, cache)
    return {"ids": ids, "log_likelihood": float(likelihoods.double().sum())}


if __name__ == "__main__":
    serve(load, ("kvpress", "transformers", "torch"))

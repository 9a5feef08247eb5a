"""Runner of LLMLingua and LLMLingua-2: the package `llmlingua` as it is published, in an environment of its own.

Requests: `{"op": "compress", "text", "rate"}` gives `{"text"}`; `{"op": "nll", "text"}` gives the scorer's `{"nll"}`,
by which the other side sees that the scorer is the model it means. Nothing of compllm_rag is imported here.

`iterative_size` is an even split of the text into windows of at most 200 tokens, the package's default: left at 200, it
compresses no text of fewer tokens, and never the tail behind the last whole window (issues 61, 195 and 196 of
microsoft/LLMLingua). With `rate` it is the one parameter that differs from the defaults.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from benchmarks.rivals.protocol import Answer, serve

WINDOW = 200


def load() -> Answer:
    """Load the scorer, or the token classifier of LLMLingua-2."""
    options = argparse.ArgumentParser()
    options.add_argument("--model", required=True, help="folder of the model")
    options.add_argument("--two", action="store_true", help="LLMLingua-2")
    args = options.parse_args()
    from llmlingua import PromptCompressor

    # The package trusts code of a model's repository unless told not to.
    made = PromptCompressor(
        args.model, device_map=_device(), model_config={"trust_remote_code": False}, use_llmlingua2=args.two
    )

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        text = request["text"]
        if request["op"] == "nll":
            return {"nll": float(made.get_ppl(text))}
        options = {} if args.two else {"iterative_size": even_window(made.get_token_length(text, False))}
        found = made.compress_prompt([text], rate=request["rate"], **options)
        return {"text": found["compressed_prompt"]}

    return answer


def even_window(n_tokens: int) -> int:
    """Tokens of each of the fewest even windows of at most `WINDOW` tokens."""
    return max(1, n_tokens // max(1, math.ceil(n_tokens / WINDOW)))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    serve(load, ("llmlingua", "transformers", "torch"))

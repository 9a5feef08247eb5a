"""Plain text stays plain whatever other threads do with the same tokenizer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import toy
from compllm_rag.models.plaintext import encode_plain


def test_special_tokens_are_characters() -> None:
    made = toy.tokenizer()
    ids = encode_plain(made, "a<|end|>b")["input_ids"]
    assert not set(ids) & set(made.all_special_ids)
    assert made.decode(ids) == "a<|end|>b"
    assert made("a<|end|>b", add_special_tokens=False)["input_ids"].count(made.eos_token_id) == 1


def test_threads_do_not_get_each_others_setting() -> None:
    made = toy.tokenizer()
    text = "<|start|>user\nWho built it?<|end|>" * 20
    plain, special = encode_plain(made, text)["input_ids"], made(text, add_special_tokens=False)["input_ids"]
    assert plain != special

    def ask(number: int) -> bool:
        if number % 2:
            return encode_plain(made, text)["input_ids"] == plain
        return made(text, add_special_tokens=False)["input_ids"] == special

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(400)))

"""Concepts made for a question stay in memory, within bounds."""

from __future__ import annotations

import torch

from compllm_rag.store.memo import ConceptMemo


def test_what_was_asked_for_longest_ago_goes_first() -> None:
    memo = ConceptMemo(max_bytes=3 * 64)
    made = {name: torch.full((1, 32), float(n), dtype=torch.float16) for n, name in enumerate("abcd")}
    memo.keep((name, made[name]) for name in "abc")
    assert set(memo.find(["a", "x"])) == {"a"}
    memo.keep([("d", made["d"]), ("d", made["d"])])
    assert {name for name in "abcd" if memo.find([name])} == {"a", "c", "d"}
    assert len(memo) == 3
    assert torch.equal(memo.find(["d"])["d"], made["d"])


def test_what_is_larger_than_all_of_it_is_not_kept() -> None:
    memo = ConceptMemo(max_bytes=10)
    memo.keep([("a", torch.zeros(1, 32))])
    assert len(memo) == 0
    memo.keep([("b", torch.zeros(1, 2))])
    assert len(memo) == 1

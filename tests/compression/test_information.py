"""How informative tokens are: the shipped table, and the estimate for any other tokenizer."""

from __future__ import annotations

import math

import pytest
import torch

import toy
from compllm_rag.compression import information
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.information import information_for, information_of_counts, vocabulary_digest
from compllm_rag.models.llm import TargetLLM
from compllm_rag.models.plaintext import encode_plain


def one(tokenizer: object, text: str) -> int:
    """The id of a text that is one token."""
    (found,) = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    return int(found)


def test_formula() -> None:
    counts = torch.tensor([0.0, 1.0, 7.0])
    expected = [-math.log((c + 0.5) / 9.5) for c in (0, 1, 7)]
    assert information_of_counts(counts).tolist() == pytest.approx(expected)


def test_probabilities_sum_to_one() -> None:
    table = information_of_counts(torch.arange(1000).double())
    assert torch.exp(-table.double()).sum().item() == pytest.approx(1.0, abs=1e-5)


def test_shipped_table_is_sound() -> None:
    table, digest = information._shipped_table()
    assert table.shape == (49152,)
    assert table.dtype == torch.float32
    assert table.isfinite().all()
    assert table.min() > 0
    assert len(digest) == 64


def test_shipped_units_are_sound() -> None:
    units, counts = information._units()
    assert len(units) == len(counts) == len(set(units)) > 10_000
    assert counts == sorted(counts, reverse=True)
    assert min(counts) > 0
    assert {" the", ",", ".", "\n"} <= set(units[:20])


def test_estimate_has_one_finite_number_per_token() -> None:
    tokenizer = toy.tokenizer()
    table = information_for(tokenizer)
    assert table.shape == (len(tokenizer),)
    assert table.dtype == torch.float32
    assert table.isfinite().all()
    assert table.min() > 0


def test_rare_tokens_are_more_informative_than_frequent_ones() -> None:
    tokenizer = toy.tokenizer(text=toy.TEXT + " lighthouse the of" * 50)
    table = information_for(tokenizer)
    the, comma, of = (table[one(tokenizer, text)] for text in (" the", ",", " of"))
    lighthouse = table[one(tokenizer, " lighthouse")]
    assert lighthouse > of > the
    assert lighthouse > comma + 3


def test_deterministic() -> None:
    tokenizer = toy.tokenizer()
    assert torch.equal(information_for(tokenizer), information_for(tokenizer))
    information._units.cache_clear()
    assert torch.equal(information_for(toy.tokenizer()), information_for(tokenizer))


def test_caller_may_change_what_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = toy.tokenizer()
    shipped = torch.arange(len(tokenizer)).float() + 1
    monkeypatch.setattr(information, "_shipped_table", lambda: (shipped, vocabulary_digest(tokenizer)))
    information_for(tokenizer).zero_()
    assert torch.equal(information_for(tokenizer), torch.arange(len(tokenizer)).float() + 1)


def test_shipped_table_is_for_its_own_vocabulary_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = toy.tokenizer()
    shipped, digest = torch.full((len(tokenizer),), 5.0), vocabulary_digest(tokenizer)
    estimated = information_for(tokenizer)
    assert not torch.equal(estimated, shipped)
    monkeypatch.setattr(information, "_shipped_table", lambda: (shipped, digest))
    assert torch.equal(information_for(tokenizer), shipped)
    # One token more, and it is another vocabulary of which the table says nothing.
    tokenizer.add_tokens(["lighthouse"])
    assert not torch.equal(information_for(tokenizer)[: len(shipped)], shipped)


class SameTokens:
    """A tokenizer with any vocabulary."""

    def __init__(self, vocabulary: dict[str, int]) -> None:
        self.vocabulary = vocabulary

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


def test_vocabulary_digest_names_tokens_and_ids() -> None:
    base = vocabulary_digest(SameTokens({"a": 0, "b": 1}))
    assert vocabulary_digest(SameTokens({"b": 1, "a": 0})) == base
    assert vocabulary_digest(SameTokens({"b": 0, "a": 1})) != base
    assert vocabulary_digest(SameTokens({"a": 0, "c": 1})) != base
    assert vocabulary_digest(SameTokens({"a": 0})) != base


def test_added_tokens_have_information_too() -> None:
    tokenizer = toy.tokenizer()
    before = len(tokenizer)
    tokenizer.add_tokens(["zyzzyva", "qwrtp"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra|>"]}, replace_extra_special_tokens=False)
    table = information_for(tokenizer)
    assert len(tokenizer) == before + 3
    assert table.shape == (before + 3,)
    assert table[before:].isfinite().all()
    # Never seen, so as informative as anything can be.
    assert torch.equal(table[before:], table.max().expand(3))


def test_ids_with_holes_in_between() -> None:
    tokenizer = toy.tokenizer()
    real = tokenizer.get_vocab()

    class Holes:
        def __call__(self, units: list[str], **options: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[999] if unit == " the" else [] for unit in units]}

        def __len__(self) -> int:
            return 10

        def get_vocab(self) -> dict[str, int]:
            return {**real, "far": 999}

    table = information_for(Holes())
    assert table.shape == (1000,)
    assert table.argmin() == 999
    assert table.isfinite().all()


def test_special_tokens_are_never_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither added around the units, nor found in a text that spells one."""
    tokenizer = toy.tokenizer()
    special = [tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens]
    assert len(special) >= 4
    monkeypatch.setattr(information, "_units", lambda: (["<|end|>", "<|bos|> the", " tower"], [1000, 1000, 1]))
    assert tokenizer("<|end|>", add_special_tokens=False)["input_ids"] == [3], "a text that spells a token is one"
    counts = information._estimated_counts(tokenizer)
    assert counts[special].sum() == 0
    assert counts.sum() > 0
    assert torch.equal(information_for(tokenizer)[special], information_for(tokenizer).max().expand(len(special)))


def test_each_occurrence_in_a_unit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = toy.tokenizer()
    monkeypatch.setattr(information, "_units", lambda: (["zz", "z"], [3, 4]))
    z = one(tokenizer, "z")
    assert tokenizer("zz", add_special_tokens=False)["input_ids"] == [z, z]
    assert information._estimated_counts(tokenizer)[z] == 10


def test_compressor_takes_the_estimate(llm: TargetLLM) -> None:
    assert torch.equal(Compressor(llm).information.cpu(), information_for(llm.tokenizer).half().float())


def test_counts_are_those_of_the_units_one_by_one() -> None:
    tokenizer = toy.tokenizer()
    units, counts = information._units()
    expected = torch.zeros(len(tokenizer), dtype=torch.float64)
    for unit, count in zip(units[:500], counts[:500], strict=True):
        for token in encode_plain(tokenizer, unit)["input_ids"]:
            expected[token] += count
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(information, "_units", lambda: (units[:500], counts[:500]))
        assert torch.equal(information._estimated_counts(tokenizer), expected)


def test_an_estimate_is_made_once_for_tokenizers_that_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    first = information_for(toy.tokenizer())
    monkeypatch.setattr(information, "_estimated_counts", None)
    again = information_for(toy.tokenizer())
    assert torch.equal(again, first)
    again.zero_()  # a caller's own
    assert torch.equal(information_for(toy.tokenizer()), first)
    other = toy.tokenizer()
    other.add_tokens(["unheard"])
    with pytest.raises(TypeError):  # it is estimated anew
        information_for(other)

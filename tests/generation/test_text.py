"""Pieces of text are certain: whole characters, and nothing of a stop text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import toy
from compllm_rag.generation.text import Detokenizer

TOKENIZER = toy.tokenizer()
QUIET = settings(max_examples=150, deadline=None, derandomize=True, database=None)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("a b.\n灯é🙂👩‍🚀"), max_size=40)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As sentencepiece tokenizers are: a space belongs to the word behind it, rare characters are bytes."""
    tokens = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "b", "▁b", "é", "\ufffd"]
    core = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    core.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


FALLBACK = byte_fallback()


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []


def run(ids: list[int], stop: tuple[str, ...] = (), tokenizer=TOKENIZER) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped:
            break
    return [*pieces, detokenizer.finish()], detokenizer


@QUIET
@given(TEXTS)
def test_pieces_join_to_the_text_and_cut_no_character(text: str) -> None:
    pieces, detokenizer = run(encode(text))
    assert "".join(pieces) == detokenizer.text == text
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


@QUIET
@given(st.lists(st.integers(4, 399), max_size=40))
def test_pieces_of_any_tokens_join_to_what_the_tokenizer_decodes(ids: list[int]) -> None:
    # Random tokens are mostly no valid UTF-8: nothing may be lost or given twice.
    pieces, detokenizer = run(ids)
    assert "".join(pieces) == detokenizer.text == TOKENIZER.decode(ids, clean_up_tokenization_spaces=False)


@QUIET
@given(st.lists(st.sampled_from(["▁", "▁a", "b", "é", "🙂", "灯", "</s>", "\ufffd"]), max_size=20))
def test_words_and_whole_characters_in_bytes_join_to_what_the_tokenizer_decodes(words: list[str]) -> None:
    known = FALLBACK.get_vocab()
    ids = [i for w in words for i in ([known[w]] if w in known else [2 + byte for byte in w.encode()])]
    pieces, detokenizer = run(ids, tokenizer=FALLBACK)
    assert "".join(pieces) == detokenizer.text == FALLBACK.decode(ids, skip_special_tokens=True)


@QUIET
@given(st.lists(st.sampled_from([*range(12), *(2 + byte for byte in "aé🙂".encode()), *range(258, 265)]), max_size=30))
def test_bytes_that_turn_out_to_be_no_text_lose_nothing_that_follows(ids: list[int]) -> None:
    pieces, detokenizer = run([*ids, FALLBACK.get_vocab()["▁a"], FALLBACK.get_vocab()["b"]], tokenizer=FALLBACK)
    assert "".join(pieces) == detokenizer.text
    assert detokenizer.text.endswith("ab")


def test_what_was_given_out_stays_when_later_bytes_make_it_no_text() -> None:
    byte = "<0x{:02X}>".format
    ids = FALLBACK.convert_tokens_to_ids(["▁a", byte(0x62), byte(0xA9), "▁b", "a", "▁a"])
    assert FALLBACK.decode(ids) == "a\ufffd\ufffd ba a"
    pieces, _ = run(ids, tokenizer=FALLBACK)
    assert pieces == ["a", "b", "", "\ufffd b", "a", " a", ""]


@QUIET
@given(TEXTS, st.lists(st.text("ab.\n灯 ", min_size=1, max_size=4), max_size=3))
def test_a_stop_text_ends_the_text_in_front_of_it_however_the_tokens_fall(text: str, stop: list[str]) -> None:
    pieces, detokenizer = run(encode(text), tuple(stop))
    assert "".join(pieces) == detokenizer.text
    assert text.startswith(detokenizer.text)
    assert not any(end in detokenizer.text for end in stop)
    if any(end in text for end in stop):
        assert detokenizer.stopped
        assert any(text[len(detokenizer.text) :].startswith(end) for end in stop)
    else:
        assert detokenizer.text == text


def test_a_character_of_several_tokens_comes_out_whole() -> None:
    ids = encode("a🙂b")
    assert len(ids) == 6
    pieces, _ = run(ids)
    assert pieces == ["a", "", "", "", "🙂", "b", ""]


def test_what_may_become_a_stop_text_is_held_back_until_it_does_not() -> None:
    detokenizer = Detokenizer(TOKENIZER, ["xyz"])
    pieces = [detokenizer.push(token) for token in encode("axyxyw")]
    assert "".join(pieces) == "axyxyw"
    assert pieces[:3] == ["a", "", ""]


def test_a_stop_text_across_tokens_never_shows() -> None:
    pieces, detokenizer = run(encode("boat\n\nQuestion: more"), ("\n\nQuestion",))
    assert "".join(pieces) == "boat"
    assert detokenizer.stopped


def test_what_is_held_back_comes_out_at_the_end() -> None:
    detokenizer = Detokenizer(TOKENIZER, ["xyz"])
    assert "".join(map(detokenizer.push, encode("axy"))) == "a"
    assert detokenizer.finish() == "xy"
    assert detokenizer.finish() == ""


def test_an_unfinished_character_at_the_end_is_shown_as_such() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.push(token) for token in encode("🙂")[:-1]] == [""] * 3
    assert set(detokenizer.finish()) == {"\ufffd"}


def test_special_tokens_have_no_text() -> None:
    pieces, _ = run([*encode("a"), 3, 1, *encode("b")])
    assert "".join(pieces) == "ab"


@pytest.mark.parametrize("stop", [(), ("",)])
def test_an_empty_stop_text_stops_nothing(stop: tuple[str, ...]) -> None:
    pieces, detokenizer = run(encode("boat"), stop)
    assert "".join(pieces) == "boat"
    assert not detokenizer.stopped


def test_nothing_follows_a_stop_text() -> None:
    _, detokenizer = run(encode("a.b"), (".",))
    assert detokenizer.text == "a"
    assert [detokenizer.push(token) for token in encode("c")] == [""]
    assert detokenizer.finish() == ""
    assert detokenizer.text == "a"

"""Sentence ends of every script that Unicode knows a mark for, and full stops that end nothing."""

from __future__ import annotations

import unicodedata

import pytest
import regex

from compllm_rag.compression.sentence_ends import SENTENCE_TERMINAL, sentence_ends


def parts(text: str) -> list[str]:
    cuts = [0, *(after for after, _ in sentence_ends(text)), len(text)]
    return [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


def test_the_table_is_unicodes_property() -> None:
    terminal = regex.compile(r"\p{Sentence_Terminal}")
    found = {chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000 and terminal.match(chr(code))}
    assert found >= SENTENCE_TERMINAL
    # A later Unicode may add marks, which another version of the segmenter may then know.
    assert all(unicodedata.category(mark) == "Cn" for mark in found - SENTENCE_TERMINAL)
    assert len(SENTENCE_TERMINAL) == 172


@pytest.mark.parametrize("mark", sorted(SENTENCE_TERMINAL))
def test_every_mark_ends_a_sentence(mark: str) -> None:
    assert parts(f"灯台{mark} 灯台") == [f"灯台{mark} ", "灯台"]


@pytest.mark.parametrize(
    "text",
    [
        "वह घर गया।| नदी शांत थी।|| कल",
        "他来了。|「走吧！」|他说？|好",
        "灯台．|海｡|石",
        "وہ گھر گیا۔ |دریا خاموش تھا۔ |کل",
        "هل جاء؟ |نعم",
        "ቤት ነው። |ወንዝ",
        "ទឹក។ |ផ្ទះ",
        "ရေ။ |အိမ်",
        "Տուն։ |Գետ",
        'He said "Go." |She went! |(Alone?) |Yes… |So',
        "It was.\n\n|A heading\n\n|Text",
    ],
)
def test_sentences_of_many_scripts(text: str) -> None:
    expected = [part for part in text.replace("।||", "।।|").split("|") if part]
    # White space behind a mark belongs to the sentence that it ends.
    moved = "".join(expected)
    found = parts(moved)
    assert "".join(found) == moved
    assert [part.strip() for part in found] == [part.strip() for part in expected]


@pytest.mark.parametrize(
    "text",
    [
        "Dr. Smith met Mr. J. R. Jones at 5 p.m.",
        "Mrs. Ray and Ms. Lee saw Prof. Hill of St. Louis, e.g. on Mt. Baker, i.e. far away",
        "room No. 5 of the U.S. Embassy, Fig. 3, pp. 4, Vol. 2 and ch. 1, cf. Brown vs. Green",
        "at 9 a.m. on Jan. 5 it was approx. 3.14 miles from Apple Inc. headquarters, etc. and so on",
        "Smith et al. found that Ph.D. students of J.R.R. Tolkien slept",
        "Herr Dr. Maier bzw. Frau Nr. 5 kam am 3. Mai, z.B. ca. 5 Uhr",
        "г. Москва, ул. Ленина, т.е. дома",
        "1. Unpack the lamp",
        "It costs 3.14 or ３．１４ at example.com or v1.2",
        "Dr.\nSmith",
    ],
)
def test_abbreviations_initials_and_numbers_end_nothing(text: str) -> None:
    assert parts(text) == [text]


@pytest.mark.parametrize(
    "text",
    [
        "He came at 5 p.m. |They ate fish, bread, etc. |Then all slept. |It was in the U.S. |He was glad",
        "It was in 1902. |She left. |We have 12. |Go",
        "It is no. |Never mind the army. |The sun rose",
        "2. Light it. |Wait... |Then",
        "Dr.\n\n|Smith",
    ],
)
def test_what_looks_like_an_abbreviation_may_end_a_sentence(text: str) -> None:
    assert parts(text.replace("|", "")) == text.split("|")


def test_monotonous_texts_take_linear_time() -> None:
    for text in ("." * 300_000, '."' * 150_000, "a. " * 100_000, "\n" * 300_000, "।" * 300_000, "．1" * 150_000):
        assert sum(1 for _ in sentence_ends(text)) <= len(text)

"""An edit costs what it costs in English, in every script and without any marks; version 1 stays as it was."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import toy
from compllm_rag.compression.segmentation import Segmenter, chunk_bounds, units_of
from compllm_rag.errors import ConfigurationError

TOKENIZER = toy.tokenizer()
S = 20
# Words, what ends a sentence, and what stands between words.
SCRIPTS = {
    "English": ("cat ship moon bread river stone letter winter garden road", ". ", " "),
    "Chinese": ("水 房子 河流 书 路 花园 石头 面包 月亮 船", "。", ""),
    "Japanese, full-width point": ("水 家 川 本 道 庭 石 月 船", "．", ""),
    "Hindi": ("पानी घर नदी किताब सड़क बगीचा पत्थर रोटी", "। ", " "),
    "Urdu": ("پانی گھر دریا کتاب سڑک باغ پتھر روٹی", "۔ ", " "),
    "Arabic": ("ماء بيت نهر كتاب طريق حديقة حجر خبز", "؟ ", " "),
    "Amharic": ("ውሃ ቤት ወንዝ መጽሐፍ መንገድ", "። ", " "),
    "Burmese": ("ရေ အိမ် မြစ် စာအုပ် လမ်း", "။ ", ""),
    "Khmer": ("ទឹក ផ្ទះ ទន្លេ សៀវភៅ ផ្លូវ", "។ ", ""),
    "Thai": ("น้ำ บ้าน แม่น้ำ หนังสือ ถนน สวน หิน ขนมปัง", " ", ""),
    "Thai without a blank": ("น้ำ บ้าน แม่น้ำ หนังสือ ถนน สวน หิน ขนมปัง", "", ""),
    "Tibetan": ("ཆུ ཁང་པ གཙང་པོ དེབ ལམ", "། ", "་"),
    "Lao with zero-width blanks": ("ນ້ຳ ເຮືອນ ແມ່ນ້ຳ ປຶ້ມ ຖະໜົນ", "\u200b", "\u200b"),
    "transcript": ("so the cat um ship moon and bread river then stone letter winter garden road", " ", " "),
    "transcript in lines": ("so the cat um ship moon and bread river then stone letter winter road", "\n", " "),
    "clauses": ("cat ship moon bread river stone letter winter garden road", ", ", " "),
    "one line of numbers": ("17 4 290 33 8 51 1 76 2024 9", ";", ";"),
}


def sentences(script: str, n: int = 60, seed: int = 5) -> list[str]:
    vocabulary, end, blank = SCRIPTS[script]
    rng = random.Random(seed)
    return [blank.join(rng.choices(vocabulary.split(), k=rng.randint(5, 10))) + end for _ in range(n)]


def new_share(before: str, after: str, version: int = 2) -> float:
    segmenter = Segmenter(TOKENIZER, S, version)
    old, new = (Counter(map(tuple, segmenter.split(text))) for text in (before, after))
    return (new - old).total() / new.total()


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_inserted_a_deleted_and_a_changed_sentence_cost_a_few_per_cent(script: str) -> None:
    parts, extra = sentences(script), sentences(script, 10, seed=6)
    text = "".join(parts)
    shares = []
    for at, sentence in zip(range(3, 60, 6), extra, strict=False):
        shares.append(new_share(text, "".join([*parts[:at], sentence, *parts[at:]])))
        shares.append(new_share(text, "".join([*parts[:at], *parts[at + 1 :]])))
        shares.append(new_share(text, "".join([*parts[:at], sentence, *parts[at + 1 :]])))
    assert sum(shares) / len(shares) < 0.07
    assert max(shares) < 0.2


@pytest.mark.parametrize("script", SCRIPTS)
def test_segments_join_are_no_longer_than_s_and_have_no_tiny_tails(script: str) -> None:
    tokenized = Segmenter(TOKENIZER, S).tokenize("".join(sentences(script)))
    assert [i for ids in tokenized.segment_ids() for i in ids] == tokenized.ids
    lengths = [s.end - s.start for s in tokenized.segments]
    assert min(lengths) >= S // 4
    assert max(lengths) <= S
    # Cuts within characters are for characters that are longer than a segment, or for want of anything else.
    within = [s for s in tokenized.segments[1:] if tokenized.offsets[s.start][0] < tokenized.offsets[s.start - 1][1]]
    assert len(within) <= len(lengths) / 20


@pytest.mark.parametrize("script", ["transcript", "Thai without a blank", "transcript in lines"])
def test_units_and_chunks_of_text_without_marks_survive_an_edit(script: str) -> None:
    parts, extra = sentences(script, 400), sentences(script, 8, seed=6)
    segmenter = Segmenter(TOKENIZER, S)
    old = Counter(map(tuple, units_of(segmenter.tokenize("".join(parts)), 240)))
    assert old.total() > 20
    for at, sentence in zip(range(10, 400, 50), extra, strict=False):
        tokenized = segmenter.tokenize("".join([*parts[:at], sentence, *parts[at:]]))
        new = Counter(map(tuple, units_of(tokenized, 240)))
        assert (new - old).total() <= 3
        bounds = chunk_bounds(tokenized, 200)
        assert [a for a, _ in bounds[1:]] == [b for _, b in bounds[:-1]]


def test_long_sentences_are_cut_where_they_pause() -> None:
    text = "the boat row, the lamp and the boat; " * 2 + "then the men on the rock row home\nand all is well in the end"
    tokenized = Segmenter(TOKENIZER, 12).tokenize(text)
    ends = [tokenized.offsets[s.end - 1][1] for s in tokenized.segments[:-1]]
    assert all(text[end - 1] in ",; \n" or text[end] in " \n" for end in ends)
    assert sum(text[end - 1] in ",;\n" or text[end] == "\n" for end in ends) >= len(ends) / 2


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.text(st.sampled_from("ab ,\n.水।🙂\u200bน้"), max_size=400), st.integers(2, 30))
def test_any_text_is_cut_exactly_by_both_versions(text: str, size: int) -> None:
    for version in (1, 2):
        tokenized = Segmenter(TOKENIZER, size, version).tokenize(text)
        bounds = [0, *(s.end for s in tokenized.segments)]
        assert bounds[-1] == len(tokenized.ids)
        assert all(0 < b - a <= size for a, b in pairwise(bounds))
        assert [s.start for s in tokenized.segments] == bounds[:-1]


def test_version_1_cuts_as_it_always_did() -> None:
    pieces = [
        "the",
        "lamp",
        "Dr.",
        "。",
        "！」",
        ". ",
        "! ",
        "?\n",
        '." ',
        "… ",
        ".\n\n",
        ".\n \n\t",
        " ",
        "naïve ",
        "灯台",
    ]
    pieces += ["boat " * 50, "row\n" * 90, "क्या है। ", "x\r\n\r\n"]
    rng, digest, segmenter = random.Random(1), hashlib.sha256(), Segmenter(TOKENIZER, S, 1)
    for _ in range(100):
        cut = segmenter.tokenize("".join(rng.choices(pieces, k=rng.randint(1, 40)))).segments
        digest.update(repr([(s.start, s.end, s.level) for s in cut]).encode())
    assert digest.hexdigest() == "8c6d0eec580dfc77831072b99a7a1e058befdc0a60d7492bf08966bdd215dbb8"
    assert new_share("boat row " * 80, "lamp " + "boat row " * 80, version=1) > 0


def test_there_is_no_version_3() -> None:
    with pytest.raises(ConfigurationError, match="version of the segmenter"):
        Segmenter(TOKENIZER, S, 3)

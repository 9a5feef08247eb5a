"""Sentences as runs of tokens, and BM25 over them."""

from __future__ import annotations

import pytest

import toy
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.reading.sentences import sentence_cutter, word_matches
from tests.reading.read_samples import PARTS, compressor


@pytest.mark.parametrize("codec", ["deep", "input"])
@pytest.mark.parametrize("text", [*PARTS, toy.TEXT, "One", "", "Half \ud800 a character. And more."])
def test_sentences_cover_a_passage_and_end_where_segments_do(codec: str, text: str) -> None:
    spec = compressor(codec).spec
    cut = sentence_cutter(spec.segmenter)
    found = cut(text)
    assert cut(text) is found
    ids = [token for unit in spec.units(text.replace("\ud800", "\ufffd")) for token in unit]
    assert [s.start for s in found] == [0, *(s.end for s in found)][: len(found)]
    assert (found[-1].end if found else 0) == len(ids)
    assert "".join(s.text for s in found) == text.replace("\ud800", "\ufffd")
    if codec == "input":
        ends = {0}
        for segment in spec.units(text.replace("\ud800", "\ufffd")):
            ends.add(max(ends) + len(segment))
        assert {s.end for s in found} <= ends


def test_a_sentence_longer_than_a_segment_is_one_sentence() -> None:
    segmenter = Segmenter(toy.tokenizer(), 20)
    text = "The keepers rowed out through the surf with oil and flour and letters and boats and lamps. It burns."
    found = sentence_cutter(segmenter)(text)
    assert len(found[0]) > 20
    assert [s.text.strip() for s in found] == [text[: text.index(". ") + 1], "It burns."]


def test_rare_words_count_more_and_are_told_first() -> None:
    texts = ["The lamp burns in the tower.", "Marsh saw the lamp.", "The the the the lamp lamp lamp.", "Gulls nest."]
    found = word_matches("Did Marsh see the lamp, the lamp?", texts)
    assert found[1].words == ("marsh",), "what most of them say tells nothing"
    assert found[1].score == max(match.score for match in found)
    assert found[3].score == 0 and found[3].words == ()
    assert all(match.score == 0 for match in word_matches("", texts))
    assert word_matches("lamp", []) == []
    assert [match.score for match in word_matches("lamp", ["", ""])] == [0.0, 0.0]


def test_scores_are_those_of_bm25s() -> None:
    bm25s = pytest.importorskip("bm25s")
    from compllm_rag.catalog.words import words

    corpus = [words(part) for part in PARTS]
    index = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    index.index(corpus, show_progress=False)
    question = "when did the keepers see the lamp burn"
    theirs = index.get_scores(words(question)).tolist()
    mine = [match.score / 2.2 for match in word_matches(question, PARTS)]  # Lucene leaves out the factor k1 + 1
    # It counts a word of the question twice that is said twice; here each counts once.
    once = index.get_scores(list(dict.fromkeys(words(question)))).tolist()
    assert mine == pytest.approx(once, rel=1e-5)
    assert max(range(3), key=mine.__getitem__) == max(range(3), key=theirs.__getitem__)

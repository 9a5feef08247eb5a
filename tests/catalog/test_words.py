"""Words of any script, and the index of them over a catalog."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compllm_rag.catalog.keywords import KeywordIndex
from compllm_rag.catalog.words import words
from compllm_rag.errors import CorruptRecordError
from compllm_rag.llamaindex.vector_store import FaissTextVectorStore
from tests.catalog.catalog_samples import DIM, axis, filled, node


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Lighthouse's lamp, 42 m.", ["the", "lighthouse", "s", "lamp", "42", "m"]),
        ("ÉCOLE Straße ＦＵＬＬ１", ["école", "strasse", "full1"]),
        ("हिन्दी में लिखा", ["हिन्दी", "में", "लिखा"]),  # vowel signs are marks, and no ends of words
        ("灯台x", ["灯", "台", "灯台", "x"]),
        ("灯台は1871年", ["灯", "台", "は", "灯台", "台は", "1871", "年"]),
        ("ร้าน", ["ร้", "า", "น", "ร้า", "าน"]),
        ("한국어 등대", ["한국어", "등대"]),
        (" -- …", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@given(st.text())
def test_words_are_alike_in_upper_case_and_alone(text: str) -> None:
    found = words(text)
    assert all(found) and words(text.upper().lower()) == words(text.lower())
    for word in found:
        assert word in words(word)


def searched(store: FaissTextVectorStore, question: str, k: int = 9) -> list[str]:
    index = KeywordIndex(store.catalog, lambda row: row.text)
    return [row.node_id for row, _ in index.search(question, k)]


def test_only_rows_that_say_a_word_are_found() -> None:
    store = FaissTextVectorStore(dim=DIM)
    assert searched(store, "lamp") == []
    store.add([node(f"n{i}", axis(i), text=text) for i, text in enumerate(["", "the lamp", "a lamp lamp", "the sea"])])
    assert searched(store, "Lamp?") == ["n2", "n1"]
    assert searched(store, "lamp", 1) == ["n2"]
    assert searched(store, "whale") == searched(store, "...") == []


def test_equal_scores_stand_in_order_of_arrival() -> None:
    store = FaissTextVectorStore(dim=DIM)
    store.add([node(f"n{i}", axis(i), text="same words") for i in range(30)])
    assert searched(store, "words", 30) == [f"n{i}" for i in range(30)]


def test_the_index_follows_every_change(tmp_path: Path) -> None:
    with filled(tmp_path / "s") as store, FaissTextVectorStore.open(tmp_path / "s", read_only=True) as reader:
        mine = KeywordIndex(store.catalog, lambda row: row.text)
        other = KeywordIndex(reader.catalog, lambda row: row.text)

        def found(index: KeywordIndex, question: str) -> list[str]:
            return [row.node_id for row, _ in index.search(question, 9)]

        assert found(mine, "n1") == found(other, "n1") == ["n1"]
        store.add([node("x", axis(0), text="whale n1")])
        assert found(mine, "whale") == ["x"] and found(other, "whale") == []
        store.rollback()
        assert found(mine, "whale") == []
        # The same row id again, with another text, in a transaction of its own.
        store.add([node("y", axis(0), text="shark")])
        assert found(mine, "whale") == [] and found(mine, "shark") == ["y"]
        store.commit()
        assert found(other, "shark") == ["y"]
        store.delete_nodes(["y"])
        store.commit()
        assert found(mine, "shark") == found(other, "shark") == []


def test_rows_that_are_not_allowed_are_not_found() -> None:
    store = FaissTextVectorStore(dim=DIM)
    store.add([node(f"n{i}", axis(i), text="lamp " * (i + 1)) for i in range(5)])
    index = KeywordIndex(store.catalog, lambda row: row.text)
    found = index.search("lamp", 2, lambda connection: np.array([1, 3]))
    assert sorted(row.node_id for row, _ in found) == ["n0", "n2"]
    assert index.search("lamp", 2, lambda connection: np.array([], dtype=np.int64)) == []


def test_a_damaged_row_is_no_missing_answer() -> None:
    store = FaissTextVectorStore(dim=DIM)
    store.add([node("n0", axis(0), text="lamp")])
    with store.catalog.writing() as connection:
        connection.execute("UPDATE nodes SET text = 'lump'")
    with pytest.raises(CorruptRecordError, match="n0"):
        searched(store, "lamp")

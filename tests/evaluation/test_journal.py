"""The journal of a run: it goes on where it stood, and leaves the file of another run alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from compllm_rag.errors import ConfigurationError
from compllm_rag.evaluation.journal import Journal

RUN = {"fingerprint": "ab", "rates": (2.0, 4.0)}


def test_a_run_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "run.jsonl"
    Journal(path, RUN).put({"part": 1}, [1, 2])
    assert len(path.read_bytes().splitlines()) == 2
    with path.open("ab") as file:
        file.write(b'{"key": "torn')
    again = Journal(path, RUN)
    assert again.get({"part": 1}) == [1, 2] and again.get({"part": 2}) is None
    again.put({"part": 2}, {"n": 1})
    assert Journal(path, RUN).get({"part": 2}) == {"n": 1}
    assert len(path.read_bytes().splitlines()) == 3


def test_a_run_that_was_killed_in_its_first_line_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"key": "run", "resu')
    Journal(path, RUN).put({"part": 1}, "a")
    assert Journal(path, RUN).get({"part": 1}) == "a"


@pytest.mark.parametrize("first", [{**RUN, "fingerprint": "cd"}, None])
def test_the_journal_of_another_run_is_refused_and_left_alone(tmp_path: Path, first: dict | None) -> None:
    path = tmp_path / "run.jsonl"
    Journal(path, first).put({"part": 1}, 1)
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match=r"run.jsonl is of another run.*fingerprint 'ab'"):
        Journal(path, RUN)
    assert path.read_bytes() == before

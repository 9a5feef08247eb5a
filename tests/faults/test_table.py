"""The table in README.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_NUMBERS = set(range(1, 31)) - {20}


def test_every_number_has_tests_and_they_exist() -> None:
    numbers = set[int]()
    for line in (Path(__file__).parent / "README.md").read_text(encoding="utf-8").splitlines():
        first = re.match(r"\| ([\d, ]+) \|", line)
        if first is None:
            continue
        numbers |= {int(number) for number in first[1].split(",")}
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line)
        assert named, line
        for path, test in named:
            assert re.search(rf"def {test}\(", (_ROOT / path).read_text(encoding="utf-8")), (path, test)
    assert numbers == _NUMBERS

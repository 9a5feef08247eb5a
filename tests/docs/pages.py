"""The README and the pages, taken apart."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>.+) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *kinds: str) -> list[re.Match[str]]:
    """Fenced blocks of these kinds; `reason` says why one is not run."""
    return [found for found in BLOCK.finditer(read(page)) if found["kind"] in kinds]


def commands(page: Path) -> list[list[str]]:
    """The words behind `compllm-rag` of every line of a block, comments left out."""
    lines = [line.strip() for found in blocks(page, "bash", "") for line in found["text"].splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("compllm-rag ")]


def mentions(page: Path) -> list[list[str]]:
    """The same of commands within sentences, which may leave arguments out."""
    prose = BLOCK.sub("", read(page))
    return [shlex.split(words) for words in re.findall(r"`compllm-rag ([a-z][^`]*)`", prose)]


def anchors(page: Path) -> set[str]:
    """What links may name behind `#`."""
    headings = re.findall(r"^#+ (.+)$", read(page), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}

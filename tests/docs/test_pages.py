"""What README, pages and docstrings name is there, and the README's numbers were measured."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import compllm_rag
from tests.docs.pages import BLOCK, PAGES, ROOT, anchors, name_of, read

LINK = re.compile(r"(?:\]\(|^\[[^\]]+\]: )(?P<target>[^)\s]+)", re.M)
FOLDERS = "compllm_rag|benchmarks|pipelines|tests|docs|notebooks|store"
NAMED = re.compile(rf"(?<![\w./-])(?P<path>(?:{FOLDERS})/[\w./]+\.\w+)")
SOURCES = [path for folder in ("compllm_rag", "benchmarks", "pipelines") for path in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_is_named_is_there(page: Path) -> None:
    text = read(page)
    for module in re.findall(r"python -m ([\w.]*\w)", text):
        elsewhere = module.startswith("vllm.")  # in an environment of its own
        assert elsewhere or module == "benchmarks.NAME" or importlib.util.find_spec(module), module
    for found in NAMED.finditer(LINK.sub("", text)):
        assert any((folder / found["path"]).exists() for folder in (ROOT, ROOT / "compllm_rag")), found["path"]
    for found in LINK.finditer(BLOCK.sub("", text)):
        target, _, anchor = found["target"].partition("#")
        if not re.match(r"\w+://", target):
            file = page.parent / target if target else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), found["target"]


def test_sections_of_the_design_that_are_referred_to() -> None:
    sections = re.findall(r"^## (\d+)\. ", read(ROOT / "docs/design.md"), re.M)
    assert sections == [str(number) for number in range(1, len(sections) + 1)]
    references = 0
    for path in [*SOURCES, *PAGES, ROOT / "pyproject.toml"]:
        named = re.findall(r"design(?:\.md)?(?:\]\([^)]*\))?,?\s+(?:#\s+)?section (\d+)", read(path))
        assert set(named) <= set(sections), path
        assert not re.search(r"DESIGN(\.md)?,? section", read(path)), path
        references += len(named)
    assert references > 15


def test_numbers_of_the_readme_stand_in_the_pages_it_names() -> None:
    part = read(ROOT / "README.md").split("[start:numbers]")[1].split("[end:numbers]")[0]
    pages: list[str] = []
    for row in [line.strip("|").split("|") for line in part.splitlines() if line.startswith("|")][2:]:
        pages = re.findall(r"\[(quality|benchmarks|storage)\]", row[-1]) or pages
        measured = "".join(read(ROOT / f"docs/{page}.md") for page in pages)
        numbers = re.findall(r"\d[\d,.]*\d", " ".join(row[1:-1]))
        assert len(numbers) >= 3
        for number in numbers:
            assert re.search(rf"(?<![\d.,]){re.escape(number)}(?!\d)", measured), number


def test_the_readme_stays_short() -> None:
    assert len(read(ROOT / "README.md").splitlines()) <= 110


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"([\w/]+\.md)$", read(ROOT / "mkdocs.yml"), re.M)
    assert sorted(listed) == sorted(
        path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")
    )


def test_public_names_are_in_the_reference() -> None:
    pages = "\n".join(map(read, (ROOT / "docs/api").glob("*.md")))
    named = re.findall(r"^::: compllm_rag\.([A-Z]\w+|[a-z]+_\w+)$", pages, re.M)
    assert sorted(named) == sorted({*compllm_rag.__all__} - {"__version__"})

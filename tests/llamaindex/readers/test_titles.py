"""Titles: headings, and nothing that only looks like one."""

from __future__ import annotations

import time

import pytest

from compllm_rag.llamaindex.readers.titles import markdown_title, rst_title


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("# Plain\n", "Plain"),
        ("intro\n\n# The *big* `x` [link](http://u) #\n", "The big x link"),
        ("---\n# generated\ntitle: Ferry times\n---\n\n# Other\n", "Ferry times"),
        ("---\ntitle: 'Ferry: times'\n...\n", "Ferry: times"),
        ("---\n# generated\ntags: [a]\n---\n\n# Ferry times\n", "Ferry times"),
        ("---\ntitle: Yes\n---\n# No\n", "Yes"),
        ("---\ntitle: 2024-05-01\n---\n", "2024-05-01"),
        ("---\ntitle: >-\n  Two\n  lines\n---\n", "Two lines"),
        ("---\r\n# c\r\n---\r\n# Heading\r\n".replace("\r", ""), "Heading"),
        ("> # Quoted\n\n# Mine\n", "Mine"),
        ("---\ntitle: [a, b]\n---\n# Heading\n", "Heading"),
        ("---\ntitle: {a: [\n---\n# Heading\n", "Heading"),
        ('+++\ntitle = "Tom"\n+++\n# Heading\n', "Tom"),
        ("```sh\n# install\n```\n\n# Widget\n", "Widget"),
        ("~~~\n# no\n~~~\n# Yes\n", "Yes"),
        ("    # indented code\n\n# Yes\n", "Yes"),
        ("<!--\n# comment\n-->\n\n# Yes\n", "Yes"),
        ("History\n=======\n\n# Sources\n", "History"),
        ("## Second first\n\ntext", "Second first"),
        ("text\n\n## Only below\n", ""),
        ("#hashtag\n\n#!shebang\n", ""),
        ("#\n\n# Not empty\n", "Not empty"),
        ("", ""),
    ],
)
def test_markdown(text: str, title: str) -> None:
    assert markdown_title(text) == title


def test_rst() -> None:
    assert rst_title("=====\nTitle\n=====\n\nSub\n---\n") == "Title"
    assert rst_title("text\n\nTitle\n-----\n") == "Title"
    assert rst_title("no title\n") == ""


def test_long_and_nasty_texts_take_no_time() -> None:
    begun = time.perf_counter()
    for text in (
        "[" * 60_000,
        "---\ntitle: " + "[" * 10_000 + "\n---\n",
        "---\n" * 20_000,
        "> " * 30_000,
        "=" * 60_000,
        "# x\n" * 500_000,
    ):
        markdown_title(text)
        rst_title(text)
    assert time.perf_counter() - begun < 20

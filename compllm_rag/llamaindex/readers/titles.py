"""Titles of text files: front matter and headings, told from comments and code by a Markdown parser."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping

import yaml
from markdown_it import MarkdownIt

# A heading further down is no title; and front matter is short.
_LOOK_AT, _MOST_FRONT = 65_536, 16_384
_NO_VALUE = ("null", "Null", "NULL", "~")  # what YAML has for none
_FRONT = re.compile(r"\A(---|\+\+\+)[ \t]*\n(.*?)^(?:\1|\.\.\.)[ \t]*$\n?", re.M | re.S)
_RST_TITLE = re.compile(r"^(?:([=\-~`'\"^_*+#:.<>])\1{2,}\n)?[ \t]*(\S.*)\n([=\-~`'\"^_*+#:.<>])\3{2,}[ \t]*$", re.M)


def markdown_title(text: str) -> str:
    """The title of a Markdown text: `title` of its front matter, else its first heading of the first level.

    A heading of another level counts where the text begins with it. Empty where there is none.
    """
    text = text[:_LOOK_AT]
    front = _FRONT.match(text)
    if front and len(front[2]) <= _MOST_FRONT:
        title = _front_title(front[1], front[2])
        if title:
            return title
    return _heading(text[front.end() :] if front else text)


def rst_title(text: str) -> str:
    """The first underlined title of a reStructuredText, empty where there is none."""
    found = _RST_TITLE.search(text[:_LOOK_AT])
    return found[2].strip() if found else ""


def _front_title(fence: str, text: str) -> str:
    try:
        # Every value as it is written: a title "Yes" or "2024-05-01" is neither true nor a date.
        values = tomllib.loads(text) if fence == "+++" else yaml.load(text, Loader=yaml.BaseLoader)  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError):
        return ""  # then it is no front matter that anybody could read
    title = values.get("title") if isinstance(values, Mapping) else None
    return " ".join(title.split()) if isinstance(title, str) and title not in _NO_VALUE else ""


def _heading(text: str) -> str:
    parser = MarkdownIt("commonmark").disable("inline")
    tokens = parser.parse(text)
    for number, token in enumerate(tokens):
        if token.type == "heading_open" and not token.level and (token.tag == "h1" or number == 0):
            title = _plain(tokens[number + 1].content)
            if title:
                return title
    return ""


def _plain(heading: str) -> str:
    """A heading without emphasis, links and marks of code."""
    children = [child for token in MarkdownIt("commonmark").parseInline(heading) for child in token.children or []]
    return " ".join("".join(c.content or " " for c in children if c.type != "html_inline" and _says(c.type)).split())


def _says(kind: str) -> bool:
    return kind in ("text", "code_inline", "softbreak", "hardbreak", "text_special", "image")

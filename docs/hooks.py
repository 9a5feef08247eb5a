"""What mkdocs does besides: the page of the command line is written from the commands themselves."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.cli import get_docs_for_click

from compllm_rag.cli.main import app

_MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Put the commands where the mark is."""
    if _MARK not in markdown:
        return markdown
    command = typer.main.get_command(app)
    written = get_docs_for_click(obj=command, ctx=typer.Context(command), name="compllm-rag")
    written = written[written.index("\n## ") :].replace("][", "]\\[")  # else Markdown takes that for a link
    return markdown.replace(
        _MARK, re.sub(r"^(Example: |.* Example: )(compllm-rag .*)$", r"\1`\2`", written, flags=re.M)
    )

"""Training data from the hub by id, written as the JSON lines that everything else reads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from compllm_rag.errors import ConfigurationError, DataFileError
from compllm_rag.training.run_config import Progress

_NAME = re.compile(r"(?P<id>[^@:]+)(:(?P<config>[^@]+))?(@(?P<revision>.+))?")
_CONTEXT = ("context", "passage", "story", "story_section", "document", "article")
_ANSWERS = ("answers", "answer")


def fetch_dataset(
    spec: str, folder: Path, *, limit: int | None = None, progress: Progress | None = None
) -> tuple[Path, str]:
    """Fetch the train split of a hub dataset, once.

    Args:
        spec: `org/name`, `org/name:config`, either with `@revision`; or a local folder of data files.
        folder: Where the JSON lines go.
        limit: Most rows.
        progress: Called with a message and the share that is done.

    Returns:
        The file, and what it holds: `questions` or `texts`.

    Raises:
        ConfigurationError: The package `datasets` is not installed.
        DataFileError: The dataset cannot be fetched, or has neither questions with contexts nor texts.
    """
    match = _NAME.fullmatch(spec)
    local = Path(spec).is_dir()
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", spec).strip("-.")
    for kind in ("questions", "texts"):
        if (folder / f"{kind}-{name}.jsonl").exists():
            return folder / f"{kind}-{name}.jsonl", kind
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigurationError(
            "datasets of the hub need one more package",
            got="datasets is not installed",
            expected="the extra `train`",
            next_step="pip install 'compllm-rag[train]', or pass --data-dir",
        ) from error
    if progress:
        progress(f"fetching {spec}", None)
    try:
        rows = (
            load_dataset(spec, split="train")
            if local or match is None
            else load_dataset(match["id"], match["config"], revision=match["revision"], split="train")
        )
    # Whatever the network, the hub or a file format may raise; the library has no error of its own for them.
    except Exception as error:
        raise DataFileError(
            "dataset cannot be fetched",
            got=f"{spec} ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]})",
            expected="`org/name`, `org/name:config` or `org/name@revision` with a train split",
            next_step="check the name and the network, or pass --data-dir",
        ) from error
    return _write(rows, folder, name, spec, limit)


def _write(
    rows: Iterable[Mapping[str, Any]], folder: Path, name: str, spec: str, limit: int | None
) -> tuple[Path, str]:
    folder.mkdir(parents=True, exist_ok=True)
    scratch, kind, written = folder / f".{name}.part", "", 0
    with scratch.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            made = as_row(row)
            if made is None:
                continue
            kind = kind or ("questions" if "question" in made else "texts")
            file.write(json.dumps({"id": str(row.get("id", number)), **made}) + "\n")
            written += 1
            if limit is not None and written >= limit:
                break
    if not written:
        scratch.unlink()
        raise DataFileError(
            "dataset has no rows that can be used",
            got=spec,
            expected=f"columns question, {' or '.join(_CONTEXT)}, {' or '.join(_ANSWERS)}; or text",
            next_step="convert it to JSON lines and pass --questions or --texts",
        )
    target = folder / f"{kind}-{name}.jsonl"
    os.replace(scratch, target)
    return target, kind


def as_row(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """A dataset's row as a flat question or as a text; None if it is neither."""
    context = next((row[key] for key in _CONTEXT if isinstance(row.get(key), str)), None)
    if context and isinstance(row.get("question"), str):
        given = next((row[key] for key in _ANSWERS if row.get(key)), None)
        given = given.get("text") if isinstance(given, Mapping) else given
        answers = [given] if isinstance(given, str) else [str(answer) for answer in given or []]
        if answers:
            title = str(row.get("title") or "")
            return {"title": title, "context": context, "question": row["question"], "answers": answers}
    text = row.get("text")
    return {"text": text} if isinstance(text, str) and text.strip() else None

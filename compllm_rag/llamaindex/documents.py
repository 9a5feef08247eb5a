"""Files and folders to LlamaIndex documents, one at a time."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from llama_index.core.schema import Document

from compllm_rag.errors import ConfigurationError, CorpusPathError, EmptyCorpusError, UnreadableFileError

SUFFIXES = (".txt", ".md", ".jsonl")


def load_documents(paths: Iterable[str | Path]) -> Iterator[Document]:
    """Read documents from text files, Markdown files, JSON lines and folders of them.

    A file is a document, its path (within the folder given) its id, its first heading or its name the title. A line
    of JSON is a document too: `{"id", "title", "text"}`. Documents of white space alone are passed over.

    Args:
        paths: Files or folders; folders are read in order of name, files of other kinds in them are passed over.

    Yields:
        Documents with `title` and `source` in their metadata; the LLM and the embedder see the title only.

    Raises:
        CorpusPathError: A path does not exist.
        UnreadableFileError: A file is not UTF-8 text, a line not a JSON object with `id` and `text`, or the kind of a
            file named directly is unknown.
        ConfigurationError: Two documents have the same id.
    """
    seen: dict[str, str] = {}
    for path, name in list(_files(paths)):
        for document in _read(path, name):
            where = str(document.metadata["source"])
            if document.id_ in seen:
                raise ConfigurationError(
                    "two documents have the same id",
                    got=f"{document.id_!r} in {seen[document.id_]} and in {where}",
                    expected="unique ids",
                    next_step="rename one, or ingest the folders under a common parent",
                )
            seen[document.id_] = where
            if document.text.strip():
                yield document


def check_paths(paths: Iterable[str | Path]) -> None:
    """Refuse paths that do not exist, before anything slow is done.

    Raises:
        CorpusPathError: Naming the first such path.
    """
    for given in map(Path, paths):
        if not given.exists():
            raise CorpusPathError(
                "path does not exist", got=given, expected="a file or a folder", next_step="check the spelling"
            )


def some(documents: Iterator[Document]) -> Iterator[Document]:
    """The same documents, the first of them read already: what is wrong with it shows before anything slow is done.

    Raises:
        EmptyCorpusError: There is none.
    """
    first = next(documents, None)
    if first is None:
        raise empty_corpus()
    return itertools.chain([first], documents)


def empty_corpus() -> EmptyCorpusError:
    """The error for a corpus without documents."""
    return EmptyCorpusError(
        "there is nothing to ingest",
        got="no document with text",
        expected="at least one",
        next_step="name files or folders that hold .txt, .md or .jsonl text",
    )


def _files(paths: Iterable[str | Path]) -> Iterator[tuple[Path, str]]:
    asked = list(map(Path, paths))
    check_paths(asked)
    for given in asked:
        if given.is_dir():
            for root, folders, names in os.walk(given):
                folders.sort()
                for name in sorted(names):
                    path = Path(root) / name
                    if path.suffix.lower() in SUFFIXES:
                        yield path, path.relative_to(given).as_posix()
        elif given.suffix.lower() in SUFFIXES:
            yield given, given.name
        else:
            raise UnreadableFileError(
                "kind of file is not supported",
                got=given,
                expected=", ".join(SUFFIXES),
                next_step="convert it to text first",
            )


def _read(path: Path, name: str) -> Iterator[Document]:
    try:
        if path.suffix.lower() == ".jsonl":
            yield from _read_lines(path)
            return
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"byte {error.start} is not UTF-8", "save the file as UTF-8") from error
    except UnreadableFileError:
        raise  # an OSError too, and says more
    except OSError as error:
        raise _unreadable(path, error.strerror or type(error).__name__, "check its permissions") from error
    heading = next((line[2:].strip() for line in text.splitlines() if line.startswith("# ")), "")
    yield _document(name, heading if path.suffix.lower() == ".md" and heading else path.stem, text, str(path))


def _read_lines(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text, key = row["text"], row["id"]
            except (ValueError, KeyError, TypeError) as error:
                trouble = f"line {number}: {type(error).__name__} {error}"
                raise _unreadable(path, trouble, 'each line must be {"id": ..., "title": ..., "text": ...}') from error
            if not isinstance(text, str):
                raise _unreadable(path, f"line {number}: text is {type(text).__name__}", "make it a string")
            if not isinstance(key, str | int):
                raise _unreadable(path, f"line {number}: id is {type(key).__name__}", "make it a string")
            title = str(row.get("title") or "")
            # JSON can spell half a character, which nothing downstream can encode.
            if not _encodes(f"{key}{title}{text}"):
                raise _unreadable(path, f"line {number}: a lone surrogate", "escape whole characters")
            yield _document(str(key), title, text, f"{path}:{number}")


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _document(key: str, title: str, text: str, source: str) -> Document:
    metadata = {"title": title, "source": source}
    return Document(
        id_=key,
        text=text,
        metadata=metadata,
        excluded_llm_metadata_keys=["source"],
        excluded_embed_metadata_keys=["source"],
    )


def _unreadable(path: Path, got: str, next_step: str) -> UnreadableFileError:
    return UnreadableFileError(
        "file cannot be read as documents", got=f"{path}: {got}", expected="UTF-8 text", next_step=next_step
    )

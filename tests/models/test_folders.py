"""Local folders: data only, identified by digest."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compllm_rag.errors import UnknownModelError, UnsafeModelError
from compllm_rag.models import default_cache_dir, folders, resolve_model
from compllm_rag.models.folders import check_folder, folder_digests
from compllm_rag.models.llm import TargetLLM


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.sentinel), "w")


def plant(path: Path, sentinel: Path) -> None:
    with path.open("wb") as file:
        pickle.dump(Bomb(sentinel), file)


@pytest.fixture
def folder(tmp_path: Path, toy_folder: Path) -> Path:
    return Path(shutil.copytree(toy_folder, tmp_path / "model"))


def edit(path: Path, change: Any) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    change(found)
    path.write_text(json.dumps(found))


def test_resolves_to_itself(folder: Path) -> None:
    files = resolve_model(str(folder))
    assert files.path == folder
    assert files.source == str(folder)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files.digests)


def test_relative_path_is_named_absolutely(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert resolve_model("model").source == str(folder)
    assert resolve_model("./model").digests == resolve_model(str(folder)).digests


@pytest.mark.parametrize("name", ["compressor", "reader", "a b", "org@main", "übung", "-rf", "model.safetensors"])
def test_folder_may_have_any_name(name: str, folder: Path) -> None:
    named = folder.rename(folder.parent / name)
    assert TargetLLM.from_pretrained(named).source == str(named)


def test_org_and_name_that_exist_here_are_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    assert resolve_model(f"{folder.parent.name}/model").path.resolve() == folder.resolve()


def test_alias_wins_over_a_folder_unless_it_is_a_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.rename(folder.parent / "all-minilm-l6-v2")
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ConnectionError):
        resolve_model("all-minilm-l6-v2", offline=True)
    assert resolve_model("./all-minilm-l6-v2").digests


def test_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(UnknownModelError, match="not a model"):
        resolve_model(str(folder))


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnknownModelError, match="no weights"):
        resolve_model(str(folder))


def test_folder_with_an_adapter(folder: Path) -> None:
    """transformers would load the base model that the adapter names, under the digests of this folder."""
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/some/other/model"}))
    with pytest.raises(UnknownModelError, match="adapter"):
        resolve_model(str(folder))


@pytest.mark.parametrize("text", ["{", "\xff\xfe", ""])
def test_unreadable_config(text: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UnknownModelError, match="cannot be read"):
        resolve_model(str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickled_weights_are_refused_and_never_read(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    plant(folder / name, tmp_path / "ran")
    with pytest.raises(UnsafeModelError, match=name):
        TargetLLM.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_pickles_beside_safetensors_are_never_read(folder: Path, tmp_path: Path) -> None:
    plant(folder / "pytorch_model.bin", tmp_path / "ran")
    plant(folder / "training_args.bin", tmp_path / "ran")
    TargetLLM.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()
    with (folder / "pytorch_model.bin").open("rb") as file:
        pickle.load(file).close()
    assert (tmp_path / "ran").exists(), "the planted pickle does nothing, so the test above shows nothing"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "setting",
    [
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
        {"auto_map": {}},
        {"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}},
        {"parts": [{"deep": [{"auto_map": {"AutoModel": "evil.Model"}}]}]},
        {"trust_remote_code": True},
        {"text_config": {"loader": {"trust_remote_code": True}}},
    ],
)
def test_settings_that_ask_for_code_are_refused(
    name: str, setting: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    edit(folder / name, lambda found: found.update(setting))
    with pytest.raises(UnsafeModelError) as caught:
        TargetLLM.from_pretrained(folder)
    assert name in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_settings_that_refuse_code_are_fine(folder: Path) -> None:
    edit(folder / "config.json", lambda found: found.update(trust_remote_code=False, note="auto_map"))
    check_folder(folder)


def test_chat_template_and_notes_are_no_part_of_the_identity(folder: Path) -> None:
    before = resolve_model(str(folder)).digests
    (folder / "README.md").write_text("# other words")
    (folder / "LICENSE").write_text("other terms")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert resolve_model(str(folder)).digests == before


def bump_weights(folder: Path) -> None:
    save_file({"x": torch.ones(3)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", bump_weights),
        ("config.json", lambda folder: edit(folder / "config.json", lambda c: c.update(rms_norm_eps=0.5))),
        ("tokenizer.json", lambda folder: edit(folder / "tokenizer.json", lambda t: t.update(version="1.1"))),
        ("model-2.safetensors", lambda folder: save_file({"y": torch.ones(1)}, folder / "model-2.safetensors")),
        ("merges.txt", lambda folder: (folder / "merges.txt").write_text("a b\n")),
        ("vocab.json", lambda folder: (folder / "vocab.json").write_text("{}")),
        ("tokenizer.model", lambda folder: (folder / "tokenizer.model").write_bytes(b"\n")),
        ("1_Pooling/config.json", lambda folder: edit(folder / "1_Pooling/config.json", lambda c: c.update(cls=1))),
    ],
)
def test_identity_changes_with(name: str, change: Any, folder: Path) -> None:
    (folder / "1_Pooling").mkdir()
    before = resolve_model(str(folder)).digests
    change(folder)
    after = resolve_model(str(folder)).digests
    assert {key for key in {*before, *after} if before.get(key) != after.get(key)} == {name}


def test_digests_of_large_files_are_remembered_by_size_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    real = folders.file_digest
    monkeypatch.setattr(folders, "file_digest", lambda path: computed.append(path.name) or real(path))
    weights, cache = tmp_path / "m" / "model.safetensors", tmp_path / "cache"
    weights.parent.mkdir()
    weights.write_bytes(bytes(folders._LARGE))
    (tmp_path / "m" / "config.json").write_text("{}")
    first = folder_digests(tmp_path / "m", cache)
    assert computed == ["config.json", "model.safetensors"]
    computed.clear()
    assert folder_digests(tmp_path / "m", cache) == first
    assert computed == ["config.json"], "small files are read each time"
    # Same size, other time.
    computed.clear()
    weights.write_bytes(b"\1" * folders._LARGE)
    os.utime(weights, ns=(1, 1))
    second = folder_digests(tmp_path / "m", cache)
    assert "model.safetensors" in computed
    assert second["model.safetensors"] != first["model.safetensors"]
    # Same time, other size.
    weights.write_bytes(b"\1" * (folders._LARGE + 1))
    os.utime(weights, ns=(1, 1))
    third = folder_digests(tmp_path / "m", cache)
    assert third["model.safetensors"] != second["model.safetensors"]
    assert sorted(p.name for p in cache.iterdir()) == ["digests.json"]


@pytest.mark.parametrize("junk", ["", "[1]", '{"a": '])
def test_damaged_memory_only_costs_time(junk: str, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(bytes(folders._LARGE))
    right = folder_digests(tmp_path / "m", default_cache_dir())
    (default_cache_dir() / "digests.json").write_text(junk)
    assert folder_digests(tmp_path / "m", default_cache_dir()) == right
    (tmp_path / "file").write_text("")
    assert folder_digests(tmp_path / "m", tmp_path / "file") == right


def test_pickles_of_a_sentence_transformers_module_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "modules.json").write_text('[{"idx": 0, "path": ""}, {"idx": 1, "path": "2_Dense"}]')
    check_folder(tmp_path)
    (tmp_path / "2_Dense" / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(UnsafeModelError, match="2_Dense/pytorch_model.bin"):
        check_folder(tmp_path)

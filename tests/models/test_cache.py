"""The cache directory, and installing whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from compllm_rag.errors import ConfigurationError
from compllm_rag.models.cache import default_cache_dir, installing


def test_is_made_for_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPLLM_CACHE", str(tmp_path / "a" / "b"))
    before = os.umask(0)
    try:
        folder = default_cache_dir()
    finally:
        os.umask(before)
    assert folder == tmp_path / "a" / "b"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert default_cache_dir() == folder


def test_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPLLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "compllm-rag"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "compllm-rag"


def test_that_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPLLM_CACHE", str(tmp_path))
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(ConfigurationError, match="another user"):
        default_cache_dir()


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give files away")
def test_that_of_another_user_is_refused_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    os.chown(folder, 12345, -1)
    monkeypatch.setenv("COMPLLM_CACHE", str(folder))
    with pytest.raises(ConfigurationError, match="owner 12345"):
        default_cache_dir()


def test_one_that_cannot_be_made_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPLLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigurationError, match="COMPLLM_CACHE") as caught:
        default_cache_dir()
    assert "\n" not in str(caught.value)


def test_installing_puts_a_folder_in_place_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "models" / "m"
    with installing(target) as scratch:
        (scratch / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert list(target.parent.iterdir()) == [target]
    assert stat.S_IMODE(target.stat().st_mode) == 0o700


def test_installing_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), installing(tmp_path / "m") as scratch:
        (scratch / "file").write_text("x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_first_to_install_wins(tmp_path: Path) -> None:
    target = tmp_path / "m"
    with installing(target) as slow:
        (slow / "file").write_text("slow")
        with installing(target) as quick:
            (quick / "file").write_text("quick")
    assert (target / "file").read_text() == "quick"
    assert list(tmp_path.iterdir()) == [target]


def test_installing_that_fails_says_so(tmp_path: Path) -> None:
    target = tmp_path / "m"
    with pytest.raises(OSError), installing(target):
        target.write_text("a file is in the way")
    assert list(tmp_path.iterdir()) == [target]

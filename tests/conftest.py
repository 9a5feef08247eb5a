"""Shared fixtures: toy models and texts; nothing here touches the network."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Toy models gain nothing from threads, and several test processes with a pool of them each fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import toy  # noqa: E402
from compllm_rag.compression.compressor import Compressor  # noqa: E402
from compllm_rag.models.llm import TargetLLM  # noqa: E402
from tests.redis_servers import RedisProcess, installed  # noqa: E402


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a cache directory of its own."""
    monkeypatch.setenv("COMPLLM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def llm() -> TargetLLM:
    """A random Llama."""
    return toy.llm()


@pytest.fixture(scope="session")
def compressor(llm: TargetLLM) -> Compressor:
    """The untrained compressor of the random Llama."""
    return Compressor(llm)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama as a model folder."""
    return toy.save(tmp_path_factory.mktemp("toy-llm"))


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisProcess]:
    """A real Redis server of the test's own, on a free port of the loopback interface."""
    installed()
    with RedisProcess(tmp_path / "redis") as server:
        yield server


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """A real Redis server for tests that leave it as it is, each in a space of its own."""
    installed()
    with RedisProcess(tmp_path_factory.mktemp("redis") / "shared") as server:
        yield server

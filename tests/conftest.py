"""Shared fixtures: toy models and texts; nothing here touches the network."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Toy models gain nothing from threads, and several test processes with a pool of them each fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from compllm_rag.compression.compressor import Compressor
    from compllm_rag.models.llm import TargetLLM
    from tests.redis_servers import RedisProcess

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before coverage traces anything; the process that hands tests out has no need of them.
    import llama_index.core  # noqa: F401
    import transformers  # noqa: F401

# These take longest: begun first, no worker is left alone with one at the end.
_FIRST = ("tests/test_wheel.py", "tests/notebooks", "tests/llamaindex/sharding", "tests/generation/test_vllm_real")
# What counts here is processes and numbers of benchmarks; the lines of the package are traced by all other tests.
_UNTRACED = ("benchmarks", "faults", "notebooks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long ones first, and trace a test with several parameters for the first of them alone: tracing is slow."""
    root, seen = Path(__file__).parents[1], set()
    for item in items:
        name = (item.path, getattr(item, "originalname", item.name))
        if name in seen or set(_UNTRACED).intersection(item.path.parts):
            item.add_marker("no_cover")
        seen.add(name)
    items.sort(key=lambda item: not str(item.path.relative_to(root)).startswith(_FIRST))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a cache directory of its own."""
    monkeypatch.setenv("COMPLLM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def llm() -> TargetLLM:
    """A random Llama."""
    import toy

    return toy.llm()


@pytest.fixture(scope="session")
def compressor(llm: TargetLLM) -> Compressor:
    """The untrained compressor of the random Llama."""
    from compllm_rag.compression.compressor import Compressor

    return Compressor(llm)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama as a model folder."""
    import toy

    return toy.save(tmp_path_factory.mktemp("toy-llm"))


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisProcess]:
    """A real Redis server of the test's own, on a free port of the loopback interface."""
    from tests.redis_servers import RedisProcess, installed

    installed()
    with RedisProcess(tmp_path / "redis") as server:
        yield server


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """A real Redis server for tests that leave it as it is, each in a space of its own."""
    from tests.redis_servers import RedisProcess, installed

    installed()
    with RedisProcess(tmp_path_factory.mktemp("redis") / "shared") as server:
        yield server

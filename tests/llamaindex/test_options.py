"""Options of making and opening a storage: typed, and refused by name where there is none of the kind."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compllm_rag import Compressor, ConceptIndex
from compllm_rag.errors import ConfigurationError
from compllm_rag.llamaindex.opening import create_index, load_index
from compllm_rag.llamaindex.options import CreateOptions, LoadOptions, ModelOptions, StockNames
from toy_embedder import HashEmbedder


@pytest.mark.parametrize("given", [{"streming": True}, {"rat": 2.0, "chunksize": 100}])
def test_what_nothing_would_heed_is_refused(tmp_path: Path, compressor: Compressor, given: dict[str, Any]) -> None:
    own: dict[str, Any] = {"compressor": compressor, "embedder": HashEmbedder()}
    for folder in (None, tmp_path / "s"):
        with pytest.raises(ConfigurationError, match=", ".join(sorted(given))) as caught:
            ConceptIndex.create(folder, **own, **given)
        assert "chunk_size" in str(caught.value)
    assert not list(tmp_path.rglob("catalog.db"))
    ConceptIndex.create(tmp_path / "s", **own).close()
    with pytest.raises(ConfigurationError, match=", ".join(sorted(given))):
        ConceptIndex.create(tmp_path / "s", **own, **given)
    with pytest.raises(ConfigurationError, match="read_only"):
        ConceptIndex.load(tmp_path / "s", **own, **given)


@pytest.mark.parametrize(("function", "options"), [(create_index, CreateOptions), (load_index, LoadOptions)])
def test_the_types_name_what_the_functions_take(function: Any, options: Any) -> None:
    inner = {"folder", "namespace", "elsewhere", "expect", "complete", "model_options", "holds"}
    taken = set(inspect.signature(function).parameters) - inner
    assert options.__optional_keys__ == taken | ModelOptions.__optional_keys__ | StockNames.__optional_keys__


@pytest.mark.slow
def test_a_type_checker_sees_a_typing_error(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from compllm_rag import ConceptIndex\n"
        'ConceptIndex.load("storage", read_only=True, offline=True)\n'
        'ConceptIndex.load("storage", readonly=True)\n'
        'ConceptIndex.create("storage", rate=[2])\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", str(script)], capture_output=True, text=True
    )
    assert [line.split(":")[1] for line in done.stdout.splitlines() if ": error:" in line] == ["3", "4"], done.stdout

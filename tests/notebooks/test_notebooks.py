"""The notebooks: run on toy models as anybody runs them, with the outputs of a real run kept in the file."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

import toy
from pipelines.run_notebooks import NOTEBOOKS, ROOT, execute, machine_paths, main, tidy
from toy_embedder import save_sentence_transformer


@pytest.fixture(scope="module")
def embedder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sentence_transformer(tmp_path_factory.mktemp("toy-embedder"), toy.TEXT)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_all_of_them_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "migrating_an_app", "quickstart", "reading_and_rates", "storage_and_updates", "your_own_llm",
    ]  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_leaves_nothing_behind(path: Path, tmp_path: Path, toy_folder: Path, embedder_folder: Path) -> None:
    notebook, kept = read(path), read(path)
    execute(notebook, tmp_path, {"LLM": str(toy_folder), "EMBEDDER": str(embedder_folder)})
    tidy(notebook)
    assert not list(tmp_path.iterdir())
    for now, before in zip(code(notebook), code(kept), strict=True):
        assert {o.output_type for o in now.outputs} <= {o.output_type for o in before.outputs}, now.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_outputs_are_kept(path: Path) -> None:
    notebook = read(path)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run as a whole"
    silent = [cell.source for cell in cells if "print(" in cell.source and not cell.outputs]
    assert not silent
    kinds = {output.get("name", output.output_type) for cell in cells for output in cell.outputs}
    assert kinds <= {"stdout", "execute_result", "display_data"}
    assert not machine_paths(notebook, ROOT, Path(sys.prefix), Path("/root"), Path("/home"), Path("/tmp"))
    again = copy.deepcopy(notebook)
    tidy(again)
    assert again == notebook


def test_a_plot_is_kept() -> None:
    outputs = [output for cell in code(read(ROOT / "notebooks/reading_and_rates.ipynb")) for output in cell.outputs]
    assert [o for o in outputs if "image/png" in o.get("data", {})]


def written(tmp_path: Path, source: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source)]
    path = tmp_path / "one.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.mark.parametrize(
    ("source", "fault"), [("import os\nprint(os.getcwd())", "tmp"), ("open('left.txt', 'w').close()", "left.txt")]
)
def test_what_tells_of_this_machine_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: str, fault: str
) -> None:
    path = written(tmp_path, source)
    monkeypatch.setattr(sys, "argv", ["run_notebooks.py", str(path)])
    assert main() == 1
    assert fault in capsys.readouterr().err
    assert not code(read(path))[0].outputs


def test_parameters_must_exist(tmp_path: Path) -> None:
    notebook = read(ROOT / "notebooks" / "quickstart.ipynb")
    with pytest.raises(KeyError, match="NO_SUCH"):
        execute(notebook, tmp_path, {"NO_SUCH": "x"})

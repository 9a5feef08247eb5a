"""Run the notebooks and keep their outputs, so that a reader sees them without running anything.

    python pipelines/run_notebooks.py                      # all of them
    python pipelines/run_notebooks.py notebooks/quickstart.ipynb

Each runs in an empty folder of its own and must leave it empty. What a notebook writes to stderr (warnings, progress)
and whatever would show this machine's folders is not kept: the first is dropped, the second is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Jupyter's own kernel; `python3` is what every installation calls it.
_KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def execute(notebook: Any, folder: Path, parameters: dict[str, str] | None = None, timeout: int = 600) -> None:
    """Run a notebook in a folder; its cells then hold the outputs.

    Args:
        notebook: As nbformat reads it; changed in place.
        folder: Where it runs.
        parameters: Other values for the names of the cell tagged `parameters`.
        timeout: Seconds that one cell may take.

    Raises:
        KeyError: There is no such parameter.
        CellExecutionError: A cell failed.
    """
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            for name in parameters or {}:
                if f"{name} = " not in cell.source:
                    raise KeyError(name)
            cell.source += "".join(f"\n{name} = {value!r}" for name, value in (parameters or {}).items())
    NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()


def tidy(notebook: Any) -> None:
    """Leave only what belongs to the notebook: no stderr, no times, no kernel of this machine."""
    notebook.metadata = nbformat.NotebookNode(kernelspec=_KERNEL, language_info={"name": "python"})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _joined(output for output in cell.outputs if output.get("name") != "stderr")


def _joined(outputs: Iterable[Any]) -> list[Any]:
    """Neighbouring pieces of one stream as one output."""
    out: list[Any] = []
    for output in outputs:
        if out and output.output_type == "stream" and out[-1].get("name") == output.name:
            out[-1].text += output.text
        else:
            out.append(output)
    return out


def machine_paths(notebook: Any, *folders: Path) -> list[str]:
    """Outputs that show one of these folders, the home folder, or the temporary one."""
    telling = [str(folder) for folder in (*folders, Path.home(), Path(tempfile.gettempdir()))]
    shown = [json.dumps(output) for cell in notebook.cells for output in cell.get("outputs", ())]
    return [text[:200] for text in shown if any(folder in text for folder in telling)]


def main() -> int:
    """Run those named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS)
    for path in parser.parse_args().notebooks:
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as scratch:
            execute(notebook, Path(scratch))
            left = sorted(found.name for found in Path(scratch).iterdir())
        tidy(notebook)
        faults = machine_paths(notebook, ROOT) + [f"left behind: {name}" for name in left]
        if faults:
            print(f"{path.name} is not kept:", *faults, sep="\n", file=sys.stderr)
            return 1
        nbformat.write(notebook, path)
        print(path.name, "is kept")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Environments of their own for packages that cannot live beside current transformers.

python -m benchmarks.rivals.environments make llmlingua
python -m benchmarks.rivals.environments make kvpress --folder DIR

Each gets a folder with a virtual environment whose versions are pinned in `benchmarks/rivals/NAME.txt`. pip is told
nothing about indexes: what its own settings say holds, so a machine without a GPU may point it at CPU builds of torch.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import venv
from pathlib import Path

from benchmarks.common import progress
from compllm_rag.models import default_cache_dir

HERE = Path(__file__).parent
NAMES = ("llmlingua", "kvpress")
_DONE = "made-from.sha256"


def default_folder() -> Path:
    """Where environments lie unless told otherwise."""
    return default_cache_dir() / "environments"


def pins(name: str) -> Path:
    """The pinned versions of an environment."""
    return HERE / f"{name}.txt"


def command(name: str, folder: Path | None) -> str:
    """What to type to make an environment; a folder of the user's own is named as such."""
    return f"python -m benchmarks.rivals.environments make {name}" + (" --folder DIR" if folder else "")


def python_of(name: str, folder: Path) -> Path | None:
    """The environment's Python, None where there is none or it was made from other pins."""
    done, python = folder / name / _DONE, _python(folder / name)
    there = done.exists() and done.read_text(encoding="ascii") == _digest(name) and python.exists()
    return python if there else None


def make(name: str, folder: Path) -> Path:
    """Make an environment anew.

    Args:
        name: One of `NAMES`.
        folder: Environments go into folders of their names in it.

    Returns:
        Its Python.

    Raises:
        subprocess.CalledProcessError: pip could not install something; it says what.
    """
    target = folder / name
    if target.exists():
        shutil.rmtree(target)
    folder.mkdir(parents=True, exist_ok=True)
    progress(f"{name}: making a virtual environment")
    venv.create(target, with_pip=True)
    python = _python(target)
    progress(f"{name}: installing {pins(name).name}")
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", str(pins(name))], check=True)
    (target / _DONE).write_text(_digest(name), encoding="ascii")
    return python


def _python(target: Path) -> Path:
    return target / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _digest(name: str) -> str:
    return hashlib.sha256(pins(name).read_bytes()).hexdigest()


def main() -> None:
    """Command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("action", choices=["make", "list"])
    options.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; none means all")
    options.add_argument("--folder", type=Path, help="holds the environments (default: in the cache directory)")
    args = options.parse_args()
    folder = args.folder or default_folder()
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        options.error(f"no environment {unknown[0]}; there are {', '.join(NAMES)}")
    for name in args.names or NAMES:
        if args.action == "make":
            make(name, folder)
        print(f"{name}: {python_of(name, folder) or 'not made'}")


if __name__ == "__main__":
    main()

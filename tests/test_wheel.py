"""What users install: the wheel holds all that the checkout's package does, and works where there is no checkout."""

from __future__ import annotations

import email.parser
import json
import os
import site
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from compllm_rag import __version__

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
_LOOK = """
import json, pathlib
import compllm_rag
from compllm_rag.cli.bench import _folder
from compllm_rag.cli.demo import sample_corpus
from compllm_rag.models import list_models
print(json.dumps({
    "package": compllm_rag.__file__, "corpus": len(list((sample_corpus() / "articles").iterdir())),
    "benchmarks": str(_folder()), "models": [model.alias for model in list_models()],
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, made by the backend that pip would call."""
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out], cwd=ROOT, check=True)
    (made,) = out.glob("*.whl")
    return made


def environment(folder: Path) -> tuple[Path, dict[str, str]]:
    """A new virtual environment, and variables under which nothing of the checkout is found."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COMPLLM"))}
    return folder / ("Scripts" if os.name == "nt" else "bin"), kept | {"COMPLLM_CACHE": str(folder / "cache")}


def works(programs: Path, variables: dict[str, str], away: Path) -> None:
    """The command line and the data of an installed package."""

    def run(*words: object) -> str:
        done = subprocess.run([*map(str, words)], env=variables, cwd=away, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done.stdout

    assert run(programs / "compllm-rag", "--version").startswith(f"compllm-rag {__version__}, Python ")
    found = json.loads(run(programs / "compllm-rag", "doctor", "--json"))
    assert found["versions"]["good"] and found["versions"]["found"]["compllm-rag"] == __version__
    looked = json.loads(run(programs / "python", "-c", _LOOK))
    assert Path(looked["package"]).is_relative_to(programs.parent)
    assert looked["corpus"] > 10 and len(looked["models"]) > 1
    assert Path(looked["benchmarks"]).name == "_bench"


def test_nothing_of_the_package_is_missing(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.getinfo(name).file_size for name in archive.namelist()}
        (metadata,) = (name for name in held if name.endswith(".dist-info/METADATA"))
        told = email.parser.Parser().parsestr(archive.read(metadata).decode())
        (points,) = (name for name in held if name.endswith("entry_points.txt"))
        assert b"compllm-rag = compllm_rag.cli.main:main" in archive.read(points)
    ours = {
        **{path.relative_to(ROOT).as_posix(): path for path in (ROOT / "compllm_rag").rglob("*")},
        **{
            f"compllm_rag/_bench/{path.relative_to(ROOT).as_posix()}": path for path in (ROOT / "benchmarks").rglob("*")
        },
    }
    ours = {name: path for name, path in ours.items() if path.is_file() and "__pycache__" not in name}
    assert len(ours) > 300
    for name, path in ours.items():
        if not name.endswith(".records.jsonl"):
            assert held.get(name) == path.stat().st_size, name
    assert not [name for name in held if name.startswith("tests/") or "__pycache__" in name]
    assert (told["Name"], told["Version"], told["License-Expression"]) == ("compllm-rag", __version__, "Apache-2.0")
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert {*told.get_all("Provides-Extra")} == {*PROJECT["optional-dependencies"]}
    wanted = [one for one in told.get_all("Requires-Dist") if "extra ==" not in one]
    assert len(wanted) == len(PROJECT["dependencies"])
    assert wheel.stat().st_size < 60 * 2**20


def test_it_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """In an empty environment, with the dependencies of the one that the tests run in."""
    programs, variables = environment(tmp_path / "venv")
    install = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, wheel], check=True)
    asked = [programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    # Behind its own packages, so that this package is the wheel's.
    (own / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    works(programs, variables, tmp_path)


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pip_installs_all_of_it(wheel: Path, tmp_path: Path) -> None:
    """With every dependency from the package index, as a user does."""
    programs, variables = environment(tmp_path / "venv")
    install = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "-q"]
    subprocess.run([*install, "-c", ROOT / "constraints.txt", f"{wheel}[readers,bm25,watch]"], check=True)
    works(programs, variables, tmp_path)

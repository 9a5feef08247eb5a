"""`compllm-rag bench`: lists, explains and runs benchmarks, from a checkout and from a wheel."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

import benchmarks
from compllm_rag.cli.bench import BENCHMARKS
from compllm_rag.cli.main import app

ROOT = Path(__file__).parents[2]


def bench(*words: object, cwd: Path = ROOT, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"{before}import sys; sys.argv = ['compllm-rag', 'bench', *sys.argv[1:]]\n"
    code += "from compllm_rag.cli.main import main; main()"
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_without_a_name_it_lists_them_all() -> None:
    assert set(BENCHMARKS) == {name for names in benchmarks.FOLDERS.values() for name in names}
    for words in ([], ["--help"]):
        done = CliRunner().invoke(app, ["bench", *words])
        assert done.exit_code == 0
        assert all(f"\n  {name} " in done.output for name in BENCHMARKS)


def test_an_unknown_name_is_one_line() -> None:
    done = bench("nothing")
    assert done.returncode == 2
    assert done.stderr.startswith("error: benchmark unknown") and done.stderr.count("\n") == 1


def test_a_benchmark_explains_itself() -> None:
    done = bench("startup", "--help")
    assert done.returncode == 0
    assert "usage: compllm-rag bench startup" in done.stdout and "--repeats" in done.stdout


def test_it_runs_and_writes_the_record(tmp_path: Path) -> None:
    done = bench("startup", "--repeats", 1, "--json", tmp_path / "o.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "o.json").read_text())
    assert record["median_s"]["empty process"] > 0
    assert record["command"] == "compllm-rag bench startup --repeats 1"
    assert "Start-up" in done.stdout and f"{record['median_s']['empty process']:.2f} s" in done.stdout


def test_tables_need_no_plotting_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("query", "edits", "startup", "ingest"):
        record = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        assert "|---|" in "\n".join(benchmarks.page(name).tables(record))
    squad = json.loads((ROOT / "benchmarks" / "results" / "quality" / "squad.json").read_text())
    assert "## Concepts at the input embeddings, SQuAD v1.1 dev" in benchmarks.page("quality").tables({"squad": squad})


@pytest.mark.slow
@pytest.mark.network
def test_it_runs_from_a_wheel(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if "__pycache__" in name]
        archive.extractall(tmp_path / "site")
    # Neither the checkout nor its editable install may help.
    keep = f"[p for p in sys.path if p not in ('', {str(ROOT)!r})]"
    before = f"import sys; sys.path[:] = [{str(tmp_path / 'site')!r}, *{keep}]; "
    done = bench("startup", "--repeats", 1, "--json", tmp_path / "o.json", cwd=tmp_path, before=before)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "o.json").read_text())["environment"]["commit"] == ""
    assert "Start-up" in done.stdout

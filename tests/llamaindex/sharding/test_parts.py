"""Ingestion in parts, with one worker in this process."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import toy
from compllm_rag.errors import (
    ConfigurationError,
    CorruptRecordError,
    EmptyCorpusError,
    StoreLockedError,
    WorkersFailedError,
)
from compllm_rag.llamaindex.documents import load_documents
from compllm_rag.llamaindex.index import ConceptIndex
from compllm_rag.llamaindex.sharding import encoder
from compllm_rag.llamaindex.sharding.staging import Staging
from compllm_rag.llamaindex.storage_parts import load_embedder_of
from tests.llamaindex.sharding.sharding_samples import assert_same, in_parts, write_corpus
from toy_embedder import save_sentence_transformer

warnings.filterwarnings("ignore", category=UserWarning)


@pytest.fixture(scope="module")
def embedder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sentence_transformer(tmp_path_factory.mktemp("toy-embedder"), toy.TEXT)


@pytest.fixture
def made(tmp_path: Path, toy_folder: Path, embedder_folder: Path):
    """Makes storages of the toy models."""

    def make(name: str, **options: object) -> ConceptIndex:
        return ConceptIndex.create(tmp_path / name, llm=str(toy_folder), embedder=str(embedder_folder), **options)

    return make


@pytest.mark.parametrize("options", [{}, {"codec": "input", "encoding": "int8"}, {"rate": "information"}], ids=str)
def test_the_storage_is_that_of_an_ordinary_ingest(tmp_path: Path, made, options: dict[str, object]) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    with made("one", **options) as index:
        usual = index.ingest(load_documents([corpus]), within=[corpus])
    with made("two", **options) as index:
        report = in_parts(index, Staging(tmp_path / "staging"), [corpus], part_chars=1500)
    assert report.parts > 3
    assert (report.workers, report.parts_reused) == (1, 0)
    for name in ("documents", "documents_changed", "chunks", "chunks_added", "segments", "source_tokens", "concepts"):
        assert getattr(report.ingest, name) == getattr(usual, name), name
    assert_same(tmp_path / "one", tmp_path / "two")


def test_parts_as_large_as_the_batches_of_an_ingest_give_the_same_bytes(tmp_path: Path, made) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    with made("one") as index:
        index.ingest(load_documents([corpus]), within=[corpus])
    with made("two") as index:
        in_parts(index, Staging(tmp_path / "staging"), [corpus])
    packs = [
        [path.read_bytes() for path in sorted((tmp_path / n / "concepts/packs").iterdir())] for n in ("one", "two")
    ]
    assert packs[0] == packs[1]


def test_a_run_goes_on_where_another_ended(tmp_path: Path, made) -> None:
    corpus, staging = write_corpus(tmp_path / "corpus"), Staging(tmp_path / "staging")
    done: list[str] = []

    def stop(key: str) -> None:
        done.append(key)
        if len(done) == 2:
            raise KeyboardInterrupt

    with made("s") as index, pytest.raises(KeyboardInterrupt):
        in_parts(index, staging, [corpus], stop, part_chars=1500)
    kept = {path: path.stat().st_mtime_ns for path in staging.shards.glob("*/shard.json")}
    assert len(kept) == 2
    with made("s") as index:
        assert not list(index.faiss.iter_nodes())  # nothing of it was committed
        report = in_parts(index, staging, [corpus], done.append, part_chars=1500)
    assert report.parts_reused == 2
    assert len(done) == len(set(done)) == report.parts
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    with made("usual") as index:
        index.ingest(load_documents([corpus]), within=[corpus])
    assert_same(tmp_path / "s", tmp_path / "usual")
    with made("s") as index:
        again = in_parts(index, staging, [corpus], done.append, part_chars=1500)
    assert (again.parts, again.ingest.documents_changed, again.ingest.segments_compressed) == (0, 0, 0)
    assert again.ingest.chunks == report.ingest.chunks


def test_what_another_dtype_made_is_made_anew(tmp_path: Path, made) -> None:
    corpus, staging = write_corpus(tmp_path / "corpus", 4), Staging(tmp_path / "staging")

    def stop(key: str) -> None:
        raise KeyboardInterrupt

    with made("s") as index, pytest.raises(KeyboardInterrupt):
        in_parts(index, staging, [corpus], stop, dtype="bfloat16", part_chars=700)
    with made("s") as index, pytest.raises(KeyboardInterrupt):
        in_parts(index, staging, [corpus], stop, dtype="float32", part_chars=700)
    with made("s") as index:
        report = in_parts(index, staging, [corpus], dtype="float32", part_chars=700)
    assert report.parts_reused == 1
    with made("usual") as index:
        index.ingest(load_documents([corpus]), within=[corpus])
    assert_same(tmp_path / "s", tmp_path / "usual")


def test_changes_replace_what_they_change(tmp_path: Path, made) -> None:
    corpus, staging = write_corpus(tmp_path / "corpus"), Staging(tmp_path / "staging")
    for name in ("one", "two"):
        with made(name) as index:
            index.ingest(load_documents([corpus]), within=[corpus])
    (corpus / "a.md").write_text("# Lighthouse\n\nIt was torn down. " + toy.TEXT[100:])
    (corpus / "more").mkdir()
    (corpus / "more" / "c.txt").write_text("A new one. " + toy.TEXT[50:300])
    with made("one") as index:
        usual = index.ingest(load_documents([corpus]), within=[corpus])
    with made("two") as index:
        report = in_parts(index, staging, [corpus], part_chars=400)
    assert report.ingest.documents_changed == usual.documents_changed == 2
    assert (report.ingest.chunks, report.ingest.chunks_added) == (usual.chunks, usual.chunks_added)
    assert_same(tmp_path / "one", tmp_path / "two")


def test_damage_in_the_staging_folder_is_found(tmp_path: Path, made) -> None:
    corpus, staging = write_corpus(tmp_path / "corpus", 3), Staging(tmp_path / "staging")

    def spoil(key: str) -> None:
        pack = next((staging.shards / key / "concepts" / "packs").iterdir())
        data = bytearray(pack.read_bytes())
        data[-3] ^= 1
        pack.write_bytes(data)

    with made("s") as index, pytest.raises(CorruptRecordError):
        in_parts(index, staging, [corpus], spoil)
    key = next(staging.shards.iterdir()).name
    (staging.shards / key / "shard.json").write_text(json.dumps({"key": key}))
    with made("s") as index:
        with pytest.raises(CorruptRecordError, match="remove that folder"):
            in_parts(index, staging, [corpus])
        assert not list(index.faiss.iter_nodes())


def test_a_part_that_cannot_be_encoded_costs_no_other(tmp_path: Path, made) -> None:
    corpus, staging = write_corpus(tmp_path / "corpus"), Staging(tmp_path / "staging")
    spoilt: list[Path] = []

    def spoil(key: str) -> None:
        if not spoilt:
            waiting = [p for p in staging.parts.iterdir() if not staging.has_shard(p.stem)]
            spoilt.append(waiting[0])
            waiting[0].write_text("{")

    with made("s") as index:
        with pytest.raises(WorkersFailedError, match="1 of .* missing.*cannot be read from the staging folder"):
            in_parts(index, staging, [corpus], spoil, part_chars=1500)
        spoilt[0].unlink()
        report = in_parts(index, staging, [corpus], part_chars=1500)
    assert report.parts_reused == report.parts - 1


@pytest.fixture
def failing_embedder(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BaseException]]:
    """The workers' embedder raises what the list holds, for one text."""
    raised: list[BaseException] = []

    def load(*arguments: Any, **options: Any) -> Any:
        embedder = load_embedder_of(*arguments, **options)
        embed = embedder.get_text_embedding_batch

        def fails(texts: list[str], **more: Any) -> Any:
            if raised and any("Keeper 2 wrote" in text for text in texts):
                raise raised[0]
            return embed(texts, **more)

        object.__setattr__(embedder, "get_text_embedding_batch", fails)
        return embedder

    monkeypatch.setattr(encoder, "load_embedder_of", load)
    yield raised


def test_an_error_of_any_kind_is_told_and_costs_no_other_part(
    tmp_path: Path, made, failing_embedder: list[BaseException]
) -> None:
    corpus, staging, told = write_corpus(tmp_path / "corpus", 6), Staging(tmp_path / "staging"), list[str]()
    failing_embedder.append(RuntimeError("expected all tensors\non the same device"))
    for _ in range(2):  # the second time that part alone is tried again
        told.clear()
        with made("s") as index, pytest.raises(WorkersFailedError, match="1 of .* missing.*RuntimeError: expected all"):
            in_parts(index, staging, [corpus], part_chars=700, tell=told.append)
        (line,) = (line for line in told if "could not be encoded" in line)
        assert ": RuntimeError: expected all tensors on the same device (in fails, test_parts.py:" in line
    assert "1 of them to encode" in told[0]
    failing_embedder.clear()
    with made("s") as index:
        report = in_parts(index, staging, [corpus], part_chars=700)
    assert report.parts_reused == report.parts - 1
    with made("usual") as index:
        index.ingest(load_documents([corpus]), within=[corpus])
    assert_same(tmp_path / "s", tmp_path / "usual")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), KeyboardInterrupt(), getattr(torch, "AcceleratorError", MemoryError)("the GPU is lost")],
    ids=repr,
)
def test_what_ends_a_worker_is_no_error_of_a_part(
    tmp_path: Path, made, failing_embedder: list[BaseException], error: BaseException
) -> None:
    corpus, staging = write_corpus(tmp_path / "corpus", 4), Staging(tmp_path / "staging")
    failing_embedder.append(error)
    with made("s") as index, pytest.raises(type(error)):
        in_parts(index, staging, [corpus], part_chars=700)


def test_a_part_that_kills_its_workers_does_not_go_round_for_ever(tmp_path: Path, made) -> None:
    corpus, staging = write_corpus(tmp_path / "corpus", 3), Staging(tmp_path / "staging")

    def spoil(key: str) -> None:
        for other in staging.parts.iterdir():
            if not staging.has_shard(other.stem):
                for _ in range(4):  # as workers do who are killed then
                    staging.begin(other.stem)

    with made("s") as index:
        with pytest.raises(WorkersFailedError, match="killed again and again"):
            in_parts(index, staging, [corpus], spoil, part_chars=1500)
        assert in_parts(index, staging, [corpus], part_chars=1500).parts_reused == 1


def test_what_is_refused(tmp_path: Path, made) -> None:
    corpus = write_corpus(tmp_path / "corpus", 3)
    with made("budget", budget=100000) as index, pytest.raises(ConfigurationError, match="budget"):
        in_parts(index, Staging(tmp_path / "staging"), [corpus])
    (tmp_path / "empty").mkdir()
    with made("s") as index:
        with pytest.raises(EmptyCorpusError):
            in_parts(index, Staging(tmp_path / "staging"), [tmp_path / "empty"])
        with pytest.raises(ConfigurationError, match="holds something else"):
            in_parts(index, Staging(corpus), [corpus])
        with Staging(tmp_path / "staging").driven(), pytest.raises(StoreLockedError, match="staging folder"):
            in_parts(index, Staging(tmp_path / "staging"), [corpus])

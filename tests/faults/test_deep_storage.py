"""Storages of deep concepts in trouble: damage, forged places, another width; typed errors, and nothing lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import toy
from compllm_rag import ConceptIndex, DiskStore
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.errors import CompLLMError, CorruptRecordError, InvalidConceptsError, StorageMismatchError
from compllm_rag.llamaindex.repair import repair_storage
from compllm_rag.models.llm import TargetLLM
from compllm_rag.storage.compaction import compact_storage
from compllm_rag.storage.migration import migrate_storage
from compllm_rag.storage.verification import verify_storage
from tests.faults.fault_samples import (
    QUESTION,
    check_whole,
    create,
    documents,
    execute,
    filled,
    flip,
    load,
    sound,
    texts,
)
from toy_embedder import HashEmbedder
from trained import trained_deep

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def deep() -> DeepCompressor:
    return trained_deep(toy.llm(layers=4))


def answer(index: ConceptIndex, **options: Any) -> str:
    return str(index.as_query_engine(similarity_top_k=6, **options).query(QUESTION))


def last_pack(path: Path) -> Path:
    return max((path / "concepts" / "packs").iterdir())


DAMAGE: dict[str, tuple[Callable[[Path], Any], bool]] = {
    "payload bit": (lambda p: flip(last_pack(p), 3000), True),
    "pack cut": (lambda p: last_pack(p).write_bytes(last_pack(p).read_bytes()[:-5]), False),
    "store gone": (lambda p: shutil.rmtree(p / "concepts"), False),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_made_whole_from_text(tmp_path: Path, deep: DeepCompressor, kind: str) -> None:
    damage, deep_only = DAMAGE[kind]
    path = filled(tmp_path / "s", deep)
    with load(path, deep, read_only=True) as index:
        before, said = texts(index), answer(index)
    damage(path)
    assert verify_storage(path).sound == deep_only
    assert {finding.part for finding in verify_storage(path, deep=True).findings} == {"concepts"}
    report = repair_storage(path, compressor=deep, embedder=HashEmbedder())
    assert (report.sound, report.documents_lost, report.chunks_lost) == (True, (), 0)
    assert report.segments_compressed > 0
    sound(path)
    with load(path, deep) as index:
        assert texts(index) == before
        assert answer(index, missing="error") == said
        check_whole(index)


def test_compaction_and_migration_leave_the_answers_alone(tmp_path: Path, deep: DeepCompressor) -> None:
    path = filled(tmp_path / "s", deep)
    with load(path, deep) as index:
        for name in ("d1", "d4"):
            index.delete_ref_doc(name, delete_from_docstore=True)
        said = answer(index)
    assert sound(path).dead_records
    compact_storage(path)
    assert sound(path).dead_records == 0
    assert not migrate_storage(path).changed
    with load(path, deep) as index:
        assert answer(index, missing="error") == said
        assert index.ingest(documents()).documents_changed == 2
        check_whole(index)


def _moved(rows: torch.Tensor, place: int, to: float) -> torch.Tensor:
    rows = rows.clone()
    rows[place, -1] = to
    return rows


FORGED: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "behind the end": lambda rows, n: _moved(rows, -1, n),
    "far behind": lambda rows, n: _moved(rows, -1, 65504.0),
    "in front": lambda rows, n: _moved(rows, 0, -1.0),
    "twice": lambda rows, n: _moved(rows, 1, float(rows[0, -1])),
    "unordered": lambda rows, n: torch.cat([rows[1:2], rows[:1], rows[2:]]),
    "between": lambda rows, n: _moved(rows, 0, float(rows[0, -1]) + 0.5),
    "one too many": lambda rows, n: torch.cat([_moved(rows, 0, 0.0)[:1], rows]),
    "one too few": lambda rows, n: rows[:-1],
}


@pytest.mark.parametrize("kind", FORGED)
def test_places_that_a_text_does_not_have_are_no_answer(tmp_path: Path, deep: DeepCompressor, kind: str) -> None:
    with create(tmp_path / "other", deep, rate=2.0) as index:
        index.ingest(documents(3))
        said, whole = answer(index), texts(index)
    path = tmp_path / "s"
    with create(path, deep, rate=2.0) as index:
        nodes = index.parser.get_nodes_from_documents(documents(1))
        passage = index.library.passage(nodes[0].text)
        [rows] = deep.compress(passage.segments[:1], passage.n_concepts[:1])
        index.store.put([(passage.keys[0], FORGED[kind](rows, len(passage.segments[0])))])
        index.store.flush()
        index.ingest(documents(3))
        for missing in ("recompress", "text", "error"):
            with pytest.raises(CorruptRecordError, match="places that their text does not have.*Next step: delete"):
                answer(index, missing=missing)
        assert texts(index) == whole
        assert answer(index, mode="text")
        # What the error says: nothing is lost on that road.
        index.delete_ref_doc("d0", delete_from_docstore=True)
        assert answer(index)
    compact_storage(path)
    with load(path, deep) as index:
        index.ingest(documents(3))
        assert texts(index) == whole
        assert answer(index, missing="error") == said
        check_whole(index)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 6e4])
def test_states_out_of_scale_are_refused_on_writing_and_on_reading(deep: DeepCompressor, value: float) -> None:
    index = create(None, deep)
    passage = index.library.passage(documents(1)[0].text)
    rows = deep.compress(passage.segments[:1], passage.n_concepts[:1])[0].clone()
    rows[3, 5] = value
    with pytest.raises(InvalidConceptsError):
        index.store.put([(passage.keys[0], rows)])
        index.library.fetch(documents(1)[0].text)
    index.close()


@pytest.mark.parametrize("part", ["store", "manifest"])
def test_a_store_of_another_width_is_refused_and_stays_as_it_is(
    tmp_path: Path, deep: DeepCompressor, part: str
) -> None:
    path = filled(tmp_path / "s", deep, 2)
    shutil.copytree(path, tmp_path / "kept")
    if part == "store":
        shutil.rmtree(path / "concepts")
        DiskStore(path / "concepts", hidden_size=32).close()
    else:
        execute(
            path / "catalog.db",
            "UPDATE meta SET value = json_set(value, '$.entry_layer', 0) WHERE key = 'compllm/manifest'",
        )
    for opening in (load, create):
        with pytest.raises(StorageMismatchError, match="3[23]"):
            opening(path, deep)
    assert not verify_storage(path).sound
    if part == "store":
        assert repair_storage(path, compressor=deep, embedder=HashEmbedder()).sound
        with load(path, deep) as index, load(tmp_path / "kept", deep) as kept:
            assert answer(index, missing="error") == answer(kept)


def test_adapters_that_were_changed_are_refused_before_anything_is_read(tmp_path: Path, deep: DeepCompressor) -> None:
    llm = toy.save(tmp_path / "llm", layers=4)
    made = trained_deep(TargetLLM.from_pretrained(llm))
    with create(tmp_path / "s", made) as index:
        index.ingest(documents(2))
    for change in ("entry_layer", "weights"):
        path = Path(shutil.copytree(tmp_path / "s", tmp_path / change))
        if change == "weights":
            (path / "compressor" / "compressor.safetensors").write_bytes(b"no weights")
        else:
            config = path / "compressor" / "config.json"
            config.write_text(config.read_text().replace('"entry_layer": 2', '"entry_layer": 9'))
        with pytest.raises(CompLLMError, match="Next step"):
            ConceptIndex.load(path, embedder=HashEmbedder())
        assert "adapters" in {finding.part for finding in verify_storage(path).findings}

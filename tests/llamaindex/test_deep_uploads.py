"""Uploads into a storage of deep concepts: text at once, concepts next time."""

from __future__ import annotations

from pathlib import Path

import toy
from tests.faults.fault_samples import check_whole, create, documents, load, sound
from tests.llamaindex.test_uploads import Gate, ask, upload_documents
from trained import trained_deep


def test_text_at_once_and_deep_concepts_next_time(tmp_path: Path) -> None:
    gate = Gate(trained_deep(toy.llm(layers=4)))
    with create(tmp_path / "s", gate.compressor) as index:
        index.ingest(documents(2))
        with gate.closed():
            assert index.upload(upload_documents()).chunks_queued == 4
            assert ask(index, "heron", missing="error") == ("u1", "text")
            with load(tmp_path / "s", gate.compressor, read_only=True) as reader:
                assert ask(reader, "badger") == ("u2", "text")
        assert index.uploads.wait(60)
        assert ask(index, "heron", missing="error") == ("u1", "concepts")
        check_whole(index)
    assert sound(tmp_path / "s").segments_awaiting == 0

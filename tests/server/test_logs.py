"""What the server logs while documents make trouble: that there is some, and nothing of theirs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

import toy
from compllm_rag.errors import InvalidConceptsError
from compllm_rag.server.registry import Registry
from tests.server.server_samples import client
from toy_embedder import save_sentence_transformer

SECRET = "xyzzy-secret"  # noqa: S105 - looked for in logs


async def test_trouble_with_documents_is_logged_without_their_ids_or_words(
    toy_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embedder = save_sentence_transformer(tmp_path / "embedder", toy.TEXT)
    made = Registry(tmp_path / "s", create={"llm": str(toy_folder), "embedder": str(embedder)})
    made.start()
    index = made.get("other", create=True)  # a further namespace is as discreet as the first
    compressor: Any = index.compressor

    def fail(*args: object, **options: object) -> None:
        raise InvalidConceptsError(f"{SECRET} makes no concepts", got=SECRET)

    compressor.compress = fail
    abstract = " ".join(f"{SECRET} entry {i} of the catalogue" for i in range(200))
    document = {"id": SECRET, "text": f"{toy.TEXT} {SECRET}", "title": SECRET, "metadata": {"abstract": abstract}}
    with caplog.at_level(logging.DEBUG, logger="compllm_rag"):
        async with client(made) as asking:
            head = {"x-namespace": "other"}
            sent = await asking.post("/v1/documents", json={"documents": [document]}, headers=head)
            assert sent.status_code == 202, sent.text
            assert not index.uploads.wait(60)
            queue = (await asking.get("/v1/queue", headers=head)).json()
            assert queue["chunks_failed"] > 0
    made.close()
    assert "metadata of a document are longer than what the embedder reads" in caplog.text
    assert "could not be made, it is read as text: InvalidConceptsError" in caplog.text
    assert SECRET not in caplog.text, [line for line in caplog.text.splitlines() if SECRET in line]

"""What is logged: commits, loads and compactions in numbers, and never what documents or questions say."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from llama_index.core import Document

import toy
from compllm_rag import ConceptIndex, GenerationConfig, load_embedder
from toy_embedder import HashEmbedder, save_sentence_transformer


def test_steps_are_logged_and_texts_are_not(tmp_path: Path, toy_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="compllm_rag")
    secrets = ["zanzibar", "quetzal", "obsidian"]
    document = Document(id_="zanzibar-file", text=toy.TEXT + "The quetzal code is 4711.")
    options = {"embedder": HashEmbedder(), "generation": GenerationConfig(max_new_tokens=4)}
    with ConceptIndex.create(tmp_path / "s", llm=str(toy_folder), **options) as index:
        index.ingest([document])
        index.as_query_engine().query("Where is the obsidian?")
        index.upload([Document(id_="more", text="One more quetzal.")])
        index.uploads.wait(timeout=60)
        index.delete_ref_doc("zanzibar-file")
        index.compact()
    with ConceptIndex.load(tmp_path / "s", embedder=HashEmbedder()) as index:
        index.as_query_engine(missing="recompress").query("Where is the obsidian?")
        assert index.compressor is not None
    load_embedder(str(save_sentence_transformer(tmp_path / "embedder", toy.TEXT)))
    told = [record for record in caplog.records if record.name.startswith("compllm_rag.")]
    messages = [record.getMessage() for record in told]
    for begin in ("loaded LLM", "loaded compressor", "loaded embedder", "committed: 1 documents", "compacted:"):
        assert [record.levelno for record in told if record.getMessage().startswith(begin)], begin
    assert all(record.levelno == logging.INFO for record in told), messages
    assert not [message for message in messages if any(secret in message.lower() for secret in secrets)]

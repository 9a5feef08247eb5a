"""Metadata give way to text where the embedder cannot read both; paths of files stay out of prompts."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from llama_index.core import Document
from llama_index.core.schema import BaseNode, MetadataMode, TextNode

import toy
from compllm_rag import Compressor, ConceptIndex
from compllm_rag.llamaindex.embedding import load_embedder
from compllm_rag.llamaindex.embedding_texts import EmbeddingTexts
from compllm_rag.llamaindex.node_text import shown_metadata
from compllm_rag.llamaindex.shown import is_path
from toy_embedder import HashEmbedder, save_sentence_transformer

LONG = " ".join(f"entry {i} of the catalogue" for i in range(200))


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory):
    return load_embedder(str(save_sentence_transformer(tmp_path_factory.mktemp("e"), toy.TEXT)), device="cpu")[0]


def test_the_text_is_embedded_whole_and_metadata_as_far_as_they_fit(embedder) -> None:
    texts = EmbeddingTexts(embedder)
    limit, tokenizer = texts._limit, texts._tokenizer
    assert tokenizer is not None
    long = TextNode(text=toy.TEXT[:200], metadata={"abstract": LONG})
    (made,) = texts.of([long])
    assert made.endswith(long.text)
    assert made.startswith("abstract: entry 0 of")
    assert limit // 8 <= len(tokenizer.encode(made, add_special_tokens=False).ids) <= limit + 1
    short = TextNode(text=toy.TEXT * 20, metadata={"title": "A"})
    assert texts.of([short]) == [short.get_content(MetadataMode.EMBED)]
    hidden = TextNode(text="x", metadata={"abstract": LONG}, excluded_embed_metadata_keys=["abstract"])
    assert texts.of([hidden]) == ["x"]


def test_an_embedder_of_unknown_limit_is_given_everything() -> None:
    node = TextNode(text="x", metadata={"abstract": LONG})
    assert EmbeddingTexts(HashEmbedder()).of([node]) == [node.get_content(MetadataMode.EMBED)]


def test_chunks_under_long_metadata_are_told_apart(
    compressor: Compressor, embedder, caplog: pytest.LogCaptureFixture
) -> None:
    documents = [Document(id_=f"d{i}", text=toy.TEXT, metadata={"abstract": f"{i} {LONG}"}) for i in range(3)]
    index = ConceptIndex.create(None, compressor=compressor, embedder=embedder, chunk_size=60)
    with caplog.at_level(logging.WARNING):
        index.ingest(documents)
    (said,) = [r.getMessage() for r in caplog.records if "metadata of document" in r.getMessage()]
    assert "'d0'" in said
    nodes: list[BaseNode] = index.faiss.embedded_nodes(index.faiss.node_ids("d0"))
    vectors = {tuple(node.embedding or ()) for node in nodes}
    assert len(vectors) == len(nodes) > 1
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        index.insert(Document(id_="d9", text=toy.TEXT, metadata={"abstract": LONG}))
        assert "'d9'" in caplog.text
        caplog.clear()
        index.insert(Document(id_="short", text="Short.", metadata={"title": "Short"}))
        assert not caplog.records


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("/home/a/notes.txt", True), ("C:\\notes\\a.txt", True), ("\\\\share\\a\\b", True), ("file:///a/b", True),
        ("~/notes/a", True), (["/a/b", "/c/d.txt"], True), ("/notes.txt", True),
        ("notes/a.txt", False), ("and/or", False), ("https://a.org/b", False), ("//a.org/b", False), ("/", False),
        ("/b", False), (3, False), ([], False), ("of /home/a", False), ("/a/b\nand more", False),
    ],
)  # fmt: skip
def test_paths_are_told_from_other_texts(value: object, path: bool) -> None:
    assert is_path(value) is path


def test_paths_stay_out_of_prompts_unless_somebody_chose(tmp_path: Path) -> None:
    metadata = {"file_path": "a.txt", "page": 3, "origin": str(tmp_path / "a.txt"), "file_name": "a.txt"}
    reader = ["file_name", "file_type", "file_size", "creation_date", "last_modified_date", "last_accessed_date"]
    assert shown_metadata(TextNode(text="x", metadata=metadata)) == ("a.txt", {"page": 3})
    assert shown_metadata(TextNode(text="x", metadata=metadata, excluded_llm_metadata_keys=reader)) == ("", {"page": 3})
    chosen = TextNode(text="x", metadata=metadata, excluded_llm_metadata_keys=["page"])
    assert set(shown_metadata(chosen)[1]) == {"file_path", "origin"}

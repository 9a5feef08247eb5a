"""What counts as a change of a document: all that its chunks, their vectors or what the LLM reads depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import Document, MetadataMode
from llama_index.core.vector_stores import FilterOperator, MetadataFilter, MetadataFilters

from compllm_rag import Compressor, ConceptIndex
from toy_embedder import HashEmbedder

TEXT = "The ferry to Orsa leaves at nine. It carries sheep on Mondays, and the post on all other days of the week."
PLAIN: dict[str, Any] = {"metadata": {"year": "1871", "path": "a/b/c"}}
CHANGES: dict[str, dict[str, Any]] = {
    "type": {"metadata": {"year": 1871, "path": "a/b/c"}},
    "embedder": {**PLAIN, "excluded_embed_metadata_keys": ["path"]},
    "llm": {**PLAIN, "excluded_llm_metadata_keys": ["path"]},
    "text template": {**PLAIN, "text_template": "{metadata_str} ~ {content}"},
    "metadata template": {**PLAIN, "metadata_template": "{key}={value}"},
    "separator": {**PLAIN, "metadata_separator": " / "},
}
WAYS = {
    "ingest": lambda index, document: index.ingest([document]).documents_changed == 1,
    "refresh": lambda index, document: index.refresh_ref_docs([document]) == [True],
    "upload": lambda index, document: (index.upload([document]).documents_changed == 1, index.uploads.wait(60))[0],
}


def opened(compressor: Compressor, folder: Path | None = None, **options: Any) -> ConceptIndex:
    chunks = {} if "transformations" in options else {"chunk_size": 60}
    return ConceptIndex.create(folder, compressor=compressor, embedder=HashEmbedder(), **chunks, **options)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", WAYS)
def test_a_change_that_the_hash_of_llamaindex_misses(compressor: Compressor, way: str, change: str) -> None:
    with opened(compressor) as index:
        first = Document(id_="d", text=TEXT, **PLAIN)
        index.ingest([first])
        segments = index.stats()["segments"]
        changed = Document(id_="d", text=TEXT, **CHANGES[change])
        assert WAYS[way](index, changed)
        assert not WAYS[way](index, changed)
        nodes = list(index.faiss.iter_nodes())
        assert "".join(node.get_content(MetadataMode.NONE) for node in nodes) == TEXT
        assert index.stats()["segments"] == segments
        for node, vector in zip(nodes, index.faiss.embedded_nodes([n.node_id for n in nodes]), strict=True):
            alone = changed.model_copy(deep=True)
            alone.set_content(node.get_content(MetadataMode.NONE))
            for mode in (MetadataMode.EMBED, MetadataMode.LLM):
                assert node.get_content(mode) == alone.get_content(mode)
            wanted = np.array(HashEmbedder().get_text_embedding(node.get_content(MetadataMode.EMBED)))
            np.testing.assert_allclose(vector.embedding, wanted / np.linalg.norm(wanted), atol=1e-5)


def test_a_number_is_found_once_it_is_one(compressor: Compressor) -> None:
    later = MetadataFilters(filters=[MetadataFilter(key="year", value=1870, operator=FilterOperator.GTE)])
    with opened(compressor) as index:
        index.ingest([Document(id_="d", text=TEXT, metadata={"year": "1871"})])
        assert index.as_retriever(filters=later).retrieve("When?") == []
        index.ingest([Document(id_="d", text=TEXT, metadata={"year": 1871})])
        assert index.as_retriever(filters=later).retrieve("When?")


def test_ids_of_nodes_that_say_nothing_of_their_text(compressor: Compressor) -> None:
    """A splitter with `id_func` may number the chunks of a document; an edit must come in all the same."""
    numbered = SentenceSplitter(chunk_size=24, chunk_overlap=0, id_func=lambda i, document: f"{document.id_}-{i}")
    with opened(compressor, transformations=[numbered]) as index:
        index.ingest([Document(id_="d", text=TEXT)])
        before = {node.node_id: node.get_content(MetadataMode.NONE) for node in index.faiss.iter_nodes()}
        assert len(before) > 1
        report = index.ingest([Document(id_="d", text=TEXT.replace("nine", "noon"))])
        after = {node.node_id: node.get_content(MetadataMode.NONE) for node in index.faiss.iter_nodes()}
        assert report.documents_changed == 1 and set(after) == set(before)
        assert "noon" in after["d-0"] and {k: t for k, t in after.items() if k != "d-0"} == {
            k: t for k, t in before.items() if k != "d-0"
        }


def test_storages_of_before_stay_quiet(compressor: Compressor, tmp_path: Path) -> None:
    """They remember the hash of LlamaIndex alone, as an index that was imported does."""
    documents = [Document(id_="a", text=TEXT), Document(id_="b", text=TEXT, **CHANGES["embedder"])]
    with opened(compressor, tmp_path / "s") as index:
        index.ingest(documents)
        with index.bulk():
            for document in documents:
                index.splitting.forget(document.id_)
        assert index.ingest(documents).documents_changed == 0
        assert index.ingest([Document(id_="a", text=f"{TEXT} Or not.")]).documents_changed == 1

"""Reads that write, and what is carried off to other processes: refused with a reason, whatever the part."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core import Document

from compllm_rag import Compressor, ConceptIndex
from compllm_rag.errors import NotTransferableError
from toy_embedder import HashEmbedder

PARTS: dict[str, Callable[[ConceptIndex], object]] = {
    "index": lambda index: index,
    "query engine": lambda index: index.as_query_engine(),
    "chat engine": lambda index: index.as_chat_engine(),
    "retriever": lambda index: index.as_retriever(),
    "retriever by words": lambda index: index.as_bm25_retriever(),
    "hybrid retriever": lambda index: index.as_hybrid_retriever(),
    "synthesizer": lambda index: index.as_synthesizer(),
    "generator": lambda index: index.generator,
    "LLM": lambda index: index.llm,
    "storage context": lambda index: index.storage_context,
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_an_index_are_not_pickled_or_copied_in_depth(compressor: Compressor, part: str) -> None:
    index = ConceptIndex.create(None, compressor=compressor, embedder=HashEmbedder(), chunk_size=60)
    index.ingest([Document(id_="a", text="The ferry to Orsa leaves at nine.")])
    made: Any = PARTS[part](index)
    for carry in (pickle.dumps, copy.deepcopy):
        with pytest.raises(NotTransferableError, match="Next step"):
            carry(made)

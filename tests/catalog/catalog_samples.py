"""Nodes with hand-made vectors, and scripts for other processes, for the tests of vector store and catalog."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery

from compllm_rag.llamaindex.vector_store import FaissTextVectorStore
from tests.processes import DIES_WITH_ITS_PARENT

DIM = 4
_ROOT = Path(__file__).resolve().parents[2]
_IMPORTS = f"""{DIES_WITH_ITS_PARENT}
import os, signal, sys, time
from compllm_rag.errors import *
from compllm_rag.catalog.catalog import Catalog
from compllm_rag.catalog.generations import GenerationFiles
from compllm_rag.llamaindex.vector_store import FaissTextVectorStore
from tests.catalog.catalog_samples import *
def die(): os.kill(os.getpid(), signal.SIGKILL)
"""


def python(script: str, *arguments: object) -> list[str]:
    """The command that runs a script, with the store and this module at hand, in a process of its own."""
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path[:0] = [{str(_ROOT)!r}]\n{_IMPORTS}\n{script}",
        *map(str, arguments),
    ]


def axis(number: int, lean: float = 0.0) -> list[float]:
    """The vector along one axis, leaning towards the next one."""
    vector = [0.0] * DIM
    vector[number % DIM] = 1.0
    vector[(number + 1) % DIM] = lean
    return vector


def node(
    id_: str, vector: Sequence[float], *, doc: str | None = None, text: str | None = None, **metadata: Any
) -> TextNode:
    """A node with its embedding."""
    source = {} if doc is None else {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=doc)}
    said = f"text of {id_}" if text is None else text
    return TextNode(id_=id_, text=said, embedding=list(vector), relationships=source, metadata=metadata)


def find(store: FaissTextVectorStore, vector: Sequence[float], top_k: int = 1, **limits: Any) -> list[str]:
    """Ids of the nodes nearest to a vector."""
    query = VectorStoreQuery(query_embedding=list(vector), similarity_top_k=top_k, **limits)
    ids = store.query(query).ids
    return list(ids or [])


def filled(path: Path, n: int = 3) -> FaissTextVectorStore:
    """A store in a folder with committed nodes n0, n1, ... along the axes, one document each."""
    store = FaissTextVectorStore.create(path, DIM)
    store.add([node(f"n{i}", axis(i), doc=f"d{i}") for i in range(n)])
    store.commit()
    return store

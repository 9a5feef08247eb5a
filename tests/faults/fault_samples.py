"""Storages to damage, and processes to kill, for the fault tests."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from llama_index.core import Document

import toy
from compllm_rag import Compressor, ConceptIndex
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.storage.verification import StorageCheck, verify_storage
from tests import processes
from tests.processes import DIES_WITH_ITS_PARENT, LIMIT_S, said, tell  # noqa: F401 - for the tests
from toy_embedder import HashEmbedder

PARAGRAPHS = toy.TEXT.split("\n\n")
QUESTION = "Who built the lighthouse on Gull Rock?"
_TESTS = Path(__file__).resolve().parents[1]
_IMPORTS = f"""{DIES_WITH_ITS_PARENT}
import sys
sys.path[:0] = [{str(_TESTS)!r}, {str(_TESTS.parent)!r}]
import os, signal, time
from pathlib import Path
from tests.faults.fault_samples import *
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
"""


def python(script: str, *arguments: object) -> list[str]:
    """The command that runs a script, with everything of this module at hand, in a process of its own."""
    return [sys.executable, "-c", f"{_IMPORTS}\n{script}", *map(str, arguments)]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script to its end."""
    return processes.run(python(script, *arguments))


def talking(script: str, *arguments: object, limit: float = LIMIT_S) -> AbstractContextManager[subprocess.Popen[str]]:
    """A process that one can talk to line by line; it is killed at the end, and after `limit` seconds."""
    return processes.started(python(script, *arguments), limit)


def documents(n: int = 6, version: int = 0) -> list[Document]:
    """Documents that share most sentences; another version changes one sentence of each."""
    return [
        Document(id_=f"d{i}", text=f"{PARAGRAPHS[i % 3]} Copy {i} of version {version}. {PARAGRAPHS[(i + 1) % 3]}")
        for i in range(n)
    ]


def create(path: Path | None, compressor: Compressor | DeepCompressor | None = None, **options: Any) -> ConceptIndex:
    """Make or open a storage for writing."""
    return ConceptIndex.create(
        path, compressor=compressor or Compressor(toy.llm()), embedder=HashEmbedder(), chunk_size=60, **options
    )


def load(path: Path, compressor: Compressor | DeepCompressor | None = None, **options: Any) -> ConceptIndex:
    """Open a storage that exists."""
    return ConceptIndex.load(path, compressor=compressor or Compressor(toy.llm()), embedder=HashEmbedder(), **options)


def filled(path: Path, compressor: Compressor | DeepCompressor, n: int = 6) -> Path:
    """A closed storage of `documents(n)`."""
    with create(path, compressor) as index:
        index.ingest(documents(n))
    return path


def texts(index: ConceptIndex) -> dict[str, str]:
    """What each document in an index says: its chunks joined, in their order."""
    found: dict[str, str] = {}
    for node in index.faiss.iter_nodes():
        found[node.ref_doc_id] = found.get(node.ref_doc_id, "") + node.text
    return found


def check_whole(index: ConceptIndex) -> None:
    """Every count an index keeps is the one its nodes give, and every segment has its concepts."""
    nodes = list(index.faiss.iter_nodes())
    keys = [key for node in nodes for key in index.library.passage(node.text).all_keys]
    with index.faiss.catalog.reading() as connection:
        held = {bytes(key).hex(): n for key, n in connection.execute("SELECT key, n FROM refs")}
    assert held == Counter(keys)
    assert all(index.store.contains(sorted(set(keys))))
    assert index.stats()["chunks"] == len(nodes) == len({node.node_id for node in nodes})


def sound(path: Path) -> StorageCheck:
    """A deep verification that must find nothing."""
    check = verify_storage(path, deep=True)
    assert check.sound, check.findings
    return check


def execute(database: Path, statement: str, *values: object) -> None:
    """Change a database behind its owner's back."""
    connection = sqlite3.connect(database)
    with connection:
        assert connection.execute(statement, values).rowcount != 0
    connection.close()


def flip(path: Path, offset: int) -> None:
    """Flip one bit on the disk."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)

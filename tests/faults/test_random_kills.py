"""Number 1: a process that ingests is killed at a random moment, again and again.

After each kill the storage opens, every document is wholly there (in its old or its new version) or wholly absent,
nothing is damaged, and running the same ingest again completes it without a duplicate. A server process imports
everything once and forks for each ingest, which makes a kill cost a fraction of a second.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from llama_index.core import Document

from compllm_rag import Compressor, ConceptIndex
from compllm_rag.errors import StorageNotFoundError
from compllm_rag.storage.compaction import compact_storage
from compllm_rag.storage.verification import verify_storage
from tests.faults.fault_samples import check_whole, create, load, said, sound, talking, tell
from tests.faults.fault_samples import documents as plain_documents

pytestmark = pytest.mark.faults
_N = 8
_FRESH_EVERY = 5  # rounds that one storage lives through

# Killed in the child: making the storage, ingesting with a commit after each few documents, deleting, compacting.
_SERVER = """
import torch
torch.set_num_threads(1)
from compllm_rag.catalog import generations
from compllm_rag.llamaindex import ingest
from compllm_rag.storage.compaction import compact_storage
from tests.faults.test_random_kills import documents
ingest._BATCH_CHARS, ingest._COMMIT_EVERY_S = 900, 0.0
generations.LEAST_LOG = 3000  # some commits append to the log, some write a vector file
compressor = Compressor(toy.llm())
compressor.fingerprint
def work(path, version):
    with create(path, compressor) as index:
        index.ingest(documents(version))
        index.delete_ref_doc('d0')
    compact_storage(path)
print('ready', flush=True)
for line in sys.stdin:
    path, version, delay = line.split()
    begun, child = time.perf_counter(), os.fork()
    if child == 0:
        try: work(Path(path), int(version))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if float(delay) >= 0:
        time.sleep(float(delay))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    print(status, time.perf_counter() - begun, flush=True)
"""


def documents(version: int) -> list[Document]:
    """One version of the corpus: in each, half of the documents have changed since the one before."""
    return [plain_documents(_N, version - (version + i) % 2)[i] for i in range(_N)]


def node_ids(index: ConceptIndex, version: int) -> dict[str, set[str]]:
    """Ids of the nodes that each document of a version has; they are digests of what the nodes say."""
    found: dict[str, set[str]] = {}
    for node in index.parser.get_nodes_from_documents(documents(version)):
        found.setdefault(node.ref_doc_id, set()).add(node.node_id)
    return found


def held(index: ConceptIndex) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for node in index.faiss.iter_nodes():
        assert node.node_id not in found.setdefault(node.ref_doc_id, set())
        found[node.ref_doc_id].add(node.node_id)
    return found


def check_after_kill(path: Path, compressor: Compressor, version: int) -> bool:
    """Look at a storage whose writer was killed. Gives whether it was made at all."""
    try:
        index = load(path, compressor, read_only=True)
    except StorageNotFoundError:
        return False
    with index:
        old, new, there = node_ids(index, version - 1), node_ids(index, version), held(index)
        for doc_id in (f"d{i}" for i in range(_N)):
            assert there.get(doc_id, set()) in (set(), old[doc_id], new[doc_id]), doc_id
        assert set(there) <= set(new)
        for node in index.as_retriever(similarity_top_k=3).retrieve("the lamp burns"):
            assert index.library.fetch(node.node.text, missing="error").misses == 0
    assert verify_storage(path, deep=True).sound
    return True


def kill_rounds(tmp_path: Path, compressor: Compressor, rounds: int, seed: int) -> None:
    chance, killed, made, tried, path = random.Random(seed), 0, 0, 0, tmp_path / "s"
    with talking(_SERVER) as server:
        assert said(server) == "ready"

        def ingest(version: int, delay: float) -> tuple[int, float]:
            tell(server, f"{path} {version} {delay}")
            status, seconds = said(server).split()
            return int(status), float(seconds)

        assert ingest(1, -1)[0] == 0  # warms caches up
        status, whole = ingest(2, -1)
        assert status == 0
        while killed < rounds:
            version = 2 + tried
            if tried % _FRESH_EVERY == 0:
                shutil.rmtree(path)
                version += 1
            tried += 1
            assert tried < 5 * rounds, "most ingests end before they are killed"
            status, _ = ingest(version, chance.uniform(0, whole))
            assert status in (0, 9)
            killed += status == 9
            whole *= 1.05 if status == 9 else 0.8  # how long an ingest takes changes with what else the machine does
            made += check_after_kill(path, compressor, version)
            with create(path, compressor) as index:
                index.ingest(documents(version))
                assert held(index) == node_ids(index, version)
                check_whole(index)
            if chance.random() < 0.3:
                compact_storage(path)
        sound(path)
    assert made > rounds // 2


def test_twenty_kills(tmp_path: Path, compressor: Compressor) -> None:
    kill_rounds(tmp_path, compressor, 20, seed=4)


@pytest.mark.slow
def test_two_hundred_kills(tmp_path: Path, compressor: Compressor) -> None:
    kill_rounds(tmp_path, compressor, 200, seed=5)

"""A storage opens for the compressor and the embedder it was made by, and for no others; tenants share nothing."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from llama_index.core import Document
from safetensors.torch import load_file, save_file

import toy
from compllm_rag import Compressor, CompressorConfig, ConceptIndex, TargetLLM
from compllm_rag.errors import (
    ConfigurationError,
    EmbedderMismatchError,
    FingerprintMismatchError,
    InvalidConceptsError,
    StorageMismatchError,
)
from compllm_rag.library import ConceptLibrary
from compllm_rag.store import MemoryStore
from tests.faults.fault_samples import PARAGRAPHS, create, documents, filled, load, run
from toy_embedder import HashEmbedder
from trained import information, randomise, trained

pytestmark = pytest.mark.faults


def other_tokenizer() -> Compressor:
    tokenizer = toy.tokenizer(text="Another text, from which other merges come. " * 3)
    return Compressor(TargetLLM(toy.model(), tokenizer), information=information(toy.llm()))


def other_segmenter_version(llm: TargetLLM) -> Compressor:
    return Compressor(llm, CompressorConfig(segmenter_version=1), information=information(llm))


OTHERS = {
    "base model": lambda llm: Compressor(toy.llm(seed=1), information=information(llm)),
    "tokenizer": lambda llm: other_tokenizer(),
    "adapter": lambda llm: trained(llm),
    "segment length": lambda llm: Compressor(llm, CompressorConfig(segment_length=16), information=information(llm)),
    "layers": lambda llm: Compressor(llm, CompressorConfig(layers=1), information=information(llm)),
    "information table": lambda llm: Compressor(llm, information=information(llm, seed=1)),
    "segmenter version": other_segmenter_version,
}


@pytest.mark.parametrize("changed", OTHERS)
def test_another_compressor_does_not_open_the_storage(tmp_path: Path, llm: TargetLLM, changed: str) -> None:
    own = Compressor(llm, information=information(llm))
    path = filled(tmp_path / "s", own)
    other = OTHERS[changed](llm)
    for open_it in (create, load):
        with pytest.raises(FingerprintMismatchError) as caught:
            open_it(path, other)
        assert all(made.fingerprint[:16] in str(caught.value) for made in (own, other))
    load(path, Compressor(llm, information=information(llm))).close()


def test_another_rate_is_a_miss_and_no_mismatch(tmp_path: Path, compressor: Compressor) -> None:
    path = filled(tmp_path / "s", compressor)
    with load(path, compressor) as index:
        node = next(index.faiss.iter_nodes())
        other = ConceptLibrary(compressor, index.store, rate=4.0)
        assert index.library.fetch(node.text).misses == 0
        assert other.fetch(node.text).hits == 0
    with pytest.raises(StorageMismatchError, match="rate.*got 4.0, expected 2.0"):
        create(path, compressor, rate=4.0)


def test_another_embedder_is_refused_with_both_names(tmp_path: Path, compressor: Compressor) -> None:
    path = filled(tmp_path / "s", compressor)
    for other in (HashEmbedder(dim=32), HashEmbedder(model_name="hash-two")):
        with pytest.raises(EmbedderMismatchError) as caught:
            ConceptIndex.load(path, compressor=compressor, embedder=other)
        for name in (other.model_name, f"{other.dim} dimensions", "hash-64", "64 dimensions"):
            assert name in str(caught.value)


def test_tenants_share_neither_records_nor_hits(compressor: Compressor) -> None:
    store = MemoryStore(compressor.hidden_size)
    ours, theirs = (ConceptLibrary(compressor, store, namespace=name) for name in ("a", "b"))
    ours.ensure(PARAGRAPHS)
    for text in PARAGRAPHS:
        keys = theirs.passage(text).keys
        assert not set(keys) & set(ours.passage(text).keys)
        assert store.contains(keys) == [False] * len(keys)  # the very lookup of a text nobody has
        assert theirs.fetch(text, missing="text").hits == 0
    assert theirs.ensure(PARAGRAPHS).reused == 0


class Broken(HashEmbedder):
    """An embedder that fails for some texts."""

    value: float = float("nan")

    def _get_query_embedding(self, query: str) -> list[float]:
        return [self.value] * self.dim


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_query_without_direction_is_refused(tmp_path: Path, compressor: Compressor, value: float) -> None:
    with ConceptIndex.create(tmp_path / "s", compressor=compressor, embedder=Broken(value=value)) as index:
        index.ingest(documents(2))
        with pytest.raises(ConfigurationError, match="no direction"):
            index.as_query_engine().query("Who?")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e4])
def test_concepts_out_of_scale_are_refused_on_writing_and_on_reading(
    tmp_path: Path, compressor: Compressor, value: float
) -> None:
    path = filled(tmp_path / "s", compressor, 2)
    wild = trained(toy.llm())
    randomise(wild, seed=0)
    with torch.no_grad():
        wild.head.bias.fill_(value)
    with create(tmp_path / "t", wild) as index:
        with pytest.raises(InvalidConceptsError):
            index.ingest(documents(2))
        assert index.stats()["unique_segments"] == 0
    with load(path, compressor) as index:
        text = "A passage whose concepts somebody else has put."
        (key, *_), (k, *_) = index.library.passage(text).keys, index.library.passage(text).n_concepts
        if value == 3e4:  # the store itself takes what is finite, and refuses the rest
            index.store.put([(key, torch.full((k, compressor.hidden_size), value))])
        with pytest.raises(InvalidConceptsError):
            index.store.put([(key, torch.full((k, compressor.hidden_size), value * 10))])
            index.library.fetch(text)
        if value == 3e4:
            with pytest.raises(InvalidConceptsError, match="scale"):
                index.library.fetch(text)


def _forged(kind: str, good: Path) -> bytes:
    """A weights file that lies about itself."""
    state = load_file(good)
    if kind == "huge header":
        return struct.pack("<Q", 2**62) + b"{}"
    if kind == "huge tensor":
        header = {"head.weight": {"dtype": "F16", "shape": [2**20, 2**20], "data_offsets": [0, 2**41]}}
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + bytes(64)
    if kind == "wrong dtype":
        state["head.weight"] = state["head.weight"].double()
    elif kind == "wrong shape":
        state["head.bias"] = state["head.bias"][:-1].clone()
    elif kind == "extra tensor":
        state["extra"] = torch.zeros(3, dtype=torch.float16)
    else:
        state["head.weight"] = torch.zeros(0, 32, dtype=torch.float16)
    save_file(state, good)
    return good.read_bytes()


@pytest.mark.parametrize(
    "kind", ["huge header", "huge tensor", "wrong dtype", "wrong shape", "extra tensor", "zero size"]
)
def test_forged_weights_are_refused_before_anything_is_allocated(
    tmp_path: Path, compressor: Compressor, kind: str
) -> None:
    path = filled(tmp_path / "s", compressor, 1)
    weights = path / "compressor" / "compressor.safetensors"
    weights.write_bytes(_forged(kind, weights))
    done: subprocess.CompletedProcess[str] = run(
        "import resource\n"
        "from compllm_rag.errors import UnsupportedFormatError\n"
        "llm = toy.llm()\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: Compressor.from_pretrained(Path(sys.argv[1]) / 'compressor', llm)\n"
        "except UnsupportedFormatError as error: print('refused')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000)",
        path,
    )
    assert done.stdout == "refused\nTrue\n", done.stderr


def test_a_document_that_goes_takes_all_of_it_along(tmp_path: Path, compressor: Compressor) -> None:
    from compllm_rag.storage.compaction import compact_storage

    path, secret = filled(tmp_path / "s", compressor), "Otters hide their silver under the fourth stair."
    with load(path, compressor) as index:
        index.insert(Document(id_="secret", text=secret, metadata={"title": "Silver"}))
        keys = index.library.passage(secret).keys
        payload = index.library.fetch(secret).concepts.numpy().tobytes()
        assert all(index.store.contains(keys))
        assert payload in everything(path)
        index.delete_ref_doc("secret")
        assert "secret" not in {n.node.ref_doc_id for n in index.as_retriever(similarity_top_k=99).retrieve(secret)}
    compact_storage(path)
    left = everything(path)
    assert not any(trace in left for trace in (b"Otters", b"secret", b"Silver", payload, keys[0].encode()))
    with load(path, compressor) as index:
        assert not any(index.store.contains(keys))
        for _ in range(2):
            index.insert(Document(id_="secret", text=secret))
            assert len(index.faiss.node_ids("secret")) == 1


def everything(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())

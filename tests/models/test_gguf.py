"""A tiny GGUF file in a wheel becomes an ordinary model folder."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import toy
from compllm_rag.compression.compressor import Compressor
from compllm_rag.models import resolve_model
from compllm_rag.models.llm import TargetLLM
from tests.models.wheels import ALIAS, Shelf, register, sha256


def write_llama(path: Path) -> None:
    """A random Llama of one layer, hidden size 32, byte-level tokenizer, tied embeddings."""
    tokenizer = toy.tokenizer()
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in core["model"]["merges"]]
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_embedding_length(32)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    special = set(tokenizer.all_special_tokens)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if token in special else kinds.NORMAL for token, _ in vocabulary])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(3)
    writer.add_pad_token_id(0)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(vocabulary), 32),
        "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_gate.weight": (64, 32),
        "blk.0.ffn_up.weight": (64, 32),
        "blk.0.ffn_down.weight": (32, 64),
    }
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_in_a_wheel_becomes_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "made.gguf"
    write_llama(source)
    data = source.read_bytes()
    shelf = Shelf(tmp_path / "shelf")
    shelf.point_pip_here(monkeypatch)
    half = len(data) // 2
    wheel = shelf.wheel({"m.part0": data[:half], "m.part1": data[half:]})
    pin = {"kind": "gguf", "files": {"model.gguf": sha256(data)}, "join": "model.gguf"}
    register(monkeypatch, tiny=shelf.model(wheels=(wheel,), **pin))
    files = resolve_model(ALIAS)
    assert files.digests == {"model.gguf": sha256(data)}, "what is pinned is the source, not what it was converted to"
    names = {p.name for p in files.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "source.json"} <= names
    assert not [name for name in names if name.endswith(".gguf") or name == "raw"]

    llm = TargetLLM.from_pretrained(ALIAS, dtype="float32")
    assert llm.hidden_size == 32
    assert llm.window == 512
    assert llm.stop_ids() == {3}
    assert llm.source == ALIAS
    reader = gguf.GGUFReader(source)
    (stored,) = [t for t in reader.tensors if t.name == "token_embd.weight"]
    expected = gguf.dequantize(stored.data, stored.tensor_type)
    assert torch.equal(llm.embedding.weight.cpu(), torch.from_numpy(expected.copy()))
    assert llm.model.get_output_embeddings().weight.data_ptr() == llm.embedding.weight.data_ptr()
    ids = llm.tokenizer("The lighthouse", add_special_tokens=False)["input_ids"]
    assert ids == toy.tokenizer()("The lighthouse", add_special_tokens=False)["input_ids"]
    assert llm.tokenizer.decode(ids) == "The lighthouse"
    (concepts,) = Compressor(llm).compress([ids], [2])
    assert concepts.shape == (2, 32)
    assert resolve_model(ALIAS, offline=True) == files

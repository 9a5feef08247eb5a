"""Identities differ wherever concepts may, and only there."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import toy
from compllm_rag.compression.compressor import Compressor
from compllm_rag.config import CompressorConfig
from compllm_rag.fingerprint import file_digest, mapping_digest, record_key, tagged_digest, tensor_digest
from compllm_rag.models.llm import TargetLLM
from trained import LORA, information, trained

KEY: dict[str, Any] = {"namespace": "n", "fingerprint": "f" * 64, "n_concepts": 2, "token_ids": [1, 2, 3]}


def test_a_digest_is_64_hexadecimal_characters_whatever_the_order_of_fields() -> None:
    assert tagged_digest("t", a=1, b="x") == tagged_digest("t", b="x", a=1)
    assert len(tagged_digest("t")) == 64
    assert len(bytes.fromhex(tagged_digest("t"))) == 32


def test_the_key_of_a_record_is_what_stores_on_disk_were_written_with() -> None:
    fields = (b"n", b"f" * 64, (2).to_bytes(8, "big"), bytes([1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]))
    prefixed = b"".join(len(field).to_bytes(8, "big") + field for field in fields)
    assert record_key(**KEY) == hashlib.sha256(b"compllm-rag/record/1" + prefixed).hexdigest()


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({"a": "bc", "d": ""}, {"a": "b", "d": "c"}),
        ({"a": "1"}, {"a": 1}),
        ({"a": b"x"}, {"a": "x"}),
        ({"a": True}, {"a": 1}),
        ({"a": 1.0}, {"a": 1}),
        ({"a": None}, {"a": "None"}),
        ({"a": None}, {}),
        ({"ab": "c"}, {"a": "bc"}),
        ({"a": "1", "b": "2"}, {"a": "2", "b": "1"}),
    ],
)
def test_fields_have_borders_names_and_types(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert tagged_digest("t", **left) != tagged_digest("t", **right)


def test_tags_keep_kinds_apart() -> None:
    assert tagged_digest("a", x="1") != tagged_digest("b", x="1")


def test_mappings_have_borders_but_no_order() -> None:
    assert mapping_digest("t", {"a": "1", "b": "2"}) == mapping_digest("t", {"b": "2", "a": "1"})
    assert mapping_digest("t", {"a": "1b"}) != mapping_digest("t", {"a1": "b"})
    assert mapping_digest("t", {"a": "b", "c": "d"}) != mapping_digest("t", {"a": "bcd"})
    assert mapping_digest("t", {}) != mapping_digest("u", {})


def test_tensors_differ_by_name_value_shape_and_dtype_but_not_by_layout() -> None:
    base = np.arange(6, dtype=np.float32).reshape(2, 3)
    known = tensor_digest({"a": base})
    assert tensor_digest({"a": np.asfortranarray(base)}) == known
    assert tensor_digest({"a": base.astype(">f4")}) == known
    others = [{"b": base}, {"a": base + 1}, {"a": base.reshape(3, 2)}, {"a": base.astype("f8")}, {"a": base, "b": base}]
    assert len({known, *map(tensor_digest, others)}) == 6


def test_a_files_digest_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    "change",
    [
        {"namespace": "m"},
        {"namespace": ""},
        {"fingerprint": "e" * 64},
        {"n_concepts": 3},
        {"token_ids": [1, 2]},
        {"token_ids": [1, 2, 3, 0]},
        {"token_ids": [1, 3, 2]},
        {"token_ids": [1, 2, 3 + 2**16]},
        # What one field loses the next one gains.
        {"namespace": "nf", "fingerprint": "f" * 63},
    ],
)
def test_every_field_changes_the_key(change: dict[str, Any]) -> None:
    assert record_key(**{**KEY, **change}) != record_key(**KEY)


def test_the_kind_of_sequence_does_not_change_the_key() -> None:
    assert record_key(**{**KEY, "token_ids": (1, 2, 3)}) == record_key(**KEY)


# Compressor.fingerprint

OTHER_VALUES: dict[str, Any] = {
    "segment_length": 16,
    "layers": 1,
    "queries": "eos",
    "anchor_positions": "source",
    "anchor_words": True,
    "sink": True,
    "scale": 2.0,
    "lora_rank": 3,
    "lora_alpha": 16,
    "lora_modules": ("q_proj", "v_proj"),
}


def make(llm: TargetLLM, config: CompressorConfig) -> Compressor:
    torch.manual_seed(0)  # LoRA starts from random numbers
    return Compressor(llm, config, information=information(llm))


# Deep concepts have fingerprints of their own (tests/compression/test_deep_saved.py).
DEEP_FIELDS = {
    *("entry_layer", "unit_length", "opening", "selector", "pins", "marked"),
    *(f"{part}_{what}" for part in ("read", "prompt") for what in ("rank", "alpha", "modules")),
}
FIELDS = set(CompressorConfig.model_fields) - {"format_version", "segmenter_version"} - DEEP_FIELDS


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_every_setting_changes_the_fingerprint(llm: TargetLLM, field: str) -> None:
    base = CompressorConfig(**LORA)
    other = CompressorConfig(**{**LORA, field: OTHER_VALUES[field]})
    assert make(llm, base).fingerprint == make(llm, base).fingerprint
    assert make(llm, other).fingerprint != make(llm, base).fingerprint


def test_the_segmenters_version_changes_the_fingerprint_and_the_files_does_not(llm: TargetLLM) -> None:
    base = make(llm, CompressorConfig()).fingerprint
    assert make(llm, CompressorConfig(segmenter_version=1)).fingerprint != base
    assert make(llm, CompressorConfig().model_copy(update={"format_version": 2})).fingerprint == base


def test_learned_weights_and_the_information_table_change_the_fingerprint(llm: TargetLLM) -> None:
    seen = {trained(llm).fingerprint, trained(llm, seed=1).fingerprint, make(llm, CompressorConfig(**LORA)).fingerprint}
    other_table = Compressor(llm, information=information(llm, seed=1))
    seen |= {make(llm, CompressorConfig()).fingerprint, other_table.fingerprint}
    assert len(seen) == 5


def test_a_single_weight_of_the_head_changes_the_fingerprint(llm: TargetLLM) -> None:
    compressor = trained(llm)
    before = compressor.fingerprint
    with torch.no_grad():
        compressor.head.bias[3] += 1
    assert compressor.refresh_fingerprint() != before
    assert compressor.fingerprint != before


@pytest.mark.parametrize("setting", [{"sink": True}, {"queries": "eos"}])
def test_the_tokens_a_compressor_adds_are_part_of_its_identity(setting: dict[str, Any]) -> None:
    config = CompressorConfig(**setting)
    llm = toy.llm()
    before = make(llm, config).fingerprint
    untouched = make(llm, CompressorConfig()).fingerprint
    llm.tokenizer.bos_token, llm.tokenizer.eos_token = "<|start|>", "<|start|>"
    assert make(llm, config).fingerprint != before
    assert make(llm, CompressorConfig()).fingerprint == untouched


@pytest.fixture
def folder(tmp_path: Path, toy_folder: Path) -> Path:
    """A model folder of this test's own."""
    return Path(shutil.copytree(toy_folder, tmp_path / "model"))


def fingerprint(folder: Path, **options: Any) -> str:
    llm = TargetLLM.from_pretrained(folder, **options)
    return Compressor(llm, information=information(llm)).fingerprint


def test_weights_settings_and_vocabulary_of_the_llm_change_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    known = fingerprint(folder)
    assert fingerprint(toy.save(tmp_path / "seed", seed=1)) != known
    settings_file, vocabulary = folder / "config.json", folder / "tokenizer.json"
    text = settings_file.read_text()
    settings_file.write_text(json.dumps(json.loads(text) | {"rms_norm_eps": 1e-3}))
    assert fingerprint(folder) != known
    settings_file.write_text(text)
    assert fingerprint(folder) == known
    toy.tokenizer(text="Another text, from which other merges come. " * 3).save_pretrained(tmp_path / "tokenizer")
    shutil.copy(tmp_path / "tokenizer" / "tokenizer.json", vocabulary)
    assert fingerprint(folder) != known


def test_neither_the_chat_template_nor_notes_change_the_fingerprint(folder: Path) -> None:
    known = fingerprint(folder)
    (folder / "README.md").write_text("notes")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert fingerprint(folder) == known


def test_the_reader_changes_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        model = get_peft_model(toy.model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_()
        model.save_pretrained(tmp_path / f"reader{seed}")
    seen = [fingerprint(folder, reader=reader) for reader in (None, tmp_path / "reader0", tmp_path / "reader1")]
    assert len(set(seen)) == 3
    assert fingerprint(folder, reader=tmp_path / "reader0") == seen[1]


def test_the_dtype_does_not_change_the_fingerprint_and_hardly_the_concepts(folder: Path, tmp_path: Path) -> None:
    trained(TargetLLM.from_pretrained(folder), strength=0.02).save_pretrained(tmp_path / "compressor")
    made = [
        Compressor.from_pretrained(tmp_path / "compressor", TargetLLM.from_pretrained(folder, dtype=dtype))
        for dtype in ("float32", "bfloat16", "float16")
    ]
    assert len({compressor.fingerprint for compressor in made}) == 1
    segments = made[0].segmenter.split(toy.TEXT)[:12]
    rms = made[0].llm.embed(range(400)).pow(2).mean().sqrt()
    exact, *rounded = (torch.cat(c.compress(segments, [(len(s) + 1) // 2 for s in segments])) for c in made)
    for concepts in rounded:
        assert (concepts - exact).pow(2).mean().sqrt() <= 2e-2 * rms
        assert not torch.equal(concepts, exact)

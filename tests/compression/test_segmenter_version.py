"""Compressors cut by the version of the rules that their configuration names, wherever they are loaded from."""

from __future__ import annotations

from pathlib import Path

import pytest

from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.loading import load_compressor, shipped_adapter
from compllm_rag.compression.pretrained import load_spec
from compllm_rag.compression.segmentation import Segmenter
from compllm_rag.config import CompressorConfig
from compllm_rag.models.llm import TargetLLM
from trained import information

# One sentence for version 2, three for version 1, and a mark that version 1 does not know.
TEXT = (
    "Dr. J. Marsh saw the lamp and the boat and the men on the rock in the cold north sea. "
    + "पानी घर। नदी किताब। " * 9
)


@pytest.mark.parametrize("kind", ["input", "deep"])
def test_a_compressor_of_version_1_keeps_it_and_new_ones_have_2(llm: TargetLLM, tmp_path: Path, kind: str) -> None:
    cuts = {version: Segmenter(llm.tokenizer, 20, version).split(TEXT) for version in (1, 2)}
    assert cuts[1] != cuts[2]
    fingerprints = set()
    for version in (1, 2, None):
        settings = {"entry_layer": 1} if kind == "deep" else {}
        settings |= {"segmenter_version": version} if version else {}
        config = CompressorConfig(**settings)
        make = DeepCompressor if kind == "deep" else Compressor
        made = make(llm, config, information=information(llm))
        folder = made.save_pretrained(tmp_path / str(version))
        for found in (made, load_compressor(folder, llm), load_spec(folder, llm)):
            assert found.fingerprint == made.fingerprint
            segmenter = found.segmenter
            assert segmenter.split(TEXT) == cuts[version or 2]
        fingerprints.add(made.fingerprint)
    assert len(fingerprints) == 2


@pytest.mark.parametrize("kind", ["compressor", "deep"])
def test_the_adapters_that_ship_say_version_2(kind: str) -> None:
    folder = shipped_adapter("smollm2-135m-instruct", kind)
    assert folder is not None
    assert '"segmenter_version": 2' in (folder / "config.json").read_text(encoding="utf-8")

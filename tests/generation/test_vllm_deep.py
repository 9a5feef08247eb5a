"""Deep concepts on vLLM: the checkpoint, the rows, and the real engine, whose answers are those of placeholders."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

import toy
from benchmarks.quality.placeholder_reading import PlaceholderGenerator
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.config import GenerationConfig
from compllm_rag.errors import (
    ConfigurationError,
    GeneratorMismatchError,
    InvalidConceptsError,
    UnsupportedModelError,
)
from compllm_rag.generation.address import generator_at
from compllm_rag.generation.local import LocalGenerator
from compllm_rag.generation.vllm import VLLMGenerator
from compllm_rag.generation.vllm.deep_checkpoint import SERVED, write_deep_checkpoint
from compllm_rag.generation.vllm.deep_rows import RowLayout, deep_rows
from compllm_rag.generation.vllm.plugin import ARCHITECTURES
from compllm_rag.models.halves import Halves
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import ConceptSpan, PromptPlan, TextSpan
from tests.vllm_environment import engine_environment, installed
from tests.vllm_servers import FakeVLLM, VLLMProcess, token
from trained import PROMPT, trained_deep

LIMIT = GenerationConfig(max_new_tokens=16)
LAYER, HEAD = 2, 32  # the narrowest heads that vLLM computes on a CPU
ROOT = Path(__file__).resolve().parents[2]


def compressor_of() -> DeepCompressor:
    return trained_deep(toy.llm(layers=4, head=HEAD), entry_layer=LAYER, **PROMPT)


def plans_for(compressor: DeepCompressor) -> list[PromptPlan]:
    """Prompts with a passage or two at several rates, and one of text."""
    ids = tuple(compressor.llm.tokenizer(toy.TEXT, add_special_tokens=False)["input_ids"])

    def span(begin: int, length: int, rate: int) -> ConceptSpan:
        unit, places = ids[begin : begin + length], tuple(range(0, length, rate))
        [rows] = compressor.compress([unit], [len(places)], places=[places])
        return ConceptSpan(rows[:, :-1], 0, torch.tensor(places), length, tuple(unit[place] for place in places))

    head, tail = TextSpan(ids[:9]), TextSpan(ids[9:20])
    return [
        PromptPlan((head, span(30, 60, 1), tail)),
        PromptPlan((head, span(50, 45, 2), TextSpan(ids[3:6]), span(120, 31, 3), tail)),
        PromptPlan((head, tail, TextSpan(ids[40:77]))),
        PromptPlan((head, span(60, 200, 1), tail)),
    ]


def test_a_row_holds_an_embedding_and_a_state() -> None:
    compressor = compressor_of()
    llm, plan = compressor.llm, plans_for(compressor)[1]
    layout = RowLayout.of(llm.model.config, LAYER)
    rows, width = deep_rows(plan, llm, layout), llm.hidden_size
    assert rows.shape == (plan.positions, 2 * width + 4) and layout.row_width % 4 == 0
    ids = [token for span in plan.spans for token in span.ids]
    assert torch.equal(rows[:, :width], llm.embed(ids))
    concepts = torch.cat([s.concepts if isinstance(s, ConceptSpan) else torch.zeros(len(s), width) for s in plan.spans])
    assert torch.equal(rows[:, width : 2 * width], concepts)
    assert rows[:, 2 * width].tolist() == [float(isinstance(s, ConceptSpan)) for s in plan.spans for _ in range(len(s))]
    assert not rows[:, 2 * width + 1 :].any()
    with pytest.raises(ConfigurationError, match="1 concepts and 0 token ids"):
        deep_rows(PromptPlan((ConceptSpan(torch.zeros(1, width), 0, torch.tensor([0]), 1),)), llm, layout)
    with pytest.raises(InvalidConceptsError):
        deep_rows(PromptPlan((ConceptSpan(torch.zeros(1, 7), 0, torch.tensor([0]), 1, (5,)),)), llm, layout)


def test_the_checkpoint_says_its_layout_and_holds_the_reading_half(tmp_path: Path) -> None:
    compressor = compressor_of()
    folder = write_deep_checkpoint(tmp_path / "deep", compressor.halves)
    config = AutoConfig.from_pretrained(folder)
    assert RowLayout.served(config) == RowLayout.of(compressor.llm.model.config, LAYER)
    assert RowLayout.served(compressor.llm.model.config) is None
    assert config.architectures == list(SERVED.values()) == list(ARCHITECTURES) and config.head_dim == HEAD
    from safetensors.torch import load_file

    found, ours = load_file(folder / "model.safetensors"), compressor.llm.model.state_dict()
    other = {name.split(".")[2] for name in found if not torch.equal(found[name], ours[name])}
    assert other == {"0", "1", "2", "3"}  # the LoRAs of both halves merged
    merged = compressor.halves.merged()
    lower, upper = merged.lower.state_dict(), merged.upper.state_dict()
    assert torch.equal(found["model.layers.3.self_attn.q_proj.weight"], upper["model.layers.1.self_attn.q_proj.weight"])
    assert torch.equal(found["model.layers.1.self_attn.k_proj.weight"], lower["layers.1.self_attn.k_proj.weight"])
    with pytest.raises(UnsupportedModelError, match="Qwen3ForCausalLM, entry layer 1"):
        write_deep_checkpoint(tmp_path / "other", Halves(toy.llm("qwen3"), 1))


@pytest.mark.vllm
@pytest.mark.timeout(2400)
def test_the_engine_reads_deep_concepts_as_placeholders(tmp_path: Path) -> None:
    python, compressor = installed(), compressor_of()
    plans, halves = plans_for(compressor), compressor.halves.merged()
    closed = [PromptPlan(tuple(map(without_gaps, plan.spans))) for plan in plans]
    made = PlaceholderGenerator(compressor, LIMIT, halves, seen=True)
    write_deep_checkpoint(tmp_path / "deep", compressor.halves)
    merged = copy.deepcopy(compressor.llm.model)  # the reading halves for text, too, as the engine has them
    for layer, own in zip(merged.model.layers, [*halves.lower.layers, *halves.upper.model.layers], strict=True):
        layer.load_state_dict(own.state_dict())
    merged.save_pretrained(tmp_path / "merged")
    compressor.llm.tokenizer.save_pretrained(tmp_path / "merged")
    text = LocalGenerator(TargetLLM(merged, compressor.llm.tokenizer), LIMIT)
    expected = [(made if plan.deep else text).generate([plan])[0].token_ids for plan in closed]
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    states, told = {}, []
    for plan in plans:
        told.append([])
        for span in plan.spans:
            told[-1].append({"ids": span.ids})
            if isinstance(span, ConceptSpan):
                name = f"{len(states)}"
                states[name] = span.concepts.contiguous()
                told[-1][-1] |= {"states": name, "places": span.places.tolist(), "n_tokens": span.n_tokens}
    save_file(states, tmp_path / "states.safetensors")
    (tmp_path / "plans.json").write_text(json.dumps(told))
    environment = engine_environment() | {
        "PYTHONPATH": os.pathsep.join(map(str, (plugins(tmp_path), ROOT, ROOT / "tests"))),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    words = [str(python), str(ROOT / "tests" / "vllm_deep_in_process.py"), str(tmp_path), str(LAYER)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=2300, check=False)
    assert done.returncode == 0 and done.stdout.endswith("equal\n"), done.stdout[-1000:] + done.stderr[-4000:]


@pytest.mark.vllm
@pytest.mark.timeout(1500)
def test_a_real_server_reads_deep_concepts_as_placeholders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python, compressor = installed(), compressor_of()
    plans = [plan for plan in plans_for(compressor) if plan.deep]
    made = PlaceholderGenerator(compressor, LIMIT, compressor.halves.merged(), seen=True)
    expected = [made.generate([PromptPlan(tuple(map(without_gaps, plan.spans)))])[0].token_ids for plan in plans]
    folder = write_deep_checkpoint(tmp_path / "deep", compressor.halves)
    monkeypatch.setenv("PYTHONPATH", f"{plugins(tmp_path)}{os.pathsep}{ROOT}")
    with VLLMProcess(python, folder, tmp_path / "vllm.log") as server:
        generator = generator_at(f"vllm-deep:{server.url}", compressor.llm, LIMIT, halves=compressor.halves)
        for _ in range(2):
            assert [one.token_ids for one in generator.generate(plans)] == expected
        assert generator.generate(plans[-1:])[0].reused_positions == 128  # states are part of what the cache goes by
        generator.close()
        with pytest.raises(GeneratorMismatchError):
            VLLMGenerator(server.url, compressor.llm, LIMIT).generate([PromptPlan((TextSpan((5, 6, 7)),))])


def without_gaps(span: TextSpan | ConceptSpan) -> TextSpan | ConceptSpan:
    if isinstance(span, TextSpan):
        return span
    return ConceptSpan(span.concepts, span.passage, torch.arange(len(span)), len(span), span.ids)


def plugins(folder: Path) -> Path:
    """A folder from which vLLM finds the plugin as it does where the package is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    made = folder / "site" / f"{project['name'].replace('-', '_')}-0.dist-info"
    made.mkdir(parents=True)
    (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
    lines = [f"{name} = {place}" for name, place in project["entry-points"]["vllm.general_plugins"].items()]
    (made / "entry_points.txt").write_text("\n".join(["[vllm.general_plugins]", *lines, ""]))
    return made.parent


class FakeDeep(FakeVLLM):
    """Reads rows as the plugin does."""

    def __init__(self, compressor: DeepCompressor) -> None:
        super().__init__(compressor.llm)
        self.halves = compressor.halves.merged()

    def embeddings(self, body: dict[str, Any]) -> torch.Tensor:
        found = super().embeddings(body)
        return torch.nn.functional.pad(found, (0, 0 if "prompt_embeds" in body else self.llm.hidden_size + 4))

    def logits(self, embeds: torch.Tensor) -> torch.Tensor:
        width, n = self.llm.hidden_size, embeds.shape[1]
        with torch.inference_mode():
            mask, positions = torch.ones(1, n).long(), torch.arange(n)[None]
            hidden = self.halves.below(embeds[..., :width], mask, positions)
            read = torch.where(embeds[..., 2 * width :][..., :1] > 0, embeds[..., width : 2 * width], hidden)
            return self.halves.above(read, mask, positions)[0]

    def events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        rows, ids = self.embeddings(body), []
        for step in range(body["max_tokens"]):
            more = self.embeddings({"prompt": ids}) if ids else rows[:, :0]
            ids.append(int(self.logits(torch.cat([rows, more], 1))[-1].argmax()))
            ended = ids[-1] in body["stop_token_ids"]
            yield token(ids[-1], "stop" if ended else "length" if step + 1 == body["max_tokens"] else None)
            if ended:
                break


def test_a_server_reads_deep_concepts_as_placeholders() -> None:
    compressor = compressor_of()
    plans, llm = plans_for(compressor)[:2], compressor.llm
    made = PlaceholderGenerator(compressor, LIMIT, compressor.halves.merged(), seen=True)
    expected = [made.generate([PromptPlan(tuple(map(without_gaps, plan.spans)))])[0].token_ids for plan in plans]
    with FakeDeep(compressor) as server:
        generator = generator_at(f"vllm-deep:{server.url}", llm, LIMIT, halves=compressor.halves)
        assert [one.token_ids for one in generator.generate(plans)] == expected
        generator.close()
        plain = VLLMGenerator(server.url, llm, LIMIT)
        with pytest.raises(ConfigurationError, match="models export --deep"):
            plain.generate(plans)
        # Another entry layer is found: its rows hold what does not stand there.
        other = VLLMGenerator(server.url, llm, LIMIT, halves=trained_deep(llm, entry_layer=1).halves)
        with pytest.raises(GeneratorMismatchError):
            other.generate(plans)
    with FakeVLLM(llm) as server, pytest.raises(GeneratorMismatchError, match="another LLM"):
        generator_at(f"vllm-deep:{server.url}", llm, LIMIT, halves=compressor.halves).generate(plans)
    with pytest.raises(ConfigurationError, match="no deep concepts"):
        generator_at("vllm-deep:http://127.0.0.1:9", llm)

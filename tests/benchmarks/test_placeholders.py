"""Placeholders: where they can be compared they give what text and deep concepts give, and the benchmark runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import toy
from benchmarks.quality.placeholder_reading import PlaceholderForward
from benchmarks.quality.placeholders import READS, tables
from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.loading import untrained_deep
from compllm_rag.errors import ConfigurationError
from compllm_rag.generation.forward import WholeForward
from compllm_rag.generation.halves import SplitForward, split_rows
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import ConceptSpan, PromptPlan, Span, TextSpan, lay_out
from loft_corpus import run, write
from trained import trained_deep

CHUNK = tuple(range(40, 380, 13))
QUESTION = (17, 5, 99, 31, 7)
FOLLOWING = torch.tensor([[11, 12, 13], [14, 15, 16]])


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-4 * float(other.abs().max()), rtol=0)


def plans(compressor: DeepCompressor, *, rate: int = 1, way: str = "concepts") -> list[PromptPlan]:
    """Two prompts of unlike length, their passages right behind the opening, as the compressor reads them."""
    opening = tuple(compressor.config.opening)
    out = []
    for unit in (CHUNK, CHUNK[5:]):
        places = tuple(range(0, len(unit), rate))
        [rows] = compressor.compress([unit], [len(places)], places=[places])
        states, n = rows[:, :-1], len(places)
        ids = tuple(unit[place] for place in places)
        bodies: dict[str, Span] = {
            "concepts": ConceptSpan(states, 0, torch.arange(n), n, ids),
            "text": TextSpan(ids, 0),
        }
        out.append(PromptPlan((TextSpan(opening), bodies[way], TextSpan(QUESTION))))
    return out


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_untrained_and_complete_placeholders_that_are_seen_are_text(architecture: str) -> None:
    compressor = untrained_deep(toy.llm(architecture, layers=4), 2)
    seen = PlaceholderForward(compressor.halves, plans(compressor), seen=True)
    text = WholeForward(compressor.llm, lay_out(plans(compressor, way="text"), compressor.llm))
    assert close(seen.prefill(), text.prefill())
    assert close(seen.extend(FOLLOWING), text.extend(FOLLOWING))
    blind = SplitForward(compressor.halves, split_rows(plans(compressor)))
    assert not close(blind.prefill(), text.prefill())


@pytest.mark.parametrize("rate", [1, 3])
def test_placeholders_that_are_masked_are_deep_concepts_at_the_same_positions(rate: int) -> None:
    compressor = trained_deep(toy.llm(layers=4), entry_layer=2)
    masked = PlaceholderForward(compressor.halves, plans(compressor, rate=rate), seen=False)
    concepts = SplitForward(compressor.halves, split_rows(plans(compressor, rate=rate)))
    assert close(masked.prefill(), concepts.prefill())
    assert close(masked.fork().extend(FOLLOWING), concepts.extend(FOLLOWING))
    seen = PlaceholderForward(compressor.halves, plans(compressor, rate=rate), seen=True)
    assert not close(seen.prefill(), concepts.prefill())


def test_it_runs_resumes_and_has_its_section(tmp_path: Path) -> None:
    folder = toy.save(tmp_path / "llm", layers=4)
    context = " ".join(toy.TEXT.split()[:60])
    qas = [{"id": f"q{i}", "question": f"Who rowed {i}?", "answers": ["Tom"]} for i in range(4)]
    write(tmp_path / "eval/squad_dev.jsonl.gz", [{"id": "s", "title": "Rock", "context": context, "qas": qas}])
    documents = [{"title": f"T{i}", "text": context[i * 50 :], "is_supporting": i > 0} for i in range(3)]
    rows_of_hops = [{"id": f"h{i}", "question": "Who?", "answers": ["Ada"], "documents": documents} for i in range(3)]
    write(tmp_path / "eval/hotpotqa_dev.jsonl.gz", rows_of_hops)
    words = ["--llm", folder, "--data-dir", tmp_path, "--rates", 1, 2, "--limit", 3]
    record, _ = run("placeholders", tmp_path / "o.json", *words, "--sets", "squad")
    rows = {(row["read"], row["rate"]): row for row in record["sets"]["squad"]["rows"]}
    titles = [read.title for read in READS]
    at_1 = [("deep concepts", 1.0), ("placeholders, masked", 1.0), ("placeholders, seen", 1.0)]
    assert list(rows) == [("text", None), *at_1, *((title, 2.0) for title in titles), ("nothing", None)]
    half, whole = pytest.approx(0.25, abs=0.01), pytest.approx(0.5, abs=0.02)
    costs = [rows[title, 2.0]["prefill_cost"] for title in titles]
    assert costs == [half, half, whole, whole, whole]
    assert rows["deep concepts", 1.0]["prefill_cost"] == 0.5 and rows["placeholders, seen", 1.0]["prefill_cost"] == 1
    assert len({round(rows[title, 2.0]["nll"], 3) for title in titles}) == len(titles) - 1  # a mask leaves nothing
    assert rows["placeholders, seen", 1.0]["nll"] != rows["deep concepts", 1.0]["nll"]
    assert rows["text", None]["f1"] is not None
    _, told = run("placeholders", tmp_path / "o.json", *words, "--sets", "squad")
    assert told.count("done before") == 2 + 2 + 4  # ways that are the same are measured once
    hops, _ = run("placeholders", tmp_path / "h.json", *words, "--sets", "hotpotqa", "--rates", 4, "--no-answers")
    assert hops["sets"]["hotpotqa"]["n"] == 3 and {row["f1"] for row in hops["sets"]["hotpotqa"]["rows"]} == {None}
    page = "\n".join(tables(json.loads(json.dumps(record))))
    assert (
        "### SQuAD v1.1 dev, 3 questions" in page
        and "| without gaps | 1.99 | 0.25 |" in page
        and "(L = 2 of 4)" in page
    )
    shallow = Compressor(TargetLLM.from_pretrained(folder)).save_pretrained(tmp_path / "input")
    with pytest.raises(ConfigurationError, match="placeholders are of deep concepts"):
        run("placeholders", tmp_path / "p.json", *words, "--compressor", shallow)
    with pytest.raises(ConfigurationError, match="no question left to ask"):
        long = [{"id": "l", "title": "L", "context": toy.TEXT * 30, "qas": qas}]
        write(tmp_path / "eval/squad_dev.jsonl.gz", long)
        run("placeholders", tmp_path / "q.json", *words)

"""Long prefills: the slots of a prompt, chunks against one forward, and the benchmark on a tiny shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import toy
from benchmarks.memory import cache_bytes
from benchmarks.ttft.cost_model import own_tokens
from benchmarks.ttft.long_prompt import Prompt, decode, slots
from benchmarks.ttft.ttft_long import main, plot, tables, tokens
from compllm_rag.models.halves import Halves
from loft_corpus import run


def test_k_is_1024() -> None:
    assert (tokens("4k"), tokens("128K"), tokens("300")) == (4096, 131072, 300)


@pytest.mark.parametrize("rate", [None, 1.0, 2.0, 4.0])
def test_slots_are_those_of_a_prompt(rate: float | None) -> None:
    is_token, positions = slots(500, rate)
    assert bool((positions.diff() >= 1).all()) and int(positions[-1]) + 1 == own_tokens(500) + 500
    concepts = 0 if rate is None else round(500 / rate)
    assert int((~is_token).sum()) == concepts
    assert int(is_token.sum()) == own_tokens(500) + (500 if rate is None else 0)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_chunks_give_what_one_forward_gives(architecture: str) -> None:
    llm = toy.llm(architecture, layers=4)
    ids, everything = torch.arange(4, 64), torch.ones(60, dtype=torch.bool)
    with torch.inference_mode():
        whole = llm.model(ids[None]).logits[0, -1]
        further = llm.model(torch.cat([ids, torch.tensor([7])])[None]).logits[0, -1]
    for layer, chunk in ((0, 0), (0, 7), (2, 25), (2, 60)):
        halves = Halves(llm, layer)
        logits, caches = Prompt(halves, ids, everything, torch.arange(60), chunk).whole()
        torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)
        assert caches[1].get_seq_length() == 60
        assert len(decode(halves, torch.tensor(7), 60, caches, 1)) == 1 and caches[1].get_seq_length() == 61
    assert not torch.allclose(further, whole)


def test_concepts_are_in_the_upper_cache_alone() -> None:
    halves = Halves(toy.llm(layers=4), 2)
    is_token, positions = slots(300, 2.0)
    own = int(is_token.sum())
    prompt = Prompt(halves, torch.zeros(own, dtype=torch.long), is_token, positions, 50)
    for low, high in (prompt.whole()[1], prompt.sampled(2)[2]):
        assert (low.get_seq_length(), high.get_seq_length()) == (own, own + 150)
        assert cache_bytes(low, high) == 2 * (own + own + 150) * 2 * 2 * 8 * 4


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_some_chunks_say_what_all_take(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts what is read: a chunk takes as long as it has slots, and a tenth for each in front."""
    now, read = 0.0, Prompt.read

    def counted(prompt: Prompt, begin: int, caches):
        nonlocal now
        took = len(prompt.is_token[begin : begin + 30]) * (1 + 0.1 * begin)
        now += took
        assert caches[1].get_seq_length() == begin
        assert caches[0].get_seq_length() == int(prompt.is_token[:begin].sum())
        return read(prompt, begin, caches)

    monkeypatch.setattr(Prompt, "read", counted)
    is_token, positions = slots(300, 2.0)
    own = int(is_token.sum())
    prompt = Prompt(Halves(toy.llm(architecture, layers=4), 2), torch.arange(own) % 90, is_token, positions, 30)
    prompt.whole()
    whole, now = now, 0.0
    for timed in (2, 3, 100):
        now = 0.0
        seconds, logits, _ = prompt.sampled(timed, lambda: now)
        assert seconds == pytest.approx(whole) and logits.isfinite().all()
    short = Prompt(prompt.halves, prompt.ids, is_token[:20], positions[:20], 30)
    assert short.sampled(5, lambda: now)[0] == pytest.approx(20)


def test_it_runs_resumes_and_has_its_section(toy_folder: Path, tmp_path: Path, capsys) -> None:
    words = ["--llm", toy_folder, "--shape", "tiny", "--device", "cpu", "--rates", 1, 2, "--decode", 2]
    words += ["--shape-from", 128, "--prefill-chunk", 100]
    run("ttft_long", tmp_path / "o.json", *words, "--shape-to", 128)
    record, told = run("ttft_long", tmp_path / "o.json", *words, "--shape-to", 256)
    assert told.count("done before") == 3
    rows = {(row["length"], row["rate"]): row for row in record["rows"]}
    assert set(rows) == {(n, rate) for n in (128, 256) for rate in (None, 1.0, 2.0)}
    text, one, two = (rows[256, rate] for rate in (None, 1.0, 2.0))
    assert text["positions"] == one["positions"] > two["positions"]
    assert text["kv_bytes"] > one["kv_bytes"] > two["kv_bytes"] and text["flops"] > one["flops"] > two["flops"]
    assert all(row["prefill_s"] > 0 and row["per_token_s"] > 0 for row in rows.values())
    page = "\n".join(tables(record))
    assert "| concepts, rate 2 |" in page and "(ttft_long_tiny.png)" in page and len(plot(record).axes[0].lines) == 3
    assert "not read as a whole" not in page
    with pytest.raises(SystemExit):
        main(["--shape-from", "2k", "--shape-to", "1k"])
    assert "at most --shape-to" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--whole-to", "2k", "--prefill-chunk", "0"])
    assert "--prefill-chunk above 0" in capsys.readouterr().err


def test_longer_prompts_by_some_of_their_chunks(toy_folder: Path, tmp_path: Path) -> None:
    words = ["--llm", toy_folder, "--shape", "tiny", "--device", "cpu", "--rates", 2, "--decode", 1]
    words += ["--shape-from", 128, "--shape-to", 512, "--prefill-chunk", 40, "--whole-to", 256]
    record, _ = run("ttft_long", tmp_path / "o.json", *words)
    rows = {(row["length"], row["rate"]): row for row in record["rows"]}
    assert {n for (n, _), row in rows.items() if row["whole"]} == {128, 256}
    assert {n for (n, _), row in rows.items() if row["sampled_s"]} == {256}
    assert rows[512, None]["kv_bytes"] > rows[512, 2.0]["kv_bytes"] > rows[256, 2.0]["kv_bytes"]
    page = "\n".join(tables(record))
    assert page.count("| ≈ ") == 2 and "more than 256 tokens were not read as a whole: 5 chunks" in page
    assert "of the time of the whole." in page

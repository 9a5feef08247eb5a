"""What training leaves behind: adapters that load, answers that are kept, data that is converted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import toy
from compllm_rag.compression.compressor import Compressor
from compllm_rag.errors import ConfigurationError, DataFileError
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import TextSpan
from compllm_rag.training.compressor_task import CompressorTask, Drawn, RatesConfig, concepts_of, pruned_of
from compllm_rag.training.examples import Body, Example
from compllm_rag.training.hub_data import as_row, fetch_dataset
from compllm_rag.training.labels import own_answers, own_instructions
from compllm_rag.training.loop import train
from compllm_rag.training.material import Material
from compllm_rag.training.reader_task import ReaderTask
from compllm_rag.training.run_config import RunConfig
from trained import randomise, trained
from training_samples import example, fresh, material, write_world

RUN = RunConfig(steps=4, batch=2, lr=1e-2, warmup=1, validate_every=4, save_minutes=9)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("data"), rows=40)


@pytest.mark.parametrize("architecture", toy.ARCHITECTURES)
def test_concepts_in_training_are_those_of_ingestion(architecture: str) -> None:
    made = trained(toy.llm(architecture))
    segments = [tuple(range(5, 5 + n)) for n in (3, 20, 7, 1, 20)]
    ks = [2, 10, 7, 1, 4]
    item = Drawn(
        Example((TextSpan((1,)), Body(tuple(segments[:2])), Body(tuple(segments[2:]))), example().branches),
        [ks[:2], ks[2:]],
    )
    [[one, two]] = concepts_of(made, [item])
    expected = made.compress(segments, ks)
    torch.testing.assert_close(one.detach(), torch.cat(expected[:2]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(two.detach(), torch.cat(expected[2:]), atol=1e-4, rtol=1e-4)
    [[cut, _]] = pruned_of(made, [item])
    anchors = [5 + i for i in made.anchors(segments[0], 2)] + [5 + i for i in made.anchors(segments[1], 10)]
    torch.testing.assert_close(cut, made.llm.embed(anchors).float())


@pytest.mark.parametrize("config", [{"queries": "eos"}, {"anchor_positions": "source", "sink": True}, {"layers": 1}])
def test_every_kind_of_compressor_trains_and_loads_again(world: Path, tmp_path: Path, config: dict) -> None:
    llm = toy.llm()
    made = fresh(llm, **config)
    task = CompressorTask(made, material(llm, world), validation=2)
    before = {name: tensor.clone() for name, tensor in made.state().items()}
    base = {name: p.clone() for name, p in llm.model.named_parameters()}
    train(task, RUN, tmp_path)
    task.export(tmp_path / "now")
    after = Compressor.from_pretrained(tmp_path / "now", toy.llm())
    changed = {n for n, t in after.state().items() if not torch.equal(t, before[n])}
    assert {"head.weight", "head.bias"} <= changed and any(n.startswith("lora.") for n in changed)
    assert "information" not in changed
    assert all(torch.equal(p, base[name]) for name, p in llm.model.named_parameters()), "the LLM is frozen"


def test_rates_are_drawn_per_passage_and_sometimes_per_segment() -> None:
    import random

    ex = Example((TextSpan((1,)), Body(tuple((7,) * 20 for _ in range(30)))), example().branches)
    [same] = RatesConfig(rates=(2.0, 4.0), mixed=0.0).draw(ex, random.Random(1), 20)
    assert set(same) in ({10}, {5})
    [mixed] = RatesConfig(rates=(1.5, 2.0, 4.0, 8.0), mixed=1.0).draw(ex, random.Random(1), 20)
    assert set(mixed) == {14, 10, 5}, "8 is out of reach of segments of 20 tokens"


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_an_exported_reader_merges_into_the_very_model_that_was_trained(
    world: Path, tmp_path: Path, architecture: str
) -> None:
    from peft import PeftModel

    folder = toy.save(tmp_path / "llm", architecture)
    llm = TargetLLM.from_pretrained(folder)
    task = ReaderTask(llm, material(llm, world), keep=[((5, 6, 7), (8, 9))], rank=4, keep_share=0.3, validation=2)
    done = train(task, RUN.model_copy(update={"steps": 8, "validate_every": 8}), tmp_path / "run")
    first, last = [r["validation"] for r in map(json.loads, (tmp_path / "run/log.jsonl").open()) if "validation" in r]
    assert last["nll_text"] < first["nll_text"] and done["best"] == pytest.approx(last["score"])
    ids = torch.tensor([[5, 9, 13, 40, 41]])
    with torch.no_grad():
        live = llm.model(input_ids=ids).logits
        merged = TargetLLM.from_pretrained(folder, reader=tmp_path / "run/best").model(input_ids=ids).logits
        plain = TargetLLM.from_pretrained(folder).model
        bare = plain(input_ids=ids).logits
        peft = PeftModel.from_pretrained(plain, tmp_path / "run/best")(input_ids=ids).logits
    torch.testing.assert_close(merged, live, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(peft, merged, atol=5e-3, rtol=5e-3)
    assert (live - bare).abs().max() > 0.05


def test_a_reader_goes_on_from_an_adapter(world: Path, tmp_path: Path) -> None:
    from compllm_rag.models.adapters import read_adapter

    folder = toy.save(tmp_path / "llm")
    one = TargetLLM.from_pretrained(folder)
    task = ReaderTask(one, material(one, world), rank=4, validation=2)
    train(task, RUN, tmp_path / "run")
    two = TargetLLM.from_pretrained(folder)
    again = ReaderTask(two, material(two, world), rank=4, validation=2)
    again.load(*read_adapter(tmp_path / "run/best"))
    assert again.validate(print)["nll_text"] == pytest.approx(task.validate(print)["nll_text"], rel=1e-3)


def test_an_adapter_to_go_on_from_counts_by_its_own_alpha(world: Path, tmp_path: Path) -> None:
    from compllm_rag.models.adapters import read_adapter

    folder = toy.save(tmp_path / "llm")
    one = TargetLLM.from_pretrained(folder)
    train(ReaderTask(one, material(one, world), rank=4, validation=2), RUN, tmp_path / "run")
    settings = tmp_path / "run/best/adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"lora_alpha": 3}))
    merged = TargetLLM.from_pretrained(folder, reader=tmp_path / "run/best")
    two = TargetLLM.from_pretrained(folder)
    again = ReaderTask(two, material(two, world), rank=4, validation=2)
    again.load(*read_adapter(tmp_path / "run/best"))
    ids = torch.tensor([[5, 9, 13, 40, 41]])
    with torch.no_grad():
        live, wanted = two.model(input_ids=ids).logits, merged.model(input_ids=ids).logits
    torch.testing.assert_close(live, wanted, atol=1e-3, rtol=1e-3)


def test_own_answers_are_made_once_and_kept(llm, world: Path, tmp_path: Path) -> None:
    mine = material(llm, world)
    groups, path = mine.groups[:4], tmp_path / "own.jsonl"
    made = own_answers(llm, groups[:2], mine, path)
    assert set(made) == {q for g in groups[:2] for q in g.questions}
    lines = path.read_text()
    messages: list[str] = []
    more = own_answers(llm, groups, mine, path, lambda message, share: messages.append(message))
    assert path.read_text().startswith(lines) and {k: more[k] for k in made} == made
    assert set(more) == {q for g in groups for q in g.questions}
    assert messages == ["own answers: 6 of 6"]
    torn = path.read_bytes()[:-9]  # killed while it wrote the last line
    path.write_bytes(torn)
    assert own_answers(llm, groups, mine, path, lambda message, share: messages.append(message)) == more
    assert messages[1:] == ["own answers: 1 of 1"]


def test_answers_of_another_llm_or_to_another_prompt_are_not_taken_over(world: Path, tmp_path: Path) -> None:
    one, two = toy.llm(), toy.llm(seed=1)
    mine, path = material(one, world), tmp_path / "own.jsonl"
    groups = mine.groups[:2]
    own_answers(one, groups, mine, path)
    assert own_answers(two, groups, mine, path) == own_answers(two, groups, mine, tmp_path / "other.jsonl")
    first = own_instructions(one, mine, tmp_path / "told.jsonl", number=4)
    mine.texts[:] = ["Quite another text. " * 40]
    again = own_instructions(one, mine, tmp_path / "told.jsonl", number=4)
    assert again == own_instructions(one, mine, tmp_path / "fresh.jsonl", number=4) != first
    # files without ids name their rows alike
    rows = [{"context": f"{name} sleeps.", "question": "Who sleeps?", "answers": [name]} for name in ("Ada", "Bo")]
    files = [tmp_path / "train_a.jsonl", tmp_path / "train_b.jsonl"]
    for file, row in zip(files, rows, strict=True):
        file.write_text(json.dumps(row) + "\n")
    both = Material(files, [], fresh(one).segmenter)
    all_groups = [*both.groups, *both.held_out]
    assert len({g.questions[0].id for g in all_groups}) == 1
    assert len(own_answers(one, all_groups, both, tmp_path / "both.jsonl")) == 2


def test_own_instructions_are_the_models_answers_to_other_prompts(llm, world: Path, tmp_path: Path) -> None:
    made = own_instructions(llm, material(llm, world), tmp_path / "own.jsonl", number=5)
    rows = [json.loads(line) for line in (tmp_path / "own.jsonl").open()]
    assert len(rows) == 5 and made
    prompt, answer = made[0]
    assert llm.tokenizer.decode(prompt).endswith("<|start|>assistant\n")
    with torch.no_grad():
        first = llm.model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax()
    text = llm.tokenizer.decode([first]).strip()
    assert not text or llm.tokenizer.decode(answer).startswith(text)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"context": "C.", "question": "Q?", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}},
            {"title": "", "context": "C.", "question": "Q?", "answers": ["a", "b"]},
        ),
        (
            {"story_section": "C.", "question": "Q?", "answer": "a", "title": "T"},
            {"title": "T", "context": "C.", "question": "Q?", "answers": ["a"]},
        ),
        ({"text": "Just text."}, {"text": "Just text."}),
        ({"context": "C.", "question": "Q?", "answers": {"text": []}}, None),
        ({"label": 3}, None),
    ],
)
def test_columns_of_datasets_become_rows(row: dict, expected: dict | None) -> None:
    assert as_row(row) == expected


def test_a_dataset_is_fetched_once_and_bad_ones_are_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    source = tmp_path / "source"
    source.mkdir()
    rows = [
        {"id": str(i), "context": "Ada built it.", "question": "Who?", "answers": {"text": ["Ada"]}} for i in range(5)
    ]
    (source / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path, kind = fetch_dataset(str(source), tmp_path / "out", limit=3)
    assert kind == "questions" and len(path.read_text().splitlines()) == 3
    (source / "train.jsonl").unlink()
    assert fetch_dataset(str(source), tmp_path / "out") == (path, kind)
    (source / "train.jsonl").write_text('{"label": 1}\n')
    with pytest.raises(DataFileError, match="no rows that can be used"):
        fetch_dataset(str(source), tmp_path / "other")
    with pytest.raises(DataFileError, match="cannot be fetched"):
        fetch_dataset("no-such-organisation/no-such-set", tmp_path / "other")


def test_an_untrainable_compressor_is_refused(tmp_path: Path, world: Path) -> None:
    from compllm_rag.config import CompressorConfig
    from compllm_rag.training.job_options import CompressorOptions, DataOptions
    from compllm_rag.training.jobs import train_compressor

    folder = toy.save(tmp_path / "llm")
    with pytest.raises(ConfigurationError, match="nothing to train"):
        train_compressor(
            tmp_path / "out",
            DataOptions(data_dir=world),
            CompressorOptions(llm=str(folder), config=CompressorConfig()),
        )


def test_random_weights_change_the_score(world: Path) -> None:
    # The validation must see the weights: the same number whatever they are would let anything pass.
    llm = toy.llm()
    made = fresh(llm)
    task = CompressorTask(made, material(llm, world), validation=2)
    before = task.validate(print)
    randomise(made, seed=1)
    after = task.validate(print)
    assert after["nll_concepts@2"] != pytest.approx(before["nll_concepts@2"], abs=1e-3)
    assert after["nll_pruned@2"] == before["nll_pruned@2"] and after["nll_text"] == before["nll_text"]

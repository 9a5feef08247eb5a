"""Relevance is learned from training rows alone, comes with its compressor, and finds sentences that BM25 does not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import toy
from compllm_rag.cli.main import app
from compllm_rag.compression.loading import load_compressor, untrained_deep
from compllm_rag.errors import ConfigurationError
from compllm_rag.evaluation.questions import Question, SourcePassage
from compllm_rag.library import ConceptLibrary
from compllm_rag.models.llm import TargetLLM
from compllm_rag.reading.budget import ReadBudget
from compllm_rag.reading.budgeted import BudgetedReadPolicy
from compllm_rag.reading.passages import PassageReading, Retrieved
from compllm_rag.reading.relevance import Weights
from compllm_rag.reading.sentences import word_shares
from compllm_rag.reading.states import question_states
from compllm_rag.store.memory import MemoryStore
from compllm_rag.training.gold_sentences import drawn, saying
from compllm_rag.training.material import Group, Material, is_held_out
from compllm_rag.training.relevance import train_relevance
from trained import information, trained

# Questions name a place, sentences its number: no word of a question stands in the sentence that answers it.
PAIRS = {"north": "one hundred", "south": "two hundred", "east": "three hundred", "west": "four hundred"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("relevance")
    (folder / "train").mkdir()
    with (folder / "train" / "a.jsonl").open("w", encoding="utf-8") as file:
        for number in range(400):
            rng = random.Random(number)
            sides = rng.sample(sorted(PAIRS), 3)
            text = " ".join(f"The keeper of the light counted {PAIRS[side]} ships in that year." for side in sides)
            asked = {"id": f"q{number}", "question": f"What of the {sides[1]}?", "answers": [PAIRS[sides[1]]]}
            row = {"id": str(number), "title": f"T{number}", "context": text, "qas": [asked]}
            file.write(json.dumps(row) + "\n")
    return folder


def test_questions_are_drawn_from_what_is_trained_on(world: Path) -> None:
    segmenter = untrained_deep(toy.llm(layers=2), 1, information=information(toy.llm(layers=2))).segmenter
    material = Material(Material.files_of(world)[0], [], segmenter)
    found = list(drawn(material.groups, segmenter, n_passages=3, most=2, seed=0))
    assert len(found) == len(material.groups) > 300
    assert not any(is_held_out(one.passages[p].title) for one in found for p, _ in one.gold)
    for one in found:
        assert len(one.passages) == 3 == len(set(one.passages)) and len(one.gold) == 1
        [(passage, sentence)] = one.gold
        assert PAIRS[one.question.split()[-1].strip("?")] in one.sentences[passage][sentence].text
    assert {one.passages.index(next(one.passages[p] for p, _ in one.gold)) for one in found} == {0, 1, 2}
    again = list(drawn(material.groups, segmenter, n_passages=3, most=2, seed=0))
    assert [one.passages for one in again] == [one.passages for one in found]
    assert [one.passages for one in drawn(material.groups, segmenter, n_passages=3, most=2, seed=1)] != [
        one.passages for one in found
    ]


def test_distractors_of_the_question_come_first_and_are_no_gold() -> None:
    segmenter = untrained_deep(toy.llm(layers=2), 1, information=information(toy.llm(layers=2))).segmenter
    own, bridge = SourcePassage("A", "It was built by Marsh."), SourcePassage("B", "Marsh died in Pisa.")
    other = SourcePassage("C", "Marsh sold it.", supporting=False)
    asked = Question("q", (other, own, bridge), "Where?", ("Pisa",))
    assert saying(asked) == [bridge]
    [found] = drawn([Group(asked.passages, (asked,))], segmenter, n_passages=3, most=1, seed=0)
    assert set(found.passages) == {own, bridge, other}
    assert {found.passages[p] for p, _ in found.gold} == {bridge}
    [few] = drawn([Group(asked.passages, (asked,))], segmenter, n_passages=2, most=1, seed=0)
    assert set(few.passages) == {own, bridge}, "what the question rests on comes before what it does not"
    unsaid = Question("q", (own,), "Where?", ("Rome",))
    assert not list(drawn([Group((own,), (unsaid,))], segmenter, n_passages=2, most=1, seed=0))


@pytest.fixture(scope="module")
def learned(world: Path, toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("learned") / "made"
    command = ["train", "relevance", "--out", out, "--data-dir", world, "--llm", toy_folder, "--reader", "none"]
    result = CliRunner().invoke(app, [*map(str, command), "--epochs", "4", "--width", "16", "--json"])
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


def test_it_learns_what_words_do_not_say(learned: tuple[Path, dict[str, Any]], toy_folder: Path) -> None:
    out, record = learned
    assert record["questions"] > 300 and record["held_out"] >= 5 and record["skipped"] == 0
    assert record["after"]["nll"] < 0.7 * record["before"]["nll"]
    assert record["after"]["recall@1"] > record["before"]["recall@1"]
    assert not (out / "states").exists()
    made = load_compressor(out, TargetLLM.from_pretrained(str(toy_folder)))
    assert made.interaction is not None and made.interaction.compressor == made.fingerprint == record["fingerprint"]
    sides = list(PAIRS)
    passages = [f"The keeper of the light counted {PAIRS[side]} ships in that year." for side in sides]
    library = ConceptLibrary(made, MemoryStore(made.spec.width), rate=1.0)
    library.ensure(passages)
    retrieved = [Retrieved(str(n), text, "", None, 4) for n, text in enumerate(passages)]

    def first(side: str, relevance: str) -> int:
        policy = BudgetedReadPolicy(relevance=relevance, weights=Weights(least=1.0, rank=0.0))
        found = PassageReading(library, policy, ReadBudget(positions=100)).read(f"What of the {side}?", retrieved, 30)
        [read] = [n for n, one in enumerate(found.passages) if not one.reading.left_out][:1]
        return read

    def likeliest(side: str) -> int:
        asked, found = question_states(library, f"What of the {side}?"), [library.fetch(text) for text in passages]
        states = [one.concepts for one in found if one.concepts is not None]
        words = word_shares(f"What of the {side}?", passages)
        assert made.interaction is not None
        return int(made.interaction(asked, states, [[(0, len(each))] for each in states], words).argmax())

    assert [first(side, "learned") for side in sides] == list(map(likeliest, sides))
    assert len({first(side, "learned") for side in sides}) > 1 == len({first(side, "bm25") for side in sides})


def test_a_run_that_was_interrupted_compresses_nothing_twice(
    world: Path, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[str]()

    def stopped(message: str, done: float | None) -> None:
        seen.append(message)
        if message.startswith("step 2 "):
            raise KeyboardInterrupt

    options: dict[str, Any] = {"reader": "none", "n_groups": 40, "epochs": 1.0, "width": 8}
    with pytest.raises(KeyboardInterrupt):
        train_relevance(tmp_path / "out", world, "auto", str(toy_folder), stopped, **options)
    assert any("passages compressed" in message for message in seen)
    made = list[int]()
    compress = ConceptLibrary._compress
    monkeypatch.setattr(
        ConceptLibrary, "_compress", lambda self, units, ks: made.append(len(units)) or compress(self, units, ks)
    )
    record = train_relevance(tmp_path / "out", world, "auto", str(toy_folder), lambda *_: None, **options)
    assert record["steps"] >= 2 and not made
    assert not (tmp_path / "out" / "states").exists()


def test_what_cannot_be_learned_from_is_refused(world: Path, toy_folder: Path, tmp_path: Path) -> None:
    toy.save(tmp_path / "llm")
    with pytest.raises(ConfigurationError, match="deep concepts alone"):
        train_relevance(
            tmp_path / "out", world, str(saved_input(tmp_path)), str(tmp_path / "llm"), lambda *_: None, reader="none"
        )
    (tmp_path / "data" / "train").mkdir(parents=True)
    row = {"id": "1", "title": "T1", "context": "Nothing.", "question": "What?", "answers": ["something else"]}
    (tmp_path / "data" / "train" / "a.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="no question is answered by the words"):
        train_relevance(tmp_path / "out", tmp_path / "data", "auto", str(toy_folder), lambda *_: None, reader="none")


def saved_input(folder: Path) -> Path:
    """A compressor at the input embeddings of the toy LLM saved in a folder."""
    llm = TargetLLM.from_pretrained(str(folder / "llm"))
    return trained(llm).save_pretrained(folder / "input")

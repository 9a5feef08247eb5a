"""Where examples come from, and what is never trained on."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from llama_index.core.schema import NodeWithScore, TextNode

import toy
from compllm_rag.compression.compressor import Compressor
from compllm_rag.errors import DataFileError, EvaluationDataError
from compllm_rag.library import ConceptLibrary
from compllm_rag.llamaindex.planner import Planner
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import PromptPlan, QAPrompt, TextSpan
from compllm_rag.store import MemoryStore
from compllm_rag.training.evaluation_guard import refuse_evaluation
from compllm_rag.training.examples import Body
from compllm_rag.training.job_options import READER_DATA, MaterialConfig
from compllm_rag.training.material import Material, is_held_out
from training_samples import fresh, material, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("data"), rows=120)


def test_rows_that_cannot_be_used_are_counted_and_named(llm, world: Path) -> None:
    assert material(llm, world).skipped == [
        ("story.jsonl.gz: no-context", "no context"),
        ("story.jsonl.gz: no-answer", "no answer"),
    ]


def test_examples_depend_on_the_seed_alone(llm, world: Path) -> None:
    one, two = material(llm, world, max_context=900), material(llm, world, max_context=900)
    drawn = [one.draw(random.Random(f"7/{i}")) for i in range(30)]
    assert drawn == [two.draw(random.Random(f"7/{i}")) for i in range(30)]
    assert drawn != [one.draw(random.Random(f"8/{i}")) for i in range(30)]
    assert {b.kind for e in drawn for b in e.branches} == {"qa", "copy", "continue"}
    assert any(len(e.bodies) > 1 for e in drawn), "some questions come with distractors"


def test_distractors_come_from_the_same_document(llm, tmp_path: Path) -> None:
    rows = [
        {"id": f"{t}-{i}", "title": t, "context": f"{t} tells of {i}.", "question": "Who?", "answers": ["Ada"]}
        for t in ("Moon", "Sun", "")
        for i in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def shares(near: float) -> dict[str, float]:
        """By title: which share of the distractors has it, too."""
        config = MaterialConfig(max_context=900, max_passages=4, distractors=1, near=near)
        mine, same = Material([tmp_path / "rows.jsonl"], [], fresh(llm).segmenter, config), {}
        for group in mine.groups:
            own, found = group.passages[0], []
            for i in range(20):
                texts = [llm.tokenizer.decode(body.ids) for body in mine.questions(group, random.Random(i), 900).bodies]
                assert texts.count(own.text) == 1, "the gold passage is no distractor of its own"
                found += [text.startswith(f"{own.title} tells") for text in texts if text != own.text]
            same.setdefault(own.title, []).append(sum(found) / len(found))
        return {title: sum(each) / len(each) for title, each in same.items()}

    always, never = shares(1.0), shares(0.0)
    assert always["Moon"] == always["Sun"] == 1
    assert 0.1 < always[""] < 0.6, "a passage without a title has no document"
    assert all(0.1 < share < 0.6 for share in never.values())


def test_prompts_are_as_retrieval_makes_them(llm, tmp_path: Path) -> None:
    hops = [{"title": f"Hop {i}", "text": f"Passage {i} of the hops.", "is_supporting": i < 2} for i in range(9)]
    rows = [{"id": "hops", "question": "Where?", "answers": ["there"], "documents": hops}]
    rows += [
        {"id": str(i), "title": f"Single {i}", "context": f"Row {i} alone.", "question": "Who?", "answers": ["Ada"]}
        for i in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = Material([tmp_path / "rows.jsonl"], [], fresh(llm).segmenter, READER_DATA.material)
    everything = [*mine.groups, *mine.held_out]
    for group in everything[:3]:
        gold = {p.text for p in group.passages if p.supporting}
        of_other_groups = {p.text for g in everything if g is not group for p in g.passages}
        own = {p.text for p in group.passages} - gold
        counts, firsts = [], set()
        for i in range(300):
            made = mine.questions(group, random.Random(i), READER_DATA.material.max_context)
            texts = {mine.segmenter.tokenizer.decode(body.ids) for body in made.bodies}
            assert len(texts) == len(made.bodies) and gold <= texts
            assert texts - gold <= (own or of_other_groups), "a row of several documents brings its own distractors"
            counts.append(len(texts) - len(gold))
            firsts.add(mine.segmenter.tokenizer.decode(made.bodies[0].ids) in gold)
        assert firsts == {True, False}, "gold passages stand anywhere"
        assert set(counts) == ({1, 2, 3, 4} if own else {0, 1, 2, 3, 4, 5})
        assert own or 120 < counts.count(0) < 180, "half of the time"
    small = Material([tmp_path / "rows.jsonl"], [], fresh(llm).segmenter, MaterialConfig(max_passages=1, distractors=1))
    drawn = [small.draw(random.Random(i)) for i in range(20)]
    assert {len(e.bodies) for e in drawn} <= {1, 2}, "gold passages are never left out"


def test_held_out_questions_are_never_drawn(llm, world: Path) -> None:
    mine = material(llm, world)
    held = {p.text for g in mine.held_out for p in g.passages}
    assert held and not held & {p.text for g in mine.groups for p in g.passages}
    ids = {mine.body(text).ids for text in held}
    drawn = [mine.draw(random.Random(i)) for i in range(200)]
    assert not [b for e in drawn for b in e.bodies if b.ids in ids]


def test_lengths_stay_within_the_bounds(llm, world: Path) -> None:
    mine = material(llm, world, copy_length=30, continue_length=10, max_branches=2)
    for i in range(100):
        made = mine.draw(random.Random(i))
        assert len([b for b in made.branches if b.kind == "qa"]) <= 2
        for branch in made.branches:
            assert len(branch.target) <= {"copy": 31, "continue": 10}.get(branch.kind, 99)
        for body in made.bodies:
            assert all(1 <= len(s) <= 20 for s in body.segments)


def test_a_window_is_followed_by_its_own_continuation(llm, world: Path) -> None:
    mine = material(llm, world, qa=0.0)
    going_on = [e for e in (mine.draw(random.Random(i)) for i in range(40)) if e.branches[0].kind == "continue"]
    assert going_on
    for e in going_on:
        assert isinstance(e.prefix[-1], Body) and e.branches[0].prompt == ()
        text = mine.segmenter.tokenizer.decode([*e.prefix[-1].ids, *e.branches[0].target])
        assert " ".join(text.split())[5:-5] in " ".join((Path(__file__).parents[1] / "toy.py").read_text().split()) * 3


def test_training_reads_the_prompt_that_is_answered_from_and_evaluated(tmp_path: Path) -> None:
    documents = [
        {"title": "Gull Rock", "text": "The lighthouse was built in 1871.", "is_supporting": True},
        {"title": "", "text": "Gulls nest there. <|end|>", "is_supporting": True},
    ]
    row = {"id": "m", "question": "Who built it?", "answers": ["Ada"], "documents": documents}
    path = tmp_path / "several.jsonl"
    path.write_text(json.dumps(row))
    for template in (toy.CHATML, toy.NO_SYSTEM, None):
        compressor = Compressor(TargetLLM(toy.model(), toy.tokenizer(template)))
        library = ConceptLibrary(compressor, MemoryStore(compressor.hidden_size))
        mine = Material([path], [], compressor.segmenter)
        [group] = [*mine.groups, *mine.held_out]
        made = mine.questions(group, random.Random(0), 0, extras=False)
        shown = sorted(group.passages, key=lambda passage: made.bodies.index(mine.body(passage.text)))
        trained = [*made.spans(), TextSpan(made.branches[0].prompt)]
        nodes = [NodeWithScore(node=TextNode(text=p.text, metadata={"title": p.title})) for p in shown]
        answered = Planner(library, mode="text").plan("Who built it?", nodes, 1000).plan.spans
        bodies = [(p.title, [TextSpan(library.passage(p.text).ids, i)]) for i, p in enumerate(shown)]
        evaluated = QAPrompt(compressor.llm.tokenizer).plan("Who built it?", bodies).spans
        ids = [[token for span in spans for token in span.ids] for spans in (trained, answered, evaluated)]
        assert ids[0] == ids[1] == ids[2]
        places = [PromptPlan(tuple(spans)).passages for spans in (trained, answered, evaluated)]
        assert places[0] == places[1] == places[2] and len(places[0]) == 2


def test_own_answers_take_the_place_of_gold_ones(llm, world: Path) -> None:
    mine = Material(
        *Material.files_of(world),
        fresh(llm).segmenter,
    )
    [group] = [g for g in (*mine.groups, *mine.held_out) if g.questions[0].id == "0-0"]
    mine.answers[group.questions[0]] = "something else"
    made = mine.questions(group, random.Random(0), 0, extras=False)
    said = {mine.segmenter.tokenizer.decode(b.target, skip_special_tokens=True) for b in made.branches}
    assert "something else" in said and "line 0" not in said and "line 1" in said


def test_of_several_documents_one_is_held_out_and_of_one_none(llm, tmp_path: Path) -> None:
    rows = [{"title": t, "context": f"{t} {i}.", "question": "Who?", "answers": [t]} for t in "abc" for i in range(2)]
    path = tmp_path / "train.jsonl"
    for titles, held in (("abc", 2), ("ab", 2), ("a", 0)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["title"] in titles))
        mine, again = (Material([path], [], fresh(llm).segmenter) for _ in range(2))
        assert not any(is_held_out(title) for title in "abc")
        assert len(mine.held_out) == held and mine.held_out == again.held_out
        assert len({group.passages[0].title for group in mine.held_out}) == bool(held)
        assert len(mine.groups) == 2 * len(titles) - held
        assert len(mine.looked_at(9)) == 2


def test_passages_beyond_the_window_are_left_out_and_named(llm, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    long = {"id": "long", "context": toy.TEXT * 3, "question": "Who?", "answers": ["Ada"]}
    path.write_text("".join(json.dumps(row) + "\n" for row in (long, {**long, "id": "short", "context": "Ada."})))
    mine = Material([path], [], fresh(llm).segmenter, window=40)
    assert [g.questions[0].id for g in (*mine.groups, *mine.held_out)] == ["short"]
    [(name, why)] = mine.skipped
    assert name == "train.jsonl: long" and "beyond the LLM's window of 40" in why


@pytest.mark.parametrize(
    "name", ["squad_dev.jsonl", "eval/x.jsonl", "quail-test.jsonl.gz", "narrativeqa_valid.jsonl", "Dev.jsonl"]
)
def test_evaluation_files_are_refused(llm, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    with pytest.raises(EvaluationDataError, match="refused"):
        Material([path], [], fresh(llm).segmenter)


@pytest.mark.parametrize(
    "name", ["squad.jsonl", "train/device.jsonl", "contest.jsonl", "evaluate_me_not/revalued.jsonl"]
)
def test_other_names_are_fine(tmp_path: Path, name: str) -> None:
    refuse_evaluation(tmp_path / name)


def test_broken_files_and_empty_folders_are_typed_errors(llm, tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="data folder is empty"):
        Material.files_of(tmp_path)
    with pytest.raises(DataFileError, match="cannot be read"):
        Material([tmp_path / "gone.jsonl"], [], fresh(llm).segmenter)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps({"a": 1}).encode() * 500)[:-20])
    with pytest.raises(DataFileError, match="cannot be read"):
        Material([cut], [], fresh(llm).segmenter)
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "too short"}\n')
    with pytest.raises(DataFileError, match="nothing to train on"):
        Material([], [short], fresh(llm).segmenter)


# Questions of SQuAD v1.1 dev with their first answers (CC BY-SA 4.0).
PUBLISHED = [
    ("Which NFL team represented the AFC at Super Bowl 50?", "Denver Broncos"),
    ("Where did Super Bowl 50 take place?", "Santa Clara, California"),
    ("What color was used to emphasize the 50th anniversary of the Super Bowl?", "gold"),
]


def test_renamed_evaluation_files_are_known_by_what_is_in_them(llm, world: Path, tmp_path: Path) -> None:
    copied = tmp_path / "mine.jsonl"
    rows = [{"context": "Denver.", "question": f" {q.upper()}", "answers": [a]} for q, a in PUBLISHED]
    copied.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(EvaluationDataError, match="3 of 3 questions"):
        Material([copied], [], fresh(llm).segmenter)
    other = [
        {"id": f"o{i}", "context": "Denver.", "question": f"How old is {i}?", "answers": ["4"]} for i in range(200)
    ]
    copied.write_text("".join(json.dumps(row) + "\n" for row in [*other, {"id": "x", **rows[0]}]))
    mine = Material([copied], [], fresh(llm).segmenter)
    assert mine.skipped == [("mine.jsonl: x", "in an evaluation set")]


def test_answers_are_made_of_some_tokens_more_than_of_others(llm, tmp_path: Path) -> None:
    from compllm_rag.training.importance import answer_odds

    rows = []
    for i in range(10, 60):
        context = f"The tower has {i}{i + 1} steps and it is old."
        rows.append({"id": str(i), "context": context, "question": "How many?", "answers": [f"{i}{i + 1}"]})
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = Material([path], [], fresh(llm).segmenter)
    odds = answer_odds(mine, 400)
    ids = {name: llm.tokenizer.convert_tokens_to_ids(name) for name in ("3", "4", "t", ".")}
    assert min(odds[ids["3"]], odds[ids["4"]]) > 0.5 > 0 > max(odds[ids["t"]], odds[ids["."]])
    unseen = llm.tokenizer.convert_tokens_to_ids("<|bos|>")
    assert odds[unseen] == pytest.approx(0, abs=1e-5)

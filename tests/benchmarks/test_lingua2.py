"""LLMLingua-2's recipe on a toy encoder: labels, whole words, exactly K tokens, training, resuming, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import toy
import toy_embedder
from benchmarks.rivals.base import LeftOutError
from benchmarks.rivals.trained.asked_words import asked_about, keywords, labels
from benchmarks.rivals.trained.fitting import Fit, HeldOut, Schedule
from benchmarks.rivals.trained.kept_words import kept_tokens, words_of
from benchmarks.rivals.trained.lingua2 import Lingua2, WordClassifier
from benchmarks.rivals.trained.row import Setup
from benchmarks.rivals.trained.rows import named
from compllm_rag.errors import ConfigurationError
from compllm_rag.prompt import TextSpan
from compllm_rag.training.examples import Body, Example

SENTENCES = [s.strip() for s in toy.TEXT.replace("\n", " ").split(". ") if s.strip()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Passages of two sentences; asked about is always the lamp."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "train").mkdir()
    rows = []
    for i in range(60):
        context = f"{SENTENCES[i % 5]}. Its lamp was number {i}. {SENTENCES[(i + 2) % 5]}."
        qas = [{"id": f"{i}-{j}", "question": "What were the numbers of lamps?", "answers": [f"{i}"]} for j in range(2)]
        rows.append({"id": str(i), "title": f"Page {i}", "context": context, "qas": qas})
    (folder / "train" / "lamps.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_embedder.save_sentence_transformer(tmp_path_factory.mktemp("embedder"), toy.TEXT)


@pytest.fixture(scope="module")
def setup(world: Path, embedder: Path) -> Setup:
    return Setup(toy.llm(layers=2), world, entry_layer=1, rank=4, embedder=str(embedder))


def made(setup: Setup, rate: float = 2.0) -> Lingua2:
    torch.manual_seed(0)
    row = named(f"lingua2@{rate:g}").make(setup)
    assert isinstance(row, Lingua2)
    return row


def test_words_of_questions_and_answers_are_labelled(tmp_path: Path) -> None:
    assert keywords("Who were the ladies' boxes' owners in 1871?") == {"lady", "boxe", "owner", "1871"}
    assert keywords("What is it that they do, and why?") == set()
    said = ["The", "lighthouse", '("Gull', 'Rock")', "stood", "42", "metres", "tall;", "its", "keepers", "rowed."]
    wanted = keywords("How many metres was the keeper's rock?") | keywords("42")
    assert [word for word, label in zip(said, labels(said, wanted), strict=True) if label] == [
        *('Rock")', "42", "metres", "keepers"),
    ]
    passage, other = "Ada built it.", "Tom rowed."
    documents = [
        {"title": "a", "text": passage, "is_supporting": True}, {"title": "b", "text": other, "is_supporting": False},
    ]  # fmt: skip
    rows = [
        {"id": "1", "question": "Who built it?", "answers": ["Ada"], "documents": documents},
        {"id": "2", "question": "Which tower?", "answers": ["Marsh", "Ada Marsh"], "documents": documents[:1]},
    ]
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    material = Setup(toy.llm(), tmp_path, 1, 4, "none").units
    found = asked_about(material)
    assert found == {material.body(passage).ids: {"built", "ada", "tower", "marsh"}}, "questions of both rows together"


def test_tokens_and_word_pieces_go_to_their_words(setup: Setup) -> None:
    tokenizer, encoder = setup.llm.tokenizer, WordClassifier(setup.embedder).tokenizer
    texts = [toy.TEXT[:300], " Two  blanks\n\nbefore\ttø 1871-72 [SEP]", "塔の lamp"]
    for text in texts:
        unit = tuple(setup.units.body(text).ids)
        chunk = words_of(unit, tokenizer, encoder)
        joined = ["" for _ in chunk.words]
        for token, word in zip(unit, chunk.of_tokens, strict=True):
            joined[word] += tokenizer.decode([token])
        shown = [word.strip() for word in joined]
        assert [w for w in shown if "\ufffd" not in w] == [w for w in chunk.words if w.isascii()]
        assert list(chunk.of_tokens) == sorted(chunk.of_tokens)
        for piece, word in zip(chunk.pieces, chunk.of_pieces, strict=True):
            said = encoder.convert_ids_to_tokens(piece).removeprefix("##")
            assert said == "[UNK]" or said in chunk.words[word].lower()
        assert encoder.sep_token_id not in chunk.pieces, "text is no special token"
    assert words_of(setup.units.body(texts[2]).ids, tokenizer, encoder).words == ("塔", "の", "lamp")
    # As a chunk of a longer text may be: cut into other tokens than it would be alone.
    unit = tuple(token for letter in "lighthouse on" for token in tokenizer.encode(letter, add_special_tokens=False))
    assert len(unit) == 13 > len(tokenizer.encode("lighthouse on", add_special_tokens=False))
    inside = words_of(unit, tokenizer, encoder)
    assert inside.words == ("lighthouse", "on") and inside.of_tokens == (0,) * 10 + (1,) * 3
    blank = tuple(tokenizer.encode("  \n", add_special_tokens=False))
    assert set(words_of(blank, tokenizer, encoder).of_tokens) == {0}


def test_words_stay_whole_and_in_order() -> None:
    of_tokens = [0, 1, 1, 1, 2, 3, 3]
    assert kept_tokens([0.1, 0.9, 0.5, 0.8], of_tokens, 5) == [1, 2, 3, 5, 6], "best first, in reading order"
    assert kept_tokens([0.1, 0.9, 0.5, 0.8], of_tokens, 4) == [1, 2, 3, 4], "the next that fits, not half a word"
    assert kept_tokens([0.1, 0.9, 0.5, 0.8], of_tokens, 2) == [5, 6]
    assert kept_tokens([0.5, 0.5, 0.5, 0.5], of_tokens, 1) == [0], "of equals the first"
    assert kept_tokens([0.5], [0, 0, 0], 2) == [0, 1], "a word of more tokens than there is room for is cut"
    for k in range(1, 8):
        assert len(kept_tokens([0.4, 0.3, 0.2, 0.1], of_tokens, k)) == k


@pytest.mark.parametrize("rate", [1.0, 2.0, 3.5])
def test_exactly_as_many_tokens_stay_as_the_rate_says(setup: Setup, rate: float) -> None:
    row, text = made(setup, rate), toy.TEXT * 2
    body = row.material.body(text)
    assert len(body.segments) > 1 and max(map(len, body.segments)) > 126, "more word pieces than the encoder reads"
    [span] = row.spans(text, 3)
    assert isinstance(span, TextSpan) and span.passage == 3 and len(span) == row.size(text)
    at = 0
    for unit, k, scores in zip(body.segments, row.counts(body), row.probabilities(body.segments), strict=True):
        assert k == -(-len(unit) // rate)
        kept, chunk = span.ids[at : at + k], row.words(unit)
        at += k
        places = kept_tokens(scores, chunk.of_tokens, k)
        assert kept == tuple(unit[place] for place in places) and all(0 < p < 1 for p in scores)
        held = {chunk.of_tokens[place] for place in places}
        cut = [word for word in held if any(o == word and i not in places for i, o in enumerate(chunk.of_tokens))]
        assert len(cut) <= 1, "all words but the last that came are whole"
    if rate == 1:
        assert span.ids == body.ids
        held_out = HeldOut(row, 2)
        assert held_out.look() == pytest.approx(held_out.text()["nll_text"]), "all words kept are the text"


def test_long_chunks_are_read_in_windows(setup: Setup) -> None:
    classifier = WordClassifier(setup.embedder)
    pieces = tuple(classifier.tokenizer(toy.TEXT * 2, verbose=False, add_special_tokens=False)["input_ids"])[:200]
    with torch.no_grad():
        long, short = classifier([pieces, pieces[:7]])
        halves = torch.cat(classifier([pieces[:100], pieces[100:]]))
        [alone] = classifier([pieces[:7]])
    assert long.shape == (200, 2) and torch.allclose(long, halves, atol=1e-5)
    assert torch.allclose(short, alone, atol=1e-5), "padding changes nothing"
    assert not any(p.requires_grad for n, p in classifier.named_parameters() if "pooler" in n)


def test_training_raises_what_is_asked_about(setup: Setup) -> None:
    row = made(setup)
    fit = Fit(row, Schedule(1.0, batch=2), Path("nowhere"), {}, lambda line: None)
    assert [group["times"] for group in fit._groups] == [pytest.approx(row.lr / 5e-4)], "a learning rate of its own"
    unit = row.material.body(f"{SENTENCES[0]}. Its lamp was number 7. {SENTENCES[3]}.").segments[0]
    marks = torch.tensor(labels(row.words(unit).words, keywords("number of lamps 7")), dtype=torch.bool)

    def margin() -> float:
        [scores] = row.probabilities([unit])
        found = torch.tensor(scores)
        return float(found[marks].mean() - found[~marks].mean())

    assert 2 <= int(marks.sum()) < len(marks) / 2 and abs(margin()) < 0.1
    optimizer = torch.optim.Adam(row.learned().values(), lr=3e-3)
    for step in range(15):
        optimizer.zero_grad()
        row.loss(fit.examples(step)).total.backward()
        optimizer.step()
    assert margin() > 0.2
    kept = kept_tokens(row.probabilities([unit])[0], row.words(unit).of_tokens, len(unit) // 2)
    held = {row.words(unit).of_tokens[place] for place in kept}
    assert set(marks.nonzero()[:, 0].tolist()) <= held


def test_passages_that_nobody_asks_about_teach_nothing(setup: Setup) -> None:
    row = made(setup)
    example = Example((TextSpan(setup.opening), Body(((5, 6, 7),))), ())
    total = row.loss([example]).total
    total.backward()
    assert float(total.detach()) == 0
    assert all(p.grad is None or not p.grad.any() for p in row.learned().values())


def test_a_run_goes_on_where_it_stood(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit() -> Fit:
        schedule = Schedule(0.01, batch=1, looks=2, validation=2)
        return Fit(made(setup), schedule, tmp_path / "lingua2@2", {"rank": 4}, lambda line: None)

    begun = fit()
    found = begun.go()
    assert found["steps"] > 2 and found["learned"] == sum(p.numel() for p in begun.weights.values()) > 0
    assert len(found["curve"]) >= 3 and (tmp_path / "lingua2@2" / "weights.safetensors").exists()
    again = fit()
    text = toy.TEXT[:400]
    assert again.row.spans(text, 0) == begun.row.spans(text, 0) and again.go() == found
    monkeypatch.setattr(Lingua2, "lr", 1e-3)
    with pytest.raises(ConfigurationError, match=r"other settings: got row_lr 0.001, expected row_lr 0.0001"):
        fit()


def test_an_embedder_that_cannot_be_trained_is_left_out(world: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer, models

    static = StaticEmbedding(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), embedding_dim=4)
    SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path / "static"))
    (tmp_path / "static" / "config.json").write_text("{}", encoding="utf-8")
    setup = Setup(toy.llm(), world, 1, 4, str(tmp_path / "static"))
    with pytest.raises(LeftOutError, match=r"cannot be trained to classify words: .*StaticEmbedding.*lingua2"):
        made(setup)
    with pytest.raises(ConfigurationError, match="unknown row"):
        named("lingua2@7")

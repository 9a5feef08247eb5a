"""Learning which sentence answers a question: late interaction over frozen states, minutes on one core.

Training questions come over four passages each (`compllm_rag.training.gold_sentences`), which are compressed once and
kept on disk, so that a run that was interrupted compresses nothing twice. What is learned is the projections of
`LateInteraction`, by the negative log-likelihood of the sentences that say the answer among all sentences of the
prompt. Of held-out questions the probability, and how often such a sentence comes first, are told.
"""

from __future__ import annotations

import copy
import itertools
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.late_interaction import LateInteraction
from compllm_rag.compression.loading import AUTO
from compllm_rag.errors import ConfigurationError
from compllm_rag.library import ConceptLibrary
from compllm_rag.reading.sentences import sentence_bounds, word_shares
from compllm_rag.reading.states import question_states
from compllm_rag.store.disk import DiskStore
from compllm_rag.store.encodings import deep_encoding
from compllm_rag.training.deep_source import deep_source
from compllm_rag.training.gold_sentences import Sought, drawn
from compllm_rag.training.job_options import DEEP_DATA
from compllm_rag.training.material import Material
from compllm_rag.training.run_config import Progress

_BATCH, _WARMUP, _CLIP = 16, 30, 1.0
_LR, _DECAY, _DROPOUT = 1e-3, 0.05, 0.2
_PASSAGES, _OF_A_GROUP = 4, 5
_SAMPLE = 600  # passages that means and spreads are taken from
_AT_ONCE = 64  # passages compressed between two signs of life


@dataclass(frozen=True)
class Row:
    """A question with what is compared.

    Attributes:
        question: States (n_tokens, hidden_size).
        passages: Number of each passage.
        bounds: Of each passage, the first state of each sentence and the one behind its last.
        words: BM25 of each sentence, of all passages in a row, the best 1.
        gold: Numbers of the sentences that say the answer, in that row.
    """

    question: torch.Tensor
    passages: tuple[int, ...]
    bounds: tuple[tuple[tuple[int, int], ...], ...]
    words: tuple[float, ...]
    gold: tuple[int, ...]


def train_relevance(
    out: Path,
    data_dir: Path,
    init: str,
    llm: str,
    progress: Progress,
    *,
    reader: str = AUTO,
    n_groups: int = 2000,
    epochs: float = 2.0,
    width: int = 64,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Give a compressor of deep concepts a learned relevance; its concepts and its fingerprint stay the same.

    Args:
        out: Where `load_compressor` will find it; may be the folder it comes from. States are kept in `states` there
            until it is done.
        data_dir: Holds `train/*.jsonl(.gz)` with questions.
        init: Folder of the compressor; `auto` takes the shipped one, or an untrained one.
        llm: Its target LLM.
        progress: Called with a message and the share that is done.
        reader: Folder of the reader it was made with, "auto" for the shipped one, "none" for the LLM as it is.
        n_groups: Groups of questions that share their passages to learn from, at most.
        epochs: How often each question is seen.
        width: Of what states are projected to.
        seed: Of the choice, the order and the first weights.
        dtype: Of the LLM.
        device: A torch device, of the LLM alone.

    Returns:
        What was done, as plain values.

    Raises:
        ConfigurationError: `init` is no compressor of deep concepts, or there is nothing to learn from.
        DataFileError, EvaluationDataError: See `Material`.
        FingerprintMismatchError, UnknownModelError: See `load_compressor_for`.
    """
    questions, _ = Material.files_of(data_dir)
    compressor = deep_source(
        llm,
        init,
        reader,
        refusal="relevance is learned of deep concepts alone",
        instead="take relevance bm25",
        dtype=dtype,
        device=device,
        progress=progress,
    )
    material = Material(questions, [], compressor.segmenter, DEEP_DATA.material)
    groups = random.Random(seed).sample(material.groups, min(n_groups, len(material.groups)))
    options = {"n_passages": _PASSAGES, "most": _OF_A_GROUP, "seed": seed}
    learned = list(drawn(groups, compressor.segmenter, **options))
    held = list(drawn(material.held_out, compressor.segmenter, **options))
    if not learned or not held:
        raise ConfigurationError(
            "no question is answered by the words of a passage",
            got=f"{len(learned)} questions to learn from, {len(held)} held out",
            expected="questions whose answer stands in a passage they rest on, some of them held out",
            next_step="name other data",
        )
    texts = list(dict.fromkeys(passage.text for one in (*learned, *held) for passage in one.passages))
    library = _compressed(compressor, texts, out / "states", progress)
    passages = [library.fetch(text, missing="error") for text in texts]
    states = [_there(found.concepts) for found in passages]
    numbers = {text: number for number, text in enumerate(texts)}
    places = [_there(found.places) for found in passages]
    rows = [_rows(library, kind, numbers, places, progress) for kind in (learned, held)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = LateInteraction(compressor.spec.hidden_size, width)
    sample = random.Random(seed).sample(states, min(_SAMPLE, len(states)))
    made.standardise(torch.cat([row.question for row in rows[0]]), torch.cat([each.float() for each in sample]))
    told = fit(made, rows[0], rows[1], states, epochs=epochs, seed=seed, progress=progress)
    made.compressor, made.questions = compressor.refresh_fingerprint(), len(rows[0])
    compressor.interaction = made
    compressor.save_pretrained(out)
    library.store.close()
    shutil.rmtree(out / "states")
    return {
        "out": str(out),
        "questions": len(rows[0]),
        "held_out": len(rows[1]),
        "passages": len(texts),
        **told,
        "fingerprint": compressor.fingerprint,
        "skipped": len(material.skipped),
    }


def fit(
    made: LateInteraction,
    rows: Sequence[Row],
    held: Sequence[Row],
    states: Sequence[torch.Tensor],
    *,
    epochs: float,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Learn from rows; the weights that held-out rows find likeliest stay.

    Args:
        made: Learned in place; standardised before.
        rows: Learned from.
        held: Looked at after each half of an epoch, and before the first.
        states: Of each passage (n_concepts, hidden_size).
        epochs: How often each row is seen.
        seed: Of the order and of what dropout leaves out.
        progress: Called with a message and the share that is done.

    Returns:
        Steps, and of held-out rows before and after: the mean negative log-likelihood of a sentence that says the
        answer, in nats, and the shares where one is first, and among the first two.
    """
    steps = max(1, round(epochs * len(rows) / _BATCH))
    optimizer = torch.optim.AdamW(made.parameters(), lr=_LR, weight_decay=_DECAY)
    rng, order = random.Random(seed), list[int]()
    every = max(1, len(rows) // (2 * _BATCH))
    before = found = best = looked_at(made, held, states)
    weights = copy.deepcopy(made.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = _LR * min(1.0, (step + 1) / _WARMUP) * (1 - step / steps)
            while len(order) < _BATCH:
                order += rng.sample(range(len(rows)), len(rows))
            batch, order = order[:_BATCH], order[_BATCH:]
            loss = torch.stack([_nll(made, rows[i], states, _DROPOUT) for i in batch]).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(made.parameters(), _CLIP)
            optimizer.step()
            if (step + 1) % every == 0 or step + 1 == steps:
                found = looked_at(made, held, states)
                if found["nll"] < best["nll"]:
                    best, weights = found, copy.deepcopy(made.state_dict())
            progress(f"step {step + 1} of {steps}, held-out NLL {found['nll']:.3f}", (step + 1) / steps)
    made.load_state_dict(weights)
    made.requires_grad_(False).eval()
    return {"steps": steps, "before": before, "after": best}


@torch.inference_mode()
def looked_at(made: LateInteraction, rows: Sequence[Row], states: Sequence[torch.Tensor]) -> dict[str, float]:
    """How well rows are judged; see `fit`."""
    nll, hits = 0.0, [0, 0]
    for row in rows:
        scores = _scores(made, row, states, 0.0)
        nll += float(scores.logsumexp(0) - scores[list(row.gold)].logsumexp(0)) / len(rows)
        ordered = scores.argsort(descending=True).tolist()
        for k in range(len(hits)):
            hits[k] += bool(set(ordered[: k + 1]) & set(row.gold))
    return {"nll": nll, **{f"recall@{k + 1}": hit / len(rows) for k, hit in enumerate(hits)}}


def _nll(made: LateInteraction, row: Row, states: Sequence[torch.Tensor], dropout: float) -> torch.Tensor:
    scores = _scores(made, row, states, dropout)  # (n_sentences,)
    return scores.logsumexp(0) - scores[list(row.gold)].logsumexp(0)


def _scores(made: LateInteraction, row: Row, states: Sequence[torch.Tensor], dropout: float) -> torch.Tensor:
    passages = [states[number] for number in row.passages]
    out: torch.Tensor = made(row.question, passages, row.bounds, row.words, dropout=dropout)
    return out


def _compressed(compressor: DeepCompressor, texts: Sequence[str], folder: Path, progress: Progress) -> ConceptLibrary:
    """Concepts of all texts at rate 1, found again where a run was interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    store = DiskStore(folder, hidden_size=compressor.spec.width, encoding=deep_encoding("int8"))
    library = ConceptLibrary(compressor, store, rate=1.0)
    for at in range(0, len(texts), _AT_ONCE):
        library.ensure(texts[at : at + _AT_ONCE])
        store.flush()
        done = min(len(texts), at + _AT_ONCE)
        progress(f"{done} of {len(texts)} passages compressed", done / len(texts))
    return library


def _rows(
    library: ConceptLibrary,
    questions: Sequence[Sought],
    numbers: dict[str, int],
    places: Sequence[torch.Tensor],
    progress: Progress,
) -> list[Row]:
    """Questions with their states, and where each sentence lies among those of its passage."""
    out = list[Row]()
    for done, one in enumerate(questions, 1):
        passages = tuple(numbers[passage.text] for passage in one.passages)
        bounds = tuple(
            sentence_bounds(places[number], sentences)
            for number, sentences in zip(passages, one.sentences, strict=True)
        )
        firsts = [0, *itertools.accumulate(map(len, one.sentences))]
        asked = question_states(library, one.question)
        if len(asked):
            words = word_shares(one.question, [s.text for row in one.sentences for s in row])
            out.append(Row(asked, passages, bounds, words, tuple(firsts[p] + s for p, s in sorted(one.gold))))
        progress(f"{done} of {len(questions)} questions read", done / len(questions))
    return out


def _there(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise ConfigurationError("a passage has no states", next_step="report this: training keeps all of them")
    return tensor

"""Words kept by a trained token classifier, read as text, after LLMLingua-2 (arXiv 2403.12968, sections 3 and 4).

An encoder that reads to both sides, with a linear layer of two classes on its last states, learns by plain
cross-entropy which words of a passage to keep. At use, words are ranked by the probability to be kept, the mean over
their word pieces, and the best ones stay, in their order, as ordinary text in front of the frozen LLM: no question is
known then, and nothing of the LLM is trained.

Unlike the paper: the encoder is the retrieval embedder (MiniLM, 22 million weights) and not XLM-RoBERTa or multilingual
BERT; labels come from training questions and answers and not from GPT-4's compressions (`asked_words`); words are kept
until exactly K of the LLM's tokens are, chunk by chunk, where the paper keeps a share of the words. About one word in
six is worth keeping; as in the paper nothing is done about that, for it moves the probabilities and not their order.
All weights are trained, as there, at ten times the paper's learning rate, which is for ten epochs, not for minutes.
Dropout is left out, since there is hardly time to see a passage twice. A step takes the same few examples as those of
other rows, and of these the passages that questions are asked about.

The original tokens of kept words stay: made text and tokenised again, they could be more or fewer than K.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.rivals.base import LeftOutError
from benchmarks.rivals.trained.about import ENCODER_LR
from benchmarks.rivals.trained.asked_words import asked_about, labels
from benchmarks.rivals.trained.kept_words import ChunkWords, kept_tokens, words_of
from benchmarks.rivals.trained.row import Cost, Row, Setup
from compllm_rag.models import resolve_model
from compllm_rag.models.quiet import quiet_transformers
from compllm_rag.prompt import Span, TextSpan
from compllm_rag.training.examples import Body, Example
from compllm_rag.training.objective import Loss

# Chunks whose words are remembered: what an epoch of a few minutes meets again, and the held-out ones.
_REMEMBERED = 4096
_KEEP = 1  # the class of words to be kept


class WordClassifier(nn.Module):
    """A retrieval embedder of one's own, to be trained, with two classes for each of its word pieces.

    Args:
        spec: Alias, local folder, or `org/name@revision`.

    Raises:
        LeftOutError: The embedder has no encoder with a fast tokenizer that could be trained.
        ModelFetchError, UnknownModelError: See `resolve_model`.
    """

    def __init__(self, spec: str) -> None:
        super().__init__()
        from sentence_transformers import SentenceTransformer

        with quiet_transformers():
            model: Any = SentenceTransformer(str(resolve_model(spec).path), device="cpu", trust_remote_code=False)
        encoder, tokenizer = getattr(model[0], "auto_model", None), getattr(model[0], "tokenizer", None)
        if encoder is None or not getattr(tokenizer, "is_fast", False):
            raise LeftOutError(
                "this embedder cannot be trained to classify words",
                got=f"{spec}, {type(model[0]).__name__}",
                expected="an encoder of transformers with a fast tokenizer",
                next_step="name another --embedder, or leave lingua2 out of --rows",
            )
        self.tokenizer: Any = tokenizer
        self.encoder: Any = encoder.float().requires_grad_(True).eval()
        for name, parameter in self.encoder.named_parameters():
            parameter.requires_grad_("pooler" not in name)  # reads the states, and is not read
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)
        self._most = int(model[0].max_seq_length or self.encoder.config.max_position_embeddings) - 2

    def forward(self, chunks: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Scores (n_pieces, 2) of each chunk's word pieces.

        What is longer than the encoder reads is read in even windows.

        Args:
            chunks: Ids of word pieces, special ones left out; at least one chunk.
        """
        windows = [window for chunk in chunks for window in _windows(chunk, self._most)]
        begin, end = ([i] if i is not None else [] for i in (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id))
        rows = [torch.tensor([*begin, *window, *end]) for window in windows]
        device = self.head.weight.device
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]  # (n_windows, longest)
        states = self.encoder(input_ids=ids.to(device), attention_mask=mask.long().to(device)).last_hidden_state
        inner = [
            row[len(begin) : len(begin) + len(window)] for row, window in zip(states, windows, strict=True)
        ]  # (n_pieces, width) each
        return list(torch.split(self.head(torch.cat(inner)), [len(chunk) for chunk in chunks]))


class Lingua2(Row):
    """Kept words as text; see the module."""

    lr = ENCODER_LR

    def __init__(self, setup: Setup, rate: float) -> None:
        super().__init__(setup, rate)
        self.classifier = WordClassifier(setup.embedder).to(self.llm.device)
        self.module = self.classifier
        self.words = functools.lru_cache(_REMEMBERED)(self._words)
        self._asked = asked_about(self.material)

    def _words(self, unit: tuple[int, ...]) -> ChunkWords:
        return words_of(unit, self.llm.tokenizer, self.classifier.tokenizer)

    @torch.no_grad()
    def probabilities(self, units: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """How likely each word of each chunk is to be kept; 0 for a word that the encoder's tokenizer leaves out."""
        chunks = [self.words(unit) for unit in units]
        out = []
        for chunk, scores in zip(chunks, self.classifier([chunk.pieces for chunk in chunks]), strict=True):
            owners = torch.tensor(chunk.of_pieces, dtype=torch.long)  # (n_pieces,)
            kept = scores.softmax(-1)[:, _KEEP].cpu()  # (n_pieces,)
            total, n = torch.zeros(2, len(chunk.words))
            total.index_add_(0, owners, kept)
            n.index_add_(0, owners, torch.ones(len(owners)))
            out.append((total / n.clamp_min(1)).tolist())
        return out

    def kept(self, bodies: Sequence[Body]) -> list[tuple[int, ...]]:
        """The token ids that stay of each passage, K of each chunk."""
        units = [unit for body in bodies for unit in body.segments]
        found = iter(self.probabilities(units) if units else [])
        out = []
        for body in bodies:
            ids = list[int]()
            for unit, k in zip(body.segments, self.counts(body), strict=True):
                ids += [unit[place] for place in kept_tokens(next(found), self.words(unit).of_tokens, k)]
            out.append(tuple(ids))
        return out

    def concepts(self, examples: Sequence[Example]) -> list[list[TextSpan]]:
        """The text that stands for every passage; see `Row.concepts`."""
        kept = iter(self.kept([body for example in examples for body in example.bodies]))
        return [[TextSpan(next(kept), number) for number in range(len(example.bodies))] for example in examples]

    def loss(self, examples: Sequence[Example]) -> Loss:
        """Cross-entropy over the word pieces of the passages that questions are asked about; the LLM is not read."""
        asked = [(body, self._asked[body.ids]) for e in examples for body in e.bodies if body.ids in self._asked]
        chunks = [(self.words(unit), wanted) for body, wanted in asked for unit in body.segments]
        if not chunks:
            total = self.classifier.head.weight.sum() * 0
        else:
            targets = list[int]()
            for chunk, wanted in chunks:
                marks = labels(chunk.words, wanted)
                targets += [marks[word] for word in chunk.of_pieces]
            scores = torch.cat(self.classifier([chunk.pieces for chunk, _ in chunks]))  # (n_pieces, 2)
            total = F.cross_entropy(scores, torch.tensor(targets, device=scores.device))
        return Loss(total, {"loss": float(total.detach())})

    def spans(self, text: str, passage: int) -> list[Span]:
        """See `Row.spans`."""
        [ids] = self.kept([self.material.body(text)])
        return [TextSpan(ids, passage)]

    def cost(self, achieved_rate: float) -> Cost:
        """A kept token costs what a token of text does; its id is stored, as that of text is, and no number besides."""
        return Cost(1 / achieved_rate, 1 / achieved_rate, 1 / achieved_rate, 0.0)


def _windows(pieces: Sequence[int], most: int) -> list[Sequence[int]]:
    """A chunk in the fewest even windows of at most `most` word pieces."""
    n = max(1, math.ceil(len(pieces) / most))
    return [pieces[begin:end] for begin, end in pairwise(len(pieces) * i // n for i in range(n + 1))]

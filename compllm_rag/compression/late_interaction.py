"""Learned late interaction: which sentence answers a question, by its stored concepts and the question's states.

ColBERT (Khattab and Zaharia, SIGIR 2020, section 3) projects the token embeddings of questions and passages and scores
a passage by the sum, over the question's tokens, of the largest cosine to any of its own. Here the embeddings are
states in front of the entry layer L: a storage of deep concepts has them of every passage, a question has them after
one pass of the lower half. Beyond ColBERT, tokens of a question count by a learned weight, sentences are scored in
place of passages, and what BM25 says of a sentence is added with a weight of its own. Learned are two projections and a
few numbers, on frozen states (`compllm-rag train relevance`): it lies beside a compressor, and is no part of what
concepts are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from compllm_rag.errors import UnsupportedFormatError
from compllm_rag.fingerprint import tensor_digest

RELEVANCE_FILE = "relevance.safetensors"
_FORMAT = "1"
# What the largest cosine is multiplied by, and what the best sentence by BM25 gets, before anything is learned.
_SHARPNESS, _WORDS = 10.0, 4.0
_TEXTS = ("compressor", "questions")  # what the file says beside its tensors


class LateInteraction(nn.Module):
    """Scores sentences of retrieved passages by a question.

    Args:
        hidden_size: Of states.
        width: Of what they are projected to.

    Attributes:
        compressor: Fingerprint of the compressor whose concepts it was learned from.
        questions: How many questions it was learned from.
    """

    question_mean: torch.Tensor
    question_spread: torch.Tensor
    passage_mean: torch.Tensor
    passage_spread: torch.Tensor

    def __init__(self, hidden_size: int, width: int = 64) -> None:
        super().__init__()
        self.question, self.passage = nn.Linear(hidden_size, width), nn.Linear(hidden_size, width)
        self.attention = nn.Linear(hidden_size, 1)
        self.sharpness, self.words = nn.Parameter(torch.tensor(_SHARPNESS)), nn.Parameter(torch.tensor(_WORDS))
        self.whole = nn.Parameter(torch.tensor(0.3))
        for name in ("question", "passage"):
            self.register_buffer(f"{name}_mean", torch.zeros(hidden_size))
            self.register_buffer(f"{name}_spread", torch.ones(hidden_size))
        self.compressor, self.questions = "", 0

    @property
    def hidden_size(self) -> int:
        """Of the states it compares."""
        return self.question.in_features

    def standardise(self, questions: torch.Tensor, passages: torch.Tensor) -> None:
        """Take means and standard deviations of states, which differ a hundredfold between dimensions, from a sample.

        Args:
            questions: (n_tokens, hidden_size).
            passages: (n_tokens, hidden_size).
        """
        for name, states in (("question", questions), ("passage", passages)):
            spread, mean = torch.std_mean(states.float(), 0)  # (hidden_size,) each
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_spread").copy_(spread.clamp_min(1e-3 * float(spread.median())))

    def forward(
        self,
        question: torch.Tensor,
        passages: Sequence[torch.Tensor],
        sentences: Sequence[Sequence[tuple[int, int]]],
        words: Sequence[float],
        *,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        """How much speaks for each sentence, in nats: after a softmax, the probability that it says the answer.

        Args:
            question: States (n_tokens, hidden_size), at least one.
            passages: States (n_concepts, hidden_size) of each passage.
            sentences: Of each passage, the first of its states that belongs to each sentence, and the one behind its
                last.
            words: What BM25 says of each sentence, of all passages in a row, the best 1.
            dropout: Share of dimensions of the states that are left out, in training.

        Returns:
            (n_sentences,), of all passages in a row. A sentence without a state counts as one that is as far from the
            question as can be.
        """
        if not passages:
            return self.words.new_zeros(0)
        asked = (question.float() - self.question_mean) / self.question_spread  # (n_tokens, hidden_size)
        every = torch.cat(list(passages)).float()  # (n_concepts of all, hidden_size)
        found = (every - self.passage_mean) / self.passage_spread
        if dropout:
            asked, found = F.dropout(asked, dropout), F.dropout(found, dropout)
        weights = torch.softmax(self.attention(asked)[:, 0], 0)  # (n_tokens,)
        left = F.normalize(self.question(asked), dim=-1)  # (n_tokens, width)
        right = F.normalize(self.passage(found), dim=-1)  # (n_concepts of all, width)
        near = left @ right.T  # (n_tokens, n_concepts of all), cosines
        rows, first = list[torch.Tensor](), 0
        for states, bounds in zip(passages, sentences, strict=True):
            own = [near[:, first + start : first + end] for start, end in bounds]
            scores = [(weights * each.amax(1)).sum() if each.shape[1] else near.new_tensor(-1.0) for each in own]
            first += len(states)
            if scores:
                row = self.sharpness * torch.stack(scores)  # (n_sentences of the passage,)
                rows.append(row + self.whole * row.logsumexp(0))
        said = torch.tensor(list(words), dtype=near.dtype, device=near.device)  # (n_sentences,)
        return (torch.cat(rows) if rows else near.new_zeros(0)) + self.words * said

    @property
    def identity(self) -> str:
        """SHA-256 of what was learned, for journals that keep what was read by it."""
        return tensor_digest({name: tensor.cpu().numpy() for name, tensor in self.state_dict().items()})

    def beside(self, fingerprint: str) -> LateInteraction:
        """The same weights beside another compressor, whose states they are taken to fit as well."""
        made = copy.copy(self)
        made.compressor = fingerprint
        return made

    def save(self, folder: Path) -> None:
        """Write it beside a compressor."""
        named = {"format_version": _FORMAT, **{name: str(getattr(self, name)) for name in _TEXTS}}
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, folder / RELEVANCE_FILE, named
        )

    @classmethod
    def load(cls, folder: Path) -> LateInteraction | None:
        """The one that lies beside a compressor; None where none was learned.

        Raises:
            UnsupportedFormatError: It is damaged, or of a newer release.
        """
        path = folder / RELEVANCE_FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                named = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            if named.get("format_version") != _FORMAT:
                raise ValueError("another format")
            width, hidden_size = state["question.weight"].shape
            made = cls(hidden_size, width)
            made.load_state_dict(state)
            made.compressor, made.questions = named["compressor"], int(named["questions"])
            if not all(math.isfinite(float(tensor.abs().sum())) for tensor in state.values()):
                raise ValueError("numbers that are none")
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise UnsupportedFormatError(
                "this is no learned relevance that this release reads",
                got=f"{path} ({type(error).__name__})",
                expected="a file that `compllm-rag train relevance` wrote",
                next_step="learn it again, or remove it",
            ) from error
        return made.requires_grad_(False).eval()


def interaction_of(made: LateInteraction | None, fingerprint: str, hidden_size: int) -> LateInteraction | str:
    """What lies beside a compressor, if it is of use; or why it is not, in plain words.

    Args:
        made: What lies there; None for nothing.
        fingerprint: Of the compressor.
        hidden_size: Of its states.
    """
    if made is None:
        return "no relevance is learned for this compressor"
    if made.compressor != fingerprint or made.hidden_size != hidden_size:
        return "the relevance beside this compressor was learned for another one"
    return made

"""The objective: the LLM with concepts in front should do what it does with the text in front.

CompLLM (arXiv 2509.19228, section 3) matches, layer by layer, the frozen LLM's hidden states at the answer tokens with
a smooth-L1 loss, each layer in units of its own standard deviation. Ours adds the KL divergence of the output
distribution, cross-entropy on the target tokens, and the tokens of the question as further places to match, which cost
nothing; each part can be switched off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from compllm_rag.models.llm import TargetLLM, decoder_of
from compllm_rag.training.examples import Packed, Targets
from compllm_rag.training.job_options import ObjectiveConfig


@dataclass(frozen=True)
class Loss:
    """The loss to minimise and its parts, detached."""

    total: torch.Tensor
    parts: dict[str, float]


def hidden_states(llm: TargetLLM, packed: Packed, model: Any = None) -> list[torch.Tensor]:
    """Hidden states (n_predictions, hidden_size) behind every layer of the LLM, or of its upper half, `model`.

    The last one is after the final norm.
    """
    states = decoder_of(llm.model if model is None else model)(
        inputs_embeds=packed.inputs_embeds,
        attention_mask=packed.attention_mask,
        position_ids=packed.position_ids,
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    return [_picked(state, packed) for state in states[1:]]


def last_hidden_state(llm: TargetLLM, packed: Packed, model: Any = None) -> torch.Tensor:
    """Hidden states (n_predictions, hidden_size) after the final norm, of the LLM or of its upper half, `model`."""
    state: torch.Tensor = decoder_of(llm.model if model is None else model)(
        inputs_embeds=packed.inputs_embeds,
        attention_mask=packed.attention_mask,
        position_ids=packed.position_ids,
        use_cache=False,
    ).last_hidden_state
    return _picked(state, packed)


def _picked(state: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Rows of (batch, seq_len, hidden_size) where something is predicted; their gradient adds up in parallel."""
    return state.flatten(0, 1).index_select(0, packed.rows * state.shape[1] + packed.columns)


def log_probabilities(llm: TargetLLM, hidden: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (n_predictions, vocab_size) in float32."""
    logits = llm.model.get_output_embeddings()(hidden).float()  # (n_predictions, vocab_size)
    cap = getattr(llm.model.config.get_text_config(), "final_logit_softcapping", None)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    logp: torch.Tensor = logits.log_softmax(-1)
    return logp


def distillation_loss(
    llm: TargetLLM,
    teacher: Sequence[torch.Tensor],
    student: Sequence[torch.Tensor],
    targets: Targets,
    config: ObjectiveConfig,
) -> Loss:
    """The compressor's loss.

    Args:
        llm: The frozen target.
        teacher: Hidden states with text in front, see `hidden_states`; without gradient.
        student: The same with concepts in front.
        targets: What is predicted there.
        config: Weights of the parts.
    """
    total = torch.zeros((), device=targets.weights.device)
    parts: dict[str, float] = {}
    if config.hidden:
        distance = torch.zeros((), device=total.device)
        for theirs, ours in zip(teacher, student, strict=True):
            unit = theirs.float().std().clamp_min(1e-6)  # one number a layer
            gap = F.smooth_l1_loss(ours.float() / unit, theirs.float() / unit, reduction="none")  # as they
            distance = distance + (gap.mean(-1) * targets.weights).sum()
        distance = distance / len(teacher)
        parts["hidden"] = float(distance.detach())
        total = total + config.hidden * distance
    if config.kl or config.ce:
        ours = log_probabilities(llm, student[-1])  # (n_predictions, vocab_size)
        with torch.no_grad():
            theirs = log_probabilities(llm, teacher[-1])
        kl = (F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1) * targets.weights).sum()
        answer = targets.weights * targets.is_answer  # (n_predictions,)
        ce = -(ours.gather(1, targets.ids[:, None])[:, 0] * answer).sum()
        parts |= {"kl": float(kl.detach()), "ce": float(ce.detach())}
        total = total + config.kl * kl + config.ce * ce
    parts["loss"] = float(total.detach())
    return Loss(total, parts)


def answer_loss(llm: TargetLLM, hidden: torch.Tensor, targets: Targets) -> torch.Tensor:
    """The reader's loss: cross-entropy on the answer tokens, weighted by branch."""
    logp = log_probabilities(llm, hidden).gather(1, targets.ids[:, None])[:, 0]
    loss: torch.Tensor = -(logp * targets.weights * targets.is_answer).sum()
    return loss


def nll_by_kind(llm: TargetLLM, hidden: torch.Tensor, targets: Targets) -> dict[str, tuple[float, int]]:
    """Sum of the negative log-likelihood of the answers in nats, and their tokens, for each kind of branch."""
    logp: Any = log_probabilities(llm, hidden).gather(1, targets.ids[:, None])[:, 0]
    out: dict[str, tuple[float, int]] = {}
    for kind, where in targets.kinds:
        total, tokens = out.get(kind, (0.0, 0))
        out[kind] = (total - float(logp[where].sum()), tokens + (where.stop - where.start))
    return out

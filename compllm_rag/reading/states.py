"""States in front of the entry layer, of a question and of the passages that were retrieved for it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from compllm_rag.errors import ConfigurationError
from compllm_rag.library import ConceptLibrary
from compllm_rag.models.halves import Halves
from compllm_rag.models.plaintext import encode_plain
from compllm_rag.reading.choice import Candidate, PassageStates
from compllm_rag.unicode_text import whole

_LOCK = threading.Lock()
_OPENINGS: WeakKeyDictionary[Halves, dict[tuple[int, ...], Any]] = WeakKeyDictionary()


def refuse_without_states(library: ConceptLibrary) -> None:
    """Refuse what compares states where there are none.

    Raises:
        ConfigurationError: Concepts of the library enter at the input embeddings.
    """
    if library.halves is None or not library.spec.config.deep:
        raise ConfigurationError(
            "max-sim compares states in front of an entry layer",
            got="concepts at the input embeddings",
            expected="deep concepts",
            next_step="take relevance bm25, or ingest with --codec deep",
        )


class StatesAtHand:
    """States of one question and of its passages; see `compllm_rag.reading.choice.States`.

    Args:
        library: Whose LLM runs the question.
        stored: Gives what is stored of a passage, or why nothing is.
        spend: Told of the tokens that ran through the lower half.
    """

    def __init__(
        self,
        library: ConceptLibrary,
        stored: Callable[[Candidate], PassageStates | str],
        spend: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._library, self._stored, self._spend = library, stored, spend
        self._asked: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def of_question(self, query: str) -> torch.Tensor:
        """See `States.of_question`."""
        with self._lock:
            if query not in self._asked:
                self._asked[query] = question_states(self._library, query)
                self._spend(len(self._asked[query]))
            return self._asked[query]

    def of_passage(self, node: Candidate) -> PassageStates | str:
        """See `States.of_passage`."""
        return self._stored(node)


@torch.inference_mode()
def question_states(library: ConceptLibrary, query: str) -> torch.Tensor:
    """The residual stream in front of the entry layer at a question's tokens, float32 on the CPU.

    The question stands behind the opening that passages were compressed behind: so neither has its first token, whose
    state is a hundred times larger than any other. The opening's KV cache is kept, so that a question takes but its own
    tokens. The LLM is as it reads prompts, without the LoRA that writes concepts, which would have to be loaded for it.

    Args:
        library: Of deep concepts.
        query: What is asked.

    Returns:
        (n_tokens, hidden_size).

    Raises:
        ConfigurationError: See `refuse_without_states`.
    """
    refuse_without_states(library)
    llm, halves, opening = library.llm, library.halves, tuple(library.spec.config.opening)
    ids = torch.tensor([list(encode_plain(llm.tokenizer, whole(query))["input_ids"])], device=llm.device)  # (1, n)
    if halves is None or not ids.shape[1]:
        return torch.empty(0, llm.hidden_size)
    past = _opened(halves, opening)
    places = torch.arange(len(opening), len(opening) + ids.shape[1], device=llm.device)[None]  # (1, n)
    mask = torch.ones(1, len(opening) + ids.shape[1], dtype=torch.long, device=llm.device)
    hidden = halves.below(llm.embedding(ids), mask, places, past)  # (1, n, hidden_size)
    return hidden[0].float().cpu()


def _opened(halves: Halves, opening: tuple[int, ...]) -> Any:
    """A lower half's KV cache that has the opening in it, to be gone on with; made once for these halves."""
    if not opening:
        return None
    with _LOCK:
        known = _OPENINGS.setdefault(halves, {})
        if opening not in known:
            ids = torch.tensor([list(opening)], device=halves.llm.device)  # (1, n)
            cache, _ = halves.caches()
            halves.below(
                halves.llm.embedding(ids), torch.ones_like(ids), torch.arange(len(opening))[None].to(ids), cache
            )
            known[opening] = cache
        return copy.deepcopy(known[opening])

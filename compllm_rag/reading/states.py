"""States in front of the entry layer, of a question and of the passages that were retrieved for it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from compllm_rag.errors import ConfigurationError
from compllm_rag.library import ConceptLibrary
from compllm_rag.models.plaintext import encode_plain
from compllm_rag.reading.choice import Candidate, PassageStates
from compllm_rag.unicode_text import whole


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
                self._spend(len(self._library.spec.config.opening) + len(self._asked[query]))
            return self._asked[query]

    def of_passage(self, node: Candidate) -> PassageStates | str:
        """See `States.of_passage`."""
        return self._stored(node)


@torch.inference_mode()
def question_states(library: ConceptLibrary, query: str) -> torch.Tensor:
    """The residual stream in front of the entry layer at a question's tokens, float32 on the CPU.

    The question stands behind the opening that passages were compressed behind: so neither has its first token, whose
    state is a hundred times larger than any other. The LLM is as it reads prompts, without the LoRA that writes
    concepts, which would have to be loaded for it.

    Args:
        library: Of deep concepts.
        query: What is asked.

    Returns:
        (n_tokens, hidden_size).

    Raises:
        ConfigurationError: See `refuse_without_states`.
    """
    refuse_without_states(library)
    llm, halves, opening = library.llm, library.halves, list(library.spec.config.opening)
    ids = torch.tensor([[*opening, *encode_plain(llm.tokenizer, whole(query))["input_ids"]]], device=llm.device)
    if halves is None or ids.shape[1] == len(opening):
        return torch.empty(0, llm.hidden_size)
    places = torch.arange(ids.shape[1], device=llm.device)[None]  # (1, n)
    hidden = halves.below(llm.embedding(ids), torch.ones_like(ids), places)  # (1, n, hidden_size)
    return hidden[0, len(opening) :].float().cpu()

"""Passages as a read policy chooses them for a question: the product's own code, within the cost of a fixed rate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compllm_rag.compression.rates import FixedRate
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import DEFAULT_RATES, Mode, Narrowing
from compllm_rag.errors import ConfigurationError, ReadBudgetError
from compllm_rag.evaluation.questions import Question
from compllm_rag.library import ConceptLibrary
from compllm_rag.models.plaintext import encode_plain
from compllm_rag.prompt import QAPrompt, Span
from compllm_rag.reading.budget import ReadBudget
from compllm_rag.reading.budgeted import BudgetedReadPolicy
from compllm_rag.reading.choice import ReadPolicy
from compllm_rag.reading.passages import PassageReading, Retrieved
from compllm_rag.store.memory import MemoryStore


class QuestionBodies:
    """Spans of a question's passages, as a read policy chooses them.

    The budget of a question is the prefill that concepts of all its passages would take at a rate, their titles
    included: what a policy does not spend on the title of a passage that it leaves out, it may spend on another.

    Args:
        compressor: Makes concepts.
        rate: Of the budget.
        policy: Decides; None is a `BudgetedReadPolicy`.
        kept: Rates at which passages are kept; None is the codec's default rate and that of the budget.
        mode: `text` allows no concepts.
        prompt: Lays out passages; None takes the default prompt.
        narrowing: Of the prompts; the budget, too, is what narrowed concepts would take.

    Raises:
        ConfigurationError, RateOutOfReachError: A rate cannot be kept.
    """

    def __init__(
        self,
        compressor: ConceptCompressor,
        *,
        rate: float | None,
        policy: ReadPolicy | None = None,
        kept: Sequence[float] | None = None,
        mode: Mode = "concepts",
        prompt: QAPrompt | None = None,
        narrowing: Narrowing | None = None,
    ) -> None:
        if rate is None:
            raise ConfigurationError("mode budgeted needs a rate", expected="one whose cost is the budget")
        own = DEFAULT_RATES["deep" if compressor.config.deep else "input"]
        rates = tuple(dict.fromkeys(kept or (own, float(rate))))
        self._library = ConceptLibrary(
            compressor, MemoryStore(compressor.spec.width), rate=rates[0], also_rates=rates[1:]
        )
        self._budget_of = FixedRate(rate, compressor.config.longest_unit)
        self._prompt = prompt or QAPrompt(compressor.llm.tokenizer)
        self._reading = PassageReading(self._library, policy or BudgetedReadPolicy(), ReadBudget(), mode=mode)
        self._concept_cost, self._narrowing = compressor.spec.prefill_cost(1.0, narrowing), narrowing
        self._needs_concepts = mode == "concepts"

    def size(self, text: str) -> int:
        """Source tokens of a passage; questions of like length are asked together."""
        return len(self._library.passage(text).ids)

    def prepare(self, texts: Iterable[str]) -> None:
        """Have concepts of these passages."""
        if self._needs_concepts:
            self._library.ensure(dict.fromkeys(texts))

    def spans(self, text: str, passage: int) -> list[Span]:
        """A passage alone is nothing to decide on.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError("a read policy decides on all passages of a question", next_step="call `read`")

    def budget(self, question: Question) -> float:
        """What the passages of a question may take at prefill, in text tokens."""
        return sum(one.around + self._cost(one.text) for one in self._retrieved(question))

    def read(self, question: Question) -> list[tuple[str, list[Span]]]:
        """Title and spans of every passage that is read, in their order; none where not even a sentence fits."""
        retrieved = self._retrieved(question)
        if not retrieved:
            return []
        own = len(self._prompt.opening) + len(self._prompt.suffix(question.question))
        budget = ReadBudget(prefill=max(1.0, self.budget(question)), narrowing=self._narrowing)
        try:
            made = self._reading.read(question.question, retrieved, own, budget=budget).passages
        except ReadBudgetError:
            return []
        pairs = zip(retrieved, made, strict=True)
        return [(passage.title, one.spans) for passage, one in pairs if not one.reading.left_out]

    def beside(self, question: Question) -> float:
        """What the question's own pass through the lower layers takes, in text tokens; 0 where none is compared."""
        if not getattr(self._reading.policy, "needs_states", False):
            return 0.0
        spec = self._library.spec
        n_tokens = len(encode_plain(self._library.llm.tokenizer, question.question)["input_ids"])
        return float(n_tokens) * spec.config.entry_layer / spec.depth

    def _retrieved(self, question: Question) -> list[Retrieved]:
        template = self._prompt.template
        return [
            Retrieved(str(i), one.text, one.title, None, sum(map(len, template.passage(i + 1, one.title, []))))
            for i, one in enumerate(question.passages)
        ]

    def _cost(self, text: str) -> float:
        return sum(self._budget_of.n_concepts(self._library.passage(text).segments)) * self._concept_cost

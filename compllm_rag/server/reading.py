"""How a server has passages read: what it was told once holds for every answer, and each answer says what came of it.

Any option of `llamaindex.read_options` may be among them; none but those that text knows nothing of is known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel

from compllm_rag.config import Mode
from compllm_rag.llamaindex.read_options import READ_OPTIONS, ReadOptions, passage_reading
from compllm_rag.reading.budgeted import BudgetedReadPolicy

if TYPE_CHECKING:
    from compllm_rag.llamaindex.index import ConceptIndex

_OF_CONCEPTS = frozenset({"rate", "narrowing", "missing"})  # text has none of that
_PLAIN = (str, int, float, bool)


class ReadAccount(BaseModel):
    """How the passages of an answer were read, where the server was told how.

    Attributes:
        options: What it was told, as far as it concerns the mode of the answer.
        outcome: What came of it, by the option that decided: of `read_policy` its name, the budget, what was taken of
            it, and which passages were left out, and why.
        bypassed: Passages read as text because that is sooner than making their concepts.
    """

    options: dict[str, Any]
    outcome: dict[str, Any]
    bypassed: int


class ReadDefaults:
    """What passages are read as, in all answers of a server.

    Args:
        options: `missing`, and those of `llamaindex.read_options.passage_reading`; None stands for what is not set.
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self._options = {name: value for name, value in (options or {}).items() if value is not None}

    def of(self, mode: Mode) -> dict[str, Any]:
        """Those that concern an answer whose passages are read as text, or as concepts: text has no rate."""
        return {name: value for name, value in self._options.items() if mode == "concepts" or name not in _OF_CONCEPTS}

    def check(self, index: ConceptIndex) -> None:
        """See that an index can answer with them, before anybody asks.

        Raises:
            ConfigurationError: Two of them contradict each other, or this storage's LLM or concepts.
            NotCalibratedError: A time is among them, and nobody has measured how fast this machine reads.
            RateOutOfReachError: See `FixedRate`.
        """
        modes: tuple[Mode, ...] = ("concepts", "text")
        for mode in modes if self._options else ():
            options: dict[str, Any] = self.of(mode)
            index.as_synthesizer(mode=mode, **options)
            missing = options.pop("missing", "recompress")
            reading = passage_reading(
                index.library, mode=mode, missing=missing, decides_otherwise=False, options=cast(ReadOptions, options)
            )
            if reading is not None and isinstance(reading.policy, BudgetedReadPolicy) and not reading.budget.limits:
                reading.read("", [], 0)  # it has nothing to spend, and says so when it is asked

    def shown(self, mode: Mode = "concepts") -> dict[str, Any]:
        """`of` as plain values: an object by its name."""
        return {
            name: value if isinstance(value, _PLAIN) else str(getattr(value, "name", type(value).__name__))
            for name, value in self.of(mode).items()
        }

    def account(self, mode: Mode, account: Mapping[str, Any]) -> ReadAccount | None:
        """What a client is told of one answer; None where there is nothing that the server was told.

        Args:
            mode: Of the answer.
            account: `metadata["compllm"]` of its response.
        """
        options = self.shown(mode)
        if not options:
            return None
        outcome = {name: account[name] for name in READ_OPTIONS if name in account}
        return ReadAccount(options=options, outcome=outcome, bypassed=account.get("bypassed", 0))

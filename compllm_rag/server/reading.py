"""How a server has passages read: as it was told once, or as a request asks; each answer says what came of it.

Any option of `llamaindex.read_options` may be among what a server is told. A request may ask for those of `ReadAsked`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from compllm_rag.config import Mode
from compllm_rag.errors import ConfigurationError
from compllm_rag.llamaindex.read_options import READ_OPTIONS, ReadOptions, passage_reading
from compllm_rag.reading.budgeted import BudgetedReadPolicy

if TYPE_CHECKING:
    from compllm_rag.llamaindex.index import ConceptIndex

_OF_CONCEPTS = frozenset({"rate", "narrowing", "missing"})  # text has none of that
_BUDGETS = ("position_budget", "prefill_budget", "ttft_budget_s")
_PLAIN = (str, int, float, bool)
_Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ReadAsked(BaseModel):
    """How the passages of one answer are to be read; what is left out is as the server was told, null as if it was not.

    A budget of the server may be lowered, not raised: it bounds what an answer takes. What becomes of missing concepts
    (`--missing`) is the server's alone.
    """

    model_config = ConfigDict(extra="forbid")

    rate: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    narrowing: Annotated[str, Field(max_length=40)] | None = Field(default=None, description="LAYER:SHARE, or auto")
    read_policy: Literal["fixed", "budgeted"] | None = None
    relevance: Literal["bm25", "maxsim", "bm25+maxsim", "learned"] | None = None
    relevance_cutoff: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    position_budget: Annotated[int, Field(ge=1)] | None = None
    prefill_budget: _Amount | None = None
    ttft_budget_s: _Amount | None = None


class ReadAccount(BaseModel):
    """How the passages of an answer were read, where the server or the request said how.

    Attributes:
        options: What was said, as far as it concerns the mode of the answer.
        outcome: What came of it, by the option that decided: of `read_policy` its name, the budget, what was taken of
            it, and which passages were left out, and why.
        bypassed: Passages read as text because that is sooner than making their concepts.
    """

    options: dict[str, Any]
    outcome: dict[str, Any]
    bypassed: int


class ReadDefaults:
    """What passages are read as, in all answers of a server, or in one.

    Args:
        options: `missing`, and those of `llamaindex.read_options.passage_reading`; None stands for what is not set.
        asked: Names of those that a request asked for. They concern its mode, or are refused; what a server was told
            is left out where it does not.
    """

    def __init__(self, options: Mapping[str, Any] | None = None, asked: Collection[str] = ()) -> None:
        self._options = {name: value for name, value in (options or {}).items() if value is not None}
        self._asked = frozenset(asked)

    def of(self, mode: Mode) -> dict[str, Any]:
        """Those that concern an answer whose passages are read as text, or as concepts: text has no rate."""
        beside = _OF_CONCEPTS - self._asked if mode == "text" else frozenset[str]()
        return {name: value for name, value in self._options.items() if name not in beside}

    def with_request(self, asked: ReadAsked | None) -> ReadDefaults:
        """These with what a request asks for in their place.

        Raises:
            ConfigurationError: It asks for more than a budget of the server, or for none.
        """
        given = {} if asked is None else asked.model_dump(exclude_unset=True)
        for name in _BUDGETS:
            most = self._options.get(name)
            if name in given and most is not None and (given[name] is None or given[name] > most):
                raise ConfigurationError(
                    "this budget is the server's, and can only be lowered",
                    got=f"{name} {given[name]}",
                    expected=f"at most {most:g}",
                    next_step="ask for less, or leave it out",
                )
        if not given:
            return self
        return ReadDefaults({**self._options, **given}, [name for name, value in given.items() if value is not None])

    def check(self, index: ConceptIndex, modes: Sequence[Mode] = ("concepts", "text")) -> None:
        """See that an index can answer with them, before anybody asks.

        Args:
            index: The index.
            modes: In which answers are asked for.

        Raises:
            ConfigurationError: Two of them contradict each other, or this storage's LLM or concepts, or what runs it.
            NotCalibratedError: A time is among them, and nobody has measured how fast this machine reads.
            RateOutOfReachError: See `FixedRate`.
        """
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
        """What a client is told of one answer; None where nothing was said of it.

        Args:
            mode: Of the answer.
            account: `metadata["compllm"]` of its response.
        """
        options = self.shown(mode)
        if not options:
            return None
        outcome = {name: account[name] for name in READ_OPTIONS if name in account}
        return ReadAccount(options=options, outcome=outcome, bypassed=account.get("bypassed", 0))

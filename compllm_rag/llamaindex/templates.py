"""LlamaIndex's prompt templates as messages with a slot for the passages.

A template is formatted with a mark in place of the passages, and cut at the mark. Functions of a template
(`function_mappings`) never see the mark: they get the passages' text, or, where passages are read as concepts, an
object that refuses to be looked at.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from llama_index.core.base.llms.types import TextBlock
from llama_index.core.llms import ChatMessage, MessageRole
from llama_index.core.prompts import BasePromptTemplate, ChatPromptTemplate, SelectorPromptTemplate

from compllm_rag.errors import ConfigurationError
from compllm_rag.prompt import QUESTION, SLOT, SYSTEM, Message, Slot, qa_messages

if TYPE_CHECKING:
    from llama_index.core.llms.llm import LLM

# What LlamaIndex calls the passages in templates that answer, and in those that refine an answer.
CONTEXT, REFINE_CONTEXT = "context_str", "context_msg"
_OPEN, _CLOSE = "\ue010", "\ue011"

# The very messages of `compllm_rag.prompt.QAPrompt`, as LlamaIndex writes them.
DEFAULT_TEMPLATE = ChatPromptTemplate(
    message_templates=[
        ChatMessage(
            role=MessageRole(message.role),
            content="".join("{context_str}" if isinstance(piece, Slot) else piece for piece in message.content),
        )
        for message in qa_messages(QUESTION + "{query_str}")
    ]
)

# The same with an answer that further passages may make better.
DEFAULT_REFINE_TEMPLATE = ChatPromptTemplate(
    message_templates=[
        ChatMessage(role=MessageRole.SYSTEM, content=SYSTEM),
        ChatMessage(
            role=MessageRole.USER,
            content="{context_msg}" + QUESTION + "{query_str}\n"
            "Answer from earlier passages: {existing_answer}\n"
            "If these passages help, give a better answer; if not, repeat it.",
        ),
    ]
)


class PassagesAsConcepts:
    """What a function of a template gets for passages that are read as concepts: any use of it is an error."""

    def __init__(self, function_for: str) -> None:
        self._for = function_for

    def __repr__(self) -> str:
        return "<passages as concepts>"

    def _refuse(self, *args: object) -> NoReturn:
        raise concepts_unseen(self._for)

    __str__ = __format__ = __len__ = __iter__ = __getitem__ = __contains__ = _refuse
    __add__ = __radd__ = __mul__ = __mod__ = __eq__ = __lt__ = __gt__ = __bool__ = _refuse
    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what a library asks of any object, to copy or to show it
            raise AttributeError(name)
        raise concepts_unseen(self._for)


def concepts_unseen(variable: str) -> ConfigurationError:
    """The error for a function of a template that wants the text of passages that are concepts."""
    return ConfigurationError(
        f"a function for {variable} cannot see concepts",
        got=f"function_mappings for {variable}, which uses the passages, with passages read as concepts",
        expected="functions that use other variables only",
        next_step='set mode="text", or change the text before it is ingested (a transformation of the pipeline)',
    )


def chosen(template: BasePromptTemplate, llm: LLM | None) -> BasePromptTemplate:
    """The template that one which differs by LLM comes down to."""
    while isinstance(template, SelectorPromptTemplate):
        template = template.select(llm)
    return template


def check_template(
    template: BasePromptTemplate, given: Mapping[str, str], slot: str, optional: Collection[str] = ()
) -> None:
    """Refuse a template that would leave something out without a word.

    Args:
        template: Not one that differs by LLM, see `chosen`.
        given: What fills it, by LlamaIndex's names; the passages are not among them.
        slot: Name of the passages.
        optional: Of what fills it, what need not be there.

    Raises:
        ConfigurationError: It has a variable that nothing fills, lacks the passages, the question or the answer so far,
            or was given values or functions for variables that it does not have.
    """
    mapped = template.template_var_mappings or {}
    functions, partial = template.function_mappings or {}, template.kwargs
    has = set(template.template_vars)
    filled = {mapped.get(name, name) for name in (slot, *given, *functions, *partial)}
    if unknown := sorted(has - filled):
        raise ConfigurationError(
            "prompt template has variables that nothing fills",
            got=", ".join(f"{{{name}}}" for name in unknown),
            expected=", ".join(f"{{{name}}}" for name in (slot, *given)) + ", and those that you fill yourself",
            next_step="correct the names, or fill them by partial_format or function_mappings",
        )
    # A function may put the others into what it makes.
    needed = [slot] if functions else [slot, *(name for name in given if name not in optional)]
    if absent := [mapped.get(name, name) for name in needed if mapped.get(name, name) not in has]:
        raise ConfigurationError(
            f"prompt template has no place for {', '.join(absent)}",
            got=", ".join(f"{{{name}}}" for name in sorted(has)) or "no variables",
            expected=", ".join(f"{{{name}}}" for name in needed),
            next_step=f"add {', '.join(f'{{{name}}}' for name in absent)}",
        )
    set_by_user = [*functions] if functions else [*partial]  # functions may use what was filled in
    if unused := sorted(name for name in set_by_user if mapped.get(name, name) not in has):
        raise ConfigurationError(
            "prompt template does not use what it was given",
            got=", ".join(unused),
            expected=", ".join(sorted(has)),
            next_step="correct the names, or leave them out",
        )


def messages_of(
    template: BasePromptTemplate,
    llm: LLM | None,
    query: str,
    *,
    existing: str | None = None,
    passages: str | None = None,
    optional: Collection[str] = (),
) -> list[Message]:
    """The turns of a LlamaIndex prompt template, with a slot for the passages.

    Args:
        template: With `{context_str}` and `{query_str}`, or, to refine an answer, with `{context_msg}`, `{query_str}`
            and `{existing_answer}`.
        llm: For templates that differ by LLM.
        query: What is asked.
        existing: The answer to refine; None for a first answer.
        passages: Their text, which then stands in place of the slot; None leaves the slot.
        optional: Names that the template need not have.

    Raises:
        ConfigurationError: See `check_template`; or a function or filter of the template wants text where there is a
            slot; or a turn holds an image.
    """
    template = chosen(template, llm)
    slot = CONTEXT if existing is None else REFINE_CONTEXT
    given = {"query_str": query} | ({} if existing is None else {"existing_answer": existing})
    check_template(template, given, slot, optional)
    functions = template.function_mappings or {}
    if functions and passages is None:
        template = template.model_copy(
            update={"function_mappings": {name: _blind(name, slot, use) for name, use in functions.items()}}
        )
    mark = f"{_OPEN}aB{secrets.token_hex(8)}{_CLOSE}"
    turns = template.format_messages(llm=llm, **{slot: mark if passages is None else passages}, **given)
    texts = [text_of(turn) for turn in turns]
    if passages is None and any(_OPEN in text for text in texts) and not any(mark in text for text in texts):
        raise concepts_unseen(slot)
    return [Message(turn.role.value, tuple(_cut(text, mark))) for turn, text in zip(turns, texts, strict=True)]


def wants_text(template: BasePromptTemplate, llm: LLM | None, *, existing: str | None = None) -> bool:
    """Whether functions or filters of a template look at what fills it, so that passages must be there as text."""
    template = chosen(template, llm)
    if template.function_mappings:
        return True
    try:
        messages_of(template, llm, "?", existing=existing)
    except ConfigurationError as error:
        return "cannot see concepts" in error.what
    return False


def text_of(message: ChatMessage) -> str:
    """The text of a turn.

    Raises:
        ConfigurationError: It holds something else, such as an image.
    """
    others = sorted({type(block).__name__ for block in message.blocks if not isinstance(block, TextBlock)})
    if others:
        raise ConfigurationError(
            "this LLM reads text only",
            got=f"a {message.role.value} turn with {', '.join(others)}",
            expected="TextBlock",
            next_step="leave the others out, or describe them in words",
        )
    return message.content or ""


def _cut(text: str, mark: str) -> list[str | Slot]:
    content: list[str | Slot] = []
    for i, part in enumerate(text.split(mark)):
        content += [SLOT, part] if i else [part]
    return content


def _blind(name: str, slot: str, use: Callable[..., Any]) -> Callable[..., str]:
    """A function of a template that is kept from looking at the passages."""
    if name == slot:
        raise concepts_unseen(name)

    def blind(**values: Any) -> str:
        try:
            made = use(**{**values, slot: PassagesAsConcepts(name)})
        except TypeError as error:
            if PassagesAsConcepts.__name__ in str(error):
                raise concepts_unseen(name) from error
            raise
        return str(made)

    return blind

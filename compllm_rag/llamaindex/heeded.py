"""What is handed over is looked at before it is used: options that nothing heeds, and values of another kind.

LlamaIndex takes both without a word, and fails later, in the middle of something else, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import QueryBundle
from llama_index.core.vector_stores.types import MetadataFilters, VectorStoreQueryMode

from compllm_rag.errors import ConfigurationError


def refuse_options(doing: str, given: Iterable[str], known: Sequence[str] = ()) -> None:
    """Refuse options by name.

    Args:
        doing: What they were given to.
        given: Names that nothing heeds.
        known: Those that would be.

    Raises:
        ConfigurationError: There are some.
    """
    if unheeded := sorted(given):
        raise ConfigurationError(
            f"{doing} has no such option",
            got=", ".join(unheeded),
            expected=", ".join(known) or "none",
            next_step="leave it out",
        )


def update_options(doing: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of LlamaIndex's `update_ref_doc` and `refresh_ref_docs`, as options of an insertion.

    Args:
        doing: What they were given to.
        given: `insert_kwargs`, and `delete_kwargs`; or `update_kwargs`, a dictionary that holds these.

    Raises:
        ConfigurationError: There are others.
    """
    options = {**given}
    options |= options.pop("update_kwargs", None) or {}
    inserting, deleting = ({**(options.pop(name, None) or {})} for name in ("insert_kwargs", "delete_kwargs"))
    deleting.pop("delete_from_docstore", None)  # a document that is replaced goes from there in any case
    refuse_options(f"{doing} (delete_kwargs)", deleting, ("delete_from_docstore",))
    inserting |= {name: options.pop(name) for name in ("show_progress",) if name in options}
    refuse_options(doing, options, ("insert_kwargs", "delete_kwargs", "show_progress"))
    return inserting


def asked(question: Any) -> str | QueryBundle:
    """A question, if it is one.

    Raises:
        ConfigurationError: It is no text.
    """
    if isinstance(question, str | QueryBundle):
        return question
    raise ConfigurationError(
        "the question is no text", got=f"a {type(question).__name__}", expected="words", next_step="ask in words"
    )


def top_k(given: Any) -> int:
    """How many nodes to find, at most.

    Raises:
        ConfigurationError: This is no number of them.
    """
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise ConfigurationError("similarity_top_k makes no sense", got=given, expected="at least 1, a whole number")
    return given


def ids(given: Sequence[str] | None) -> list[str] | None:
    """Ids as a list; one alone need not stand in one."""
    if given is None:
        return None
    return [given] if isinstance(given, str) else list(given)


def metadata_filters(given: Any) -> MetadataFilters | None:
    """Filters on metadata.

    Raises:
        ConfigurationError: They are something else.
    """
    if given is None or isinstance(given, MetadataFilters):
        return given
    raise ConfigurationError(
        "these are no filters",
        got=f"a {type(given).__name__}",
        expected="LlamaIndex's MetadataFilters",
        next_step="write MetadataFilters(filters=[MetadataFilter(key=..., value=...)])",
    )


def query_mode(given: Any) -> VectorStoreQueryMode:
    """How a vector store is searched.

    Raises:
        ConfigurationError: LlamaIndex has no such mode.
    """
    try:
        return VectorStoreQueryMode(given)
    except ValueError:
        raise ConfigurationError(
            "there is no such mode of search",
            got=repr(given),
            expected="default or mmr",
            next_step="for words use index.as_bm25_retriever(), for words and vectors index.as_hybrid_retriever()",
        ) from None


def postprocessors(given: Any) -> list[BaseNodePostprocessor]:
    """Postprocessors of nodes, as a list.

    Raises:
        ConfigurationError: One is none, or they do not stand in a list.
    """
    if given is None:
        return []
    several = list(given) if isinstance(given, list | tuple) else [given]
    strange = [each for each in several if not hasattr(each, "postprocess_nodes")]
    if strange or (several and not isinstance(given, list | tuple)):
        raise ConfigurationError(
            "these are no postprocessors",
            got=f"a {type(strange[0] if strange else given).__name__}",
            expected="a list of LlamaIndex's node postprocessors",
        )
    return several


def messages(given: Any, name: str) -> list[ChatMessage]:
    """Turns of a conversation, as a list of its own.

    Args:
        given: What was handed over.
        name: Of the option.

    Raises:
        ConfigurationError: One is something else.
    """
    several = list(given) if isinstance(given, list | tuple) else [given]
    strange = [each for each in several if not isinstance(each, ChatMessage)]
    if strange:
        raise ConfigurationError(
            f"{name} holds what is no message",
            got=f"a {type(strange[0]).__name__}",
            expected="a list of LlamaIndex's ChatMessage",
            next_step="make one: ChatMessage(role=..., content=...)",
        )
    return several

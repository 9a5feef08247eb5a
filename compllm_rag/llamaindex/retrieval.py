"""How passages are looked for: by vectors, by words, or both, as query engines and the command line offer it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.vector_stores.types import MetadataFilters

from compllm_rag.catalog.keywords import KeywordIndex
from compllm_rag.errors import ConfigurationError
from compllm_rag.llamaindex.heeded import ids, top_k
from compllm_rag.llamaindex.retriever import OPTIONS
from compllm_rag.llamaindex.retrievers import ConceptBM25Retriever, HybridRetriever, candidates_for

VECTOR_OPTIONS = OPTIONS  # of `as_retriever`
RETRIEVALS = ("vector", "bm25", "hybrid")
_OF_BM25 = ("similarity_top_k", "filters", "doc_ids", "node_ids", "callback_manager")
_OF_HYBRID = (*_OF_BM25, "candidates", "weights")
_ANY = frozenset({*VECTOR_OPTIONS, *_OF_HYBRID})


class Searched(Protocol):
    """What passages are looked for in: a `ConceptIndex`."""

    @property
    def keywords(self) -> KeywordIndex:
        """Its words."""
        ...

    def as_retriever(self, **kwargs: Any) -> BaseRetriever:
        """By vectors."""
        ...


def hybrid_retriever(
    index: Searched,
    *,
    similarity_top_k: int = 4,
    candidates: int | None = None,
    weights: Sequence[float] | None = None,
    filters: MetadataFilters | None = None,
    doc_ids: Sequence[str] | None = None,
    node_ids: Sequence[str] | None = None,
    callback_manager: CallbackManager | None = None,
) -> HybridRetriever:
    """Vectors and words, joined; see `ConceptIndex.as_hybrid_retriever`.

    Raises:
        ConfigurationError: A number makes no sense, or bm25s is not installed.
    """
    similarity_top_k = top_k(similarity_top_k)
    wanted = candidates_for(similarity_top_k) if candidates is None else candidates
    if wanted < similarity_top_k:
        raise ConfigurationError(
            "candidates makes no sense", got=candidates, expected=f"at least similarity_top_k, {similarity_top_k}"
        )
    asked: dict[str, Any] = {
        "filters": filters,
        "doc_ids": ids(doc_ids),
        "node_ids": ids(node_ids),
        "callback_manager": callback_manager,
    }
    limits = {"similarity_top_k": wanted} | {name: value for name, value in asked.items() if value is not None}
    return HybridRetriever(
        [index.as_retriever(**limits), ConceptBM25Retriever(index.keywords, **limits)],
        similarity_top_k=similarity_top_k,
        weights=weights,
        callback_manager=callback_manager,
    )


def chosen_retriever(index: Searched, options: dict[str, Any]) -> BaseRetriever | None:
    """The retriever that the options of a query engine ask for; takes these out of `options`.

    Args:
        index: Where to look.
        options: `retriever`, a retriever of any kind, or `retrieval`, one of `RETRIEVALS`; with `retrieval` also the
            options of that retriever.

    Returns:
        None where vectors are asked for: the other options are for `as_retriever` then.

    Raises:
        ConfigurationError: Both are given, one is neither, or there are options that the retriever does not have.
    """
    given, name = options.pop("retriever", None), options.pop("retrieval", None)
    if given is not None and name is not None:
        raise ConfigurationError("retriever and retrieval exclude each other", got="both", next_step="leave one out")
    if given is not None:
        if not isinstance(given, BaseRetriever):
            raise ConfigurationError(
                "this is no retriever", got=type(given).__name__, expected="a LlamaIndex retriever"
            )
        _refuse(options, _ANY, (), "set it on the retriever that you pass")
        return given
    if name not in (None, *RETRIEVALS):
        raise ConfigurationError("unknown way of retrieval", got=repr(name), expected=", ".join(RETRIEVALS))
    if name in (None, "vector"):
        return None
    known = _OF_BM25 if name == "bm25" else _OF_HYBRID
    _refuse(options, _ANY, known, f"leave it out, or leave retrieval={name!r} out")
    taken = {option: options.pop(option) for option in known if option in options}
    return ConceptBM25Retriever(index.keywords, **taken) if name == "bm25" else hybrid_retriever(index, **taken)


def _refuse(options: dict[str, Any], among: Collection[str], known: Sequence[str], next_step: str) -> None:
    unheeded = sorted(option for option in options if option in among and option not in known)
    if unheeded:
        raise ConfigurationError(
            "this retriever would not heed these options",
            got=", ".join(unheeded),
            expected=", ".join(known) or "none",
            next_step=next_step,
        )

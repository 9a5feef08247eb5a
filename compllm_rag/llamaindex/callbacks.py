"""Callback managers that may be set late: on the engine, or in `Settings` after the engine was made."""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, QueryBundle, QueryType
from llama_index.core.settings import Settings

from compllm_rag.llamaindex.heeded import asked


class FollowsSettings:
    """For components with a callback manager: the one that was given, else whatever `Settings` has at the time."""

    _given_manager: CallbackManager | None = None

    @property
    def _callback_manager(self) -> CallbackManager:
        return self._given_manager or Settings.callback_manager

    @_callback_manager.setter
    def _callback_manager(self, manager: CallbackManager) -> None:
        # LlamaIndex's constructors fill in that of Settings where none was given.
        self._given_manager = None if manager is Settings.callback_manager else manager


class OneManager(BaseQueryEngine):
    """For query engines of LlamaIndex over a retriever: one callback manager, the synthesizer's, for all their parts.

    Setting `callback_manager` reaches the synthesizer, and a retriever that nobody listens to by itself.
    """

    _response_synthesizer: Any
    _retriever: Any
    _node_postprocessors: Any

    @property
    def callback_manager(self) -> CallbackManager:
        """That of the synthesizer."""
        manager: CallbackManager = self._response_synthesizer.callback_manager
        return manager

    @callback_manager.setter
    def callback_manager(self, manager: CallbackManager) -> None:
        if manager is not self._response_synthesizer.callback_manager:
            self._response_synthesizer.callback_manager = manager

    def query(self, str_or_query_bundle: QueryType) -> RESPONSE_TYPE:
        """Answer a question.

        Raises:
            ConfigurationError: It is empty, or no text.
        """
        return super().query(asked(str_or_query_bundle))

    async def aquery(self, str_or_query_bundle: QueryType) -> RESPONSE_TYPE:
        """`query`, async."""
        return await super().aquery(asked(str_or_query_bundle))

    def retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """Nodes for a query, postprocessed."""
        self.hand_on()
        return super().retrieve(query_bundle)

    async def aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """`retrieve`, async."""
        self.hand_on()
        found: list[NodeWithScore] = await super().aretrieve(query_bundle)  # type: ignore[misc]  # not in the base
        return found

    def hand_on(self) -> None:
        """Lend the manager to retriever and postprocessors that nobody listens to by themselves."""
        lend(self.callback_manager, self._retriever, *self._node_postprocessors)


class ConceptQueryEngine(OneManager, RetrieverQueryEngine):
    """A RetrieverQueryEngine that refuses what is no question, with one callback manager."""


_lent: weakref.WeakKeyDictionary[Any, weakref.ref[CallbackManager]] = weakref.WeakKeyDictionary()


def lend(manager: CallbackManager, *parts: Any) -> None:
    """Give a manager to parts that have none of their own that anybody hears, or one that was lent to them before."""
    for part in parts:
        own: CallbackManager | None = getattr(part, "callback_manager", None)
        if own is None or own is manager:
            continue
        try:
            before = _lent.get(part)
            borrowed = before is not None and before() is own
        except TypeError:  # cannot be remembered, as a pydantic model without a hash
            borrowed = False
        if borrowed or not own.handlers:
            part.callback_manager = manager
            with suppress(TypeError):
                _lent[part] = weakref.ref(manager)

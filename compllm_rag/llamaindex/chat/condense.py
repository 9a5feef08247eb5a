"""A follow-up question becomes one that can be understood, and looked for, without the conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llama_index.core.base.llms.generic_utils import messages_to_history_str
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.llms.llm import LLM
from llama_index.core.prompts import BasePromptTemplate

from compllm_rag.llamaindex.chat.turns import most_that_fit

# Positions of the chat template around a condensing prompt.
_MARGIN = 64


class Condenser:
    """Rewrites questions by an LLM.

    Args:
        llm: Any LLM of LlamaIndex.
        prompt: Template with `{chat_history}` and `{question}`.
        count: Tokens of a text.
        verbose: Print the question, as LlamaIndex's engines do.
    """

    def __init__(
        self, llm: LLM, prompt: BasePromptTemplate, count: Callable[[str], int], *, verbose: bool = False
    ) -> None:
        self.llm, self.prompt, self._count, self._verbose = llm, prompt, count, verbose

    def condense(self, history: Sequence[ChatMessage], message: str) -> str:
        """The question that a message asks; the message itself at the start of a conversation, or if all else fails."""
        told = self._told(history, message)
        made = self.llm.predict(self.prompt, chat_history=told, question=message) if told else message
        return self._shown(made.strip() or message)

    async def acondense(self, history: Sequence[ChatMessage], message: str) -> str:
        """`condense`, asynchronously."""
        told = self._told(history, message)
        made = await self.llm.apredict(self.prompt, chat_history=told, question=message) if told else message
        return self._shown(made.strip() or message)

    def _shown(self, question: str) -> str:
        if self._verbose:
            print(f"Condensed question: {question}")  # noqa: T201 - what `verbose` is for
        return question

    def _told(self, history: Sequence[ChatMessage], message: str) -> str:
        """As much of the conversation as the LLM's window holds, the oldest messages left out; "" if there is none."""
        said = [m for m in history if m.role != MessageRole.SYSTEM or m.content]
        metadata = self.llm.metadata
        room = metadata.context_window - metadata.num_output - _MARGIN
        n = most_that_fit(len(said), lambda n: self._count(self._formatted(said[len(said) - n :], message)) <= room)
        return messages_to_history_str(said[len(said) - n :])

    def _formatted(self, history: Sequence[ChatMessage], message: str) -> str:
        return self.prompt.format(chat_history=messages_to_history_str(history), question=message)

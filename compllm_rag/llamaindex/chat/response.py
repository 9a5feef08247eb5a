"""An answer of a chat that is being made."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from typing import Any

from llama_index.core.chat_engine.types import StreamingAgentChatResponse

from compllm_rag.errors import ConfigurationError


@dataclass
class ConceptChatStream(StreamingAgentChatResponse):
    """LlamaIndex's streaming response, with `metadata`, made as it is read.

    No thread runs ahead of whoever reads: an answer that nobody reads costs nothing, and closing the generator ends
    it. What was said until then is part of the conversation.
    """

    is_writing_to_memory: bool = False  # the stream itself does so
    metadata: dict[str, Any] | None = None

    @property
    def response_gen(self) -> Generator[str, None, None]:
        """Pieces of the answer; iterate once.

        Raises:
            ConfigurationError: The answer is asynchronous.
        """
        stream: Any = self.chat_stream
        if stream is None:
            raise _other_kind("async_response_gen", "stream_chat")
        try:
            for each in stream:
                yield each.delta or ""
        finally:
            stream.close()

    async def async_response_gen(self) -> AsyncGenerator[str, None]:
        """Pieces of the answer; iterate once.

        Raises:
            ConfigurationError: The answer is not asynchronous.
        """
        stream: Any = self.achat_stream
        if stream is None:
            raise _other_kind("response_gen", "astream_chat")
        try:
            async for each in stream:
                yield each.delta or ""
        finally:
            await stream.aclose()


def _other_kind(there: str, wanted: str) -> ConfigurationError:
    return ConfigurationError(
        "this answer is read in the other way", next_step=f"iterate over `{there}`, or call `{wanted}`"
    )

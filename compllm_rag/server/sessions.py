"""Conversations that the server remembers: so many at most, each for a while, each of one namespace."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.memory import BaseMemory, ChatMemoryBuffer

from compllm_rag.server.failures import Refusal

_MESSAGES = 100  # fifty turns
_WORDS = 1_000_000  # more than fits: the planner leaves out what the LLM's window does not hold, and says so


def memory_of(messages: Sequence[ChatMessage]) -> BaseMemory:
    """A memory in which this was said."""
    return ChatMemoryBuffer.from_defaults(chat_history=list(messages), token_limit=_WORDS, tokenizer_fn=str.split)


@dataclass
class Session:
    """A conversation.

    Attributes:
        id: Not to be guessed: whoever knows it may go on with it, within its namespace.
        namespace: Whose it is.
        memory: What was said.
        used: When, last.
        busy: A turn of it is being answered.
    """

    id: str
    namespace: str
    used: float
    memory: BaseMemory = field(default_factory=lambda: memory_of([]))
    busy: bool = False

    def trim(self) -> None:
        """Keep the last turns only."""
        messages = self.memory.get_all()
        if len(messages) > _MESSAGES:
            self.memory.set(messages[-_MESSAGES:])


class Sessions:
    """All of them. Used by one thread, that of the event loop.

    Args:
        most: How many of each namespace; the one used longest ago is forgotten first.
        idle_s: Seconds after its last turn that one is remembered.
        clock: Seconds.
    """

    def __init__(self, most: int = 1000, idle_s: float = 1800.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._idle_s, self._clock = most, idle_s, clock
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def __len__(self) -> int:
        self._sweep()
        return len(self._sessions)

    def begin(self, namespace: str) -> Session:
        """A new conversation, its first turn being answered."""
        self._sweep()
        made = Session(f"c-{secrets.token_urlsafe(24)}", namespace, self._clock(), busy=True)
        self._sessions[made.id] = made
        own = [session for session in self._sessions.values() if session.namespace == namespace]
        for session in own[: max(0, len(own) - self._most)]:
            if not session.busy:
                del self._sessions[session.id]
        return made

    def go_on(self, session_id: str, namespace: str) -> Session:
        """One that is there, its next turn being answered.

        Raises:
            Refusal: It is not there, or a turn of it is being answered.
        """
        found = self._get(session_id, namespace)
        if found.busy:
            raise Refusal(
                409, "session_busy", "the message before is still being answered. Next step: wait for its end",
                param="session_id",
            )  # fmt: skip
        found.busy = True
        return found

    def end_turn(self, session: Session) -> None:
        """A turn was answered, or given up."""
        session.trim()
        session.busy, session.used = False, self._clock()
        if session.id in self._sessions:
            self._sessions.move_to_end(session.id)

    def forget(self, session_id: str, namespace: str) -> None:
        """Forget one.

        Raises:
            Refusal: It is not there.
        """
        del self._sessions[self._get(session_id, namespace).id]

    def _get(self, session_id: str, namespace: str) -> Session:
        self._sweep()
        found = self._sessions.get(session_id)
        if found is None or found.namespace != namespace:
            raise Refusal(
                404, "no_such_session", "there is no such conversation, or it was forgotten. Next step: begin one",
                param="session_id",
            )  # fmt: skip
        return found

    def _sweep(self) -> None:
        """Forget those that were not used for long; the oldest stand in front."""
        now = self._clock()
        for session in list(self._sessions.values()):
            if now - session.used <= self._idle_s:
                break
            if not session.busy:
                del self._sessions[session.id]

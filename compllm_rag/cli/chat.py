"""The command that chats: `compllm-rag chat`. Models load once, answers appear as they are made."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compllm_rag.cli.base import GeneratorAddress, Offline, Storage, progress_show, reported
from compllm_rag.cli.reading import (
    MissingName,
    NarrowingName,
    PolicyName,
    PositionBudget,
    PrefillBudget,
    ReadRate,
    RelevanceCutoff,
    RelevanceName,
    TtftBudget,
    read_options,
    size_of,
)
from compllm_rag.errors import CompLLMError, ConfigurationError

if TYPE_CHECKING:
    from compllm_rag.llamaindex.chat.engine import ConceptChatEngine
    from compllm_rag.llamaindex.chat.response import ConceptChatStream

HELP = """\
/sources  the passages of the last answer
/reset    forget what was said
/help     this
Ctrl-C ends an answer, Ctrl-D the chat."""


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("chat")(reported(chat, interrupted="interrupted"))


def chat(
    storage: Storage,
    chat_mode: Annotated[
        str, typer.Option(help="best, context, condense_plus_context, condense_question or simple.")
    ] = "best",
    mode: Annotated[str, typer.Option(help="Read passages as `concepts` or as `text`.")] = "concepts",
    top_k: Annotated[int, typer.Option(min=1, help="Chunks to retrieve for each question.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    system_prompt: Annotated[str | None, typer.Option(help="What the LLM is told first.")] = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", help="Tenant, one of several in this folder that share nothing.")
    ] = None,
    rate: ReadRate = None,
    narrow: NarrowingName = None,
    read_policy: PolicyName = None,
    relevance: RelevanceName = None,
    relevance_cutoff: RelevanceCutoff = None,
    position_budget: PositionBudget = None,
    prefill_budget: PrefillBudget = None,
    ttft_budget: TtftBudget = None,
    missing: MissingName = "recompress",
    generator: GeneratorAddress = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    offline: Offline = False,
) -> None:
    """Chat about a storage: follow-up questions are understood, passages are read as concepts.

    In a terminal, /sources shows the passages of the last answer, /reset forgets what was said; Ctrl-C ends an answer,
    Ctrl-D the chat. Where questions come through a pipe, each line is one, and nothing but answers is printed.

    Example: compllm-rag chat --storage storage
    """
    if mode not in ("concepts", "text"):
        raise ConfigurationError("unknown mode", got=mode, expected="concepts or text", next_step="pass one of them")
    reading = read_options(
        rate, read_policy, position_budget, prefill_budget, ttft_budget, missing, relevance, narrow, relevance_cutoff
    )
    given = {name: value for name, value in reading.items() if value not in (None, "recompress")}
    from compllm_rag.config import GenerationConfig
    from compllm_rag.llamaindex.index import ConceptIndex

    terminal = sys.stdin.isatty()
    _lenient()
    # Without passages there is nothing to read: the engine refuses by name what was given all the same.
    options: dict[str, Any] = given | ({} if chat_mode == "simple" else {"mode": mode, "similarity_top_k": top_k})
    generation = GenerationConfig(max_new_tokens=max_new_tokens)
    with (
        progress_show(not terminal) as show,
        ConceptIndex.load(
            storage,
            namespace=namespace,
            read_only=True,
            dtype=dtype,
            offline=offline,
            generation=generation,
            generator=generator,
            progress=show.fetching,
        ) as index,
    ):
        engine: Any = index.as_chat_engine(chat_mode, system_prompt=system_prompt, **options)
        show.close()
        conversation = Conversation(engine, terminal=terminal)
        if terminal:
            typer.echo(HELP, err=True)
        for line in typed_lines() if terminal else piped_lines():
            conversation.take(line)
    if conversation.failed and not terminal:
        raise typer.Exit(2)


class Conversation:
    """Takes lines and prints what comes of them.

    Args:
        engine: Answers.
        terminal: Somebody sits there: a Ctrl-C ends the answer only.

    Attributes:
        failed: Whether there was an error.
    """

    def __init__(self, engine: ConceptChatEngine, *, terminal: bool) -> None:
        self._engine, self._terminal, self.failed = engine, terminal, False
        self._last: ConceptChatStream | None = None
        self._commands: dict[str, Callable[[], None]] = {
            "/sources": self._sources, "/reset": self._reset, "/help": lambda: typer.echo(HELP),
        }  # fmt: skip

    def take(self, line: str) -> None:
        """Answer a question, or do as a command says; an error is told in one line."""
        words = line.strip()
        if not words:
            return
        try:
            if words in self._commands:
                self._commands[words]()
            elif words.startswith("/") and words[1:].isalpha():
                raise ConfigurationError(
                    "no such command",
                    got=words,
                    expected=", ".join(self._commands),
                    next_step="/help tells what they do",
                )
            else:
                self._answer(words)
        except CompLLMError as error:
            self.failed = True
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)

    def _answer(self, question: str) -> None:
        try:
            self._last = self._engine.stream_chat(question)
            for piece in self._last.response_gen:
                typer.echo(piece, nl=False)
        except KeyboardInterrupt:
            if not self._terminal:
                raise
            typer.echo(" (interrupted)", nl=False)
        typer.echo("")

    def _reset(self) -> None:
        self._engine.reset()
        self._last = None

    def _sources(self) -> None:
        if self._last is None or not self._last.source_nodes:
            typer.echo("no passages were read")
            return
        nodes = (self._last.metadata or {})["compllm"]["nodes"]
        for number, node in enumerate(self._last.source_nodes, 1):
            facts = nodes[node.node.node_id]
            size = size_of(facts)
            title = node.node.metadata.get("title") or node.node.ref_doc_id or node.node.node_id
            score = "" if node.score is None else f"score {node.score:.2f}, "
            typer.echo(f"[{number}] {title} ({score}{size})")


def typed_lines() -> Iterator[str]:
    """What is typed, until Ctrl-D; a Ctrl-C begins the line anew."""
    with suppress(ImportError):
        import readline  # noqa: F401 - makes lines editable, and remembers them
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            typer.echo("")
        except EOFError:
            typer.echo("")
            return


def piped_lines() -> Iterator[str]:
    """The lines of standard input, each as soon as it is there."""
    yield from iter(sys.stdin.readline, "")


def _lenient() -> None:
    """Bytes that are no text, and characters that the terminal does not know, end no conversation."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)

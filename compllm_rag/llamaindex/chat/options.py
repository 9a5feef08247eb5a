"""What `ConceptIndex.as_chat_engine` takes, in each mode; anything else is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.chat_engine.condense_plus_context import DEFAULT_CONDENSE_PROMPT_TEMPLATE
from llama_index.core.chat_engine.condense_question import DEFAULT_TEMPLATE
from llama_index.core.chat_engine.types import BaseChatEngine
from llama_index.core.llms.llm import LLM
from llama_index.core.memory import BaseMemory, ChatMemoryBuffer
from llama_index.core.prompts import BasePromptTemplate, ChatPromptTemplate, PromptTemplate

from compllm_rag.errors import ConfigurationError
from compllm_rag.llamaindex.chat.condense import Condenser
from compllm_rag.llamaindex.chat.engine import ChatMode, ConceptChatEngine, head_of
from compllm_rag.llamaindex.chat.planner import Turn
from compllm_rag.llamaindex.chat.synthesizer import TurnSynthesizer
from compllm_rag.llamaindex.heeded import messages, postprocessors
from compllm_rag.llamaindex.llm import ConceptLLM
from compllm_rag.llamaindex.read_options import READ_OPTIONS
from compllm_rag.models.plaintext import encode_plain
from compllm_rag.prompt import SYSTEM, Message

if TYPE_CHECKING:
    from compllm_rag.llamaindex.index_asking import IndexAsking

MODES = ("best", "condense_plus_context", "context", "condense_question", "simple")
_CONVERSATION = {"memory", "chat_history", "system_prompt", "prefix_messages", "callback_manager"}
# `streaming` and `use_async` change nothing: `chat` waits, `stream_chat` streams, `achat` and `astream_chat` await.
_NOTHING = {"streaming", "use_async"}
_FIXED = ("mode", "missing", "overflow", "choose", *READ_OPTIONS)
_READING = {*_FIXED, "node_postprocessors", "context_prompt", "context_template"}
_CONDENSING = {"condense_prompt", "condense_question_prompt", "condense_llm", "skip_condense", "verbose"}


def chat_engine(
    index: IndexAsking, chat_mode: object, llm: object, options: dict[str, Any], retriever_options: Collection[str]
) -> BaseChatEngine:
    """A chat engine over an index; see `ConceptIndex.as_chat_engine`.

    Args:
        index: The index.
        chat_mode: One of `MODES`, or LlamaIndex's member for it.
        llm: None, or a `ConceptLLM` of the index; any LLM in simple mode.
        options: What else was given.
        retriever_options: Names that the index's retriever takes.

    Raises:
        ConfigurationError: A mode, an LLM or an option that nothing here would heed.
    """
    mode = _mode(chat_mode)
    own = llm is None or (isinstance(llm, ConceptLLM) and llm.runs(index.generator))
    if mode == "simple" and not own:
        return _stock_simple(llm, options)
    if not own:
        raise ConfigurationError(
            "only the storage's own LLM can read its concepts",
            got=f"llm={type(llm).__name__}",
            expected=f"{index.generator.name}, which answers if llm is left out",
            next_step="leave llm out; another LLM may condense questions: condense_llm=...",
        )
    options = _with_settings_of(index, llm, options)
    known = _CONVERSATION | _NOTHING | {"generation"}
    if mode != "simple":
        known |= _READING | set(retriever_options)
    if mode not in ("simple", "context"):
        known |= _CONDENSING
    _refuse(mode, set(options) - known, known - _NOTHING)
    return _made(index, mode, {k: v for k, v in options.items() if v is not None and k not in _NOTHING})


def _with_settings_of(index: IndexAsking, llm: object, options: dict[str, Any]) -> dict[str, Any]:
    """Options with what the index's own LLM says of answers.

    Raises:
        ConfigurationError: It says what the chat engine is told as well, or has a prompt of its own.
    """
    if not isinstance(llm, ConceptLLM):
        return options
    if llm.system_prompt:
        raise ConfigurationError(
            "the LLM has a system prompt, which a chat engine is told itself",
            got=f"{llm.system_prompt!r:.80}",
            next_step="pass system_prompt= to the chat engine",
        )
    if llm.generation == index.generator.config:
        return options
    if options.get("generation") is not None:
        raise ConfigurationError(
            "an option is given twice", got="generation, and an llm that says it", next_step="leave one out"
        )
    return {**options, "generation": llm.generation}


def _mode(given: object) -> str:
    mode = str(getattr(given, "value", given))
    if mode in ("react", "openai"):
        raise ConfigurationError(
            "LlamaIndex has removed this chat mode",
            got=mode,
            expected=", ".join(MODES),
            next_step="make an agent (ReActAgent, FunctionAgent) with a QueryEngineTool over index.as_query_engine()",
        )
    if mode not in MODES:
        raise ConfigurationError(
            "chat mode unknown", got=mode, expected=", ".join(MODES), next_step="pass one of them as chat_mode"
        )
    return "condense_plus_context" if mode == "best" else mode


def _refuse(mode: str, unheeded: Collection[str], known: Collection[str]) -> None:
    if unheeded:
        raise ConfigurationError(
            f"a chat engine of mode {mode} has no such option",
            got=", ".join(sorted(unheeded)),
            expected=", ".join(sorted(known)),
            next_step="leave it out",
        )


def _made(index: IndexAsking, mode: str, options: dict[str, Any]) -> ConceptChatEngine:
    generation = options.pop("generation", None) or index.generation
    if mode != "simple":
        options.setdefault("similarity_top_k", 4)
    count = _counter(index)
    memory = _memory(index, options, count)
    context_prompt = _context_prompt(options)
    callback_manager = options.get("callback_manager")
    condenser = _condenser(index, mode, options, count)
    if mode == "simple" or callback_manager is None:
        options.pop("callback_manager", None)  # else the retriever's, too
    after = postprocessors(options.pop("node_postprocessors", None))
    chat_mode = _chat_mode(mode, options)
    reading: dict[str, Any] = {name: options.pop(name) for name in _FIXED if name in options}
    reading |= {"generation": generation, "callback_manager": callback_manager, "queued": index.pending.among}

    def synthesizer(turn: Turn, streaming: bool) -> TurnSynthesizer:
        return TurnSynthesizer(index.library, index.generator, turn, context_prompt, streaming=streaming, **reading)

    return ConceptChatEngine(
        synthesizer,
        memory,
        chat_mode,
        retriever=None if mode == "simple" else index.as_retriever(**options),
        condenser=condenser,
        node_postprocessors=after,
        callback_manager=callback_manager,
    )


def _counter(index: IndexAsking) -> Callable[[str], int]:
    tokenizer = index.generator.tokenizer
    return lambda text: len(encode_plain(tokenizer, text)["input_ids"])


def _memory(index: IndexAsking, options: dict[str, Any], count: Callable[[str], int]) -> BaseMemory:
    """The conversation: the memory given, or one that keeps all; what of it a prompt holds, its planner decides."""
    given, history = options.pop("memory", None), options.pop("chat_history", None)
    memory: BaseMemory
    if given is None:
        memory = ChatMemoryBuffer.from_defaults(
            token_limit=index.generator.window,
            tokenizer_fn=lambda text: [0] * count(text),  # counted only
        )
    elif isinstance(given, BaseMemory):
        memory = given
    else:
        raise ConfigurationError(
            "memory is none of LlamaIndex's",
            got=type(given).__name__,
            expected="Memory, ChatMemoryBuffer, ChatSummaryMemoryBuffer or another BaseMemory",
            next_step="pass an object, not its class",
        )
    if history is not None:
        memory.set(messages(history, "chat_history"))  # its own list: some memories add to the one they are given
    return memory


def _chat_mode(mode: str, options: dict[str, Any]) -> ChatMode:
    system, prefix = options.pop("system_prompt", None), options.pop("prefix_messages", None)
    if system is not None and prefix is not None:
        raise ConfigurationError(
            "system_prompt and prefix_messages exclude each other", next_step="put it into prefix_messages"
        )
    if not isinstance(system, str | None):
        raise ConfigurationError("system_prompt is no text", got=f"a {type(system).__name__}", expected="text")
    head: list[Message] = []
    if prefix is not None:
        system, head = head_of(messages(prefix, "prefix_messages"))
    elif system is None:
        system = "" if mode == "simple" else SYSTEM
    condensed = mode == "condense_question"
    return ChatMode(reads_history=not condensed, answers_condensed=condensed, system=system, head=head)


def _context_prompt(options: dict[str, Any]) -> BasePromptTemplate | None:
    given = {name: options.pop(name) for name in ("context_prompt", "context_template") if name in options}
    if len(given) > 1:
        raise ConfigurationError(
            "context_prompt and context_template are two names of one option", next_step="leave one out"
        )
    for name, template in given.items():
        made = PromptTemplate(template) if isinstance(template, str) else template
        if not isinstance(made, BasePromptTemplate) or isinstance(made, ChatPromptTemplate):
            kind = type(template).__name__
        elif "context_str" not in made.template_vars:
            kind = f"one of {', '.join(made.template_vars) or 'no variables'}"
        else:
            return made
        raise ConfigurationError(
            f"{name} is no template for the newest user turn",
            got=kind,
            expected="text or a PromptTemplate with {context_str}, and perhaps {query_str}",
            next_step="put system turns into system_prompt or prefix_messages",
        )
    return None


def _condenser(index: IndexAsking, mode: str, options: dict[str, Any], count: Callable[[str], int]) -> Condenser | None:
    names = ("condense_prompt", "condense_question_prompt")
    given = [options.pop(name) for name in names if name in options]
    llm, skip, verbose = (options.pop(name, None) for name in ("condense_llm", "skip_condense", "verbose"))
    if len(given) > 1:
        raise ConfigurationError(f"{' and '.join(names)} are two names of one option", next_step="leave one out")
    if mode in ("simple", "context") or skip:
        return None
    if llm is not None and not isinstance(llm, LLM):
        raise ConfigurationError(
            "condense_llm is no LLM of LlamaIndex", got=type(llm).__name__, next_step="pass an object that is one"
        )
    default = DEFAULT_TEMPLATE if mode == "condense_question" else DEFAULT_CONDENSE_PROMPT_TEMPLATE
    prompt = given[0] if given else default
    template = PromptTemplate(prompt) if isinstance(prompt, str) else prompt
    if not isinstance(template, BasePromptTemplate) or not {"chat_history", "question"} <= {*template.template_vars}:
        raise ConfigurationError(
            "condensing prompt has no place for the conversation",
            got=", ".join(getattr(template, "template_vars", [])) or type(prompt).__name__,
            expected="{chat_history} and {question}",
            next_step="add both to the template",
        )
    if llm is None:
        llm = ConceptLLM(index.generator)
        if (manager := options.get("callback_manager")) is not None:
            llm.callback_manager = manager
    return Condenser(llm, template, count, verbose=bool(verbose))


def _stock_simple(llm: object, options: dict[str, Any]) -> SimpleChatEngine:
    """LlamaIndex's own engine, for an LLM that is not ours."""
    if not isinstance(llm, LLM):
        raise ConfigurationError(
            "llm is no LLM of LlamaIndex",
            got=type(llm).__name__,
            next_step="pass an object that is one, or leave it out",
        )
    known = _CONVERSATION - {"callback_manager"}
    _refuse("simple with another LLM", set(options) - known - _NOTHING, known)
    return SimpleChatEngine.from_defaults(llm=llm, **{k: v for k, v in options.items() if k not in _NOTHING})

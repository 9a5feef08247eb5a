"""A thin LlamaIndex LLM over a generator, for the stock components that insist on one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, ClassVar, NoReturn, Self

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.instrumentation.events.llm import LLMStructuredPredictEndEvent, LLMStructuredPredictStartEvent
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import LLM
from llama_index.core.prompts import BasePromptTemplate
from llama_index_instrumentation import get_dispatcher

from compllm_rag.config import GenerationConfig
from compllm_rag.generation.base import Generation, Generator
from compllm_rag.generation.named import LLMName, named_generator
from compllm_rag.handles import ProcessBound
from compllm_rag.llamaindex.decoding import generation_of
from compllm_rag.llamaindex.streams import in_thread
from compllm_rag.llamaindex.structured import Model, parsed, refuse_stream, schema_of, with_instructions
from compllm_rag.llamaindex.templates import text_of
from compllm_rag.llamaindex.tracing import raw_of
from compllm_rag.prompt import Message, PromptPlan, PromptTemplate

dispatcher = get_dispatcher(__name__)


class ConceptLLM(ProcessBound, LLM):
    """The target LLM (reader merged) as a LlamaIndex LLM: text in, text out.

    Each call takes LlamaIndex's names of settings (`max_tokens`, `temperature`, `top_p`, `stop`, ...) and those of
    `GenerationConfig`, and refuses others. Turns with anything but text are refused.

    Args:
        generator: Any that runs the target LLM; the one that also answers from concepts.
        **kwargs: The same settings, for all calls that do not say otherwise; and LlamaIndex's own of an `LLM`
            (`callback_manager`, `system_prompt`, ...).

    Raises:
        ConfigurationError: There is no such option, or its value is out of bounds.
    """

    _opened_by: ClassVar[str] = "make one there, over the generator of that process"
    _generator: Generator = PrivateAttr()
    _defaults: GenerationConfig = PrivateAttr()

    def __init__(self, generator: Generator, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name) for name in [*kwargs] if name in type(self).model_fields}
        super().__init__(**own)
        self._generator, self._defaults = generator, generation_of(generator.config, kwargs)

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's serialised form."""
        return "ConceptLLM"

    @property
    def generation(self) -> GenerationConfig:
        """Settings of calls that do not say otherwise."""
        return self._defaults

    def runs(self, generator: Generator) -> bool:
        """Whether it is this generator that answers."""
        return self._generator is generator

    @property
    def metadata(self) -> LLMMetadata:
        """Window, output length and name."""
        return LLMMetadata(
            context_window=self._generator.window,
            num_output=self._defaults.max_new_tokens,
            is_chat_model=True,
            model_name=self._generator.name,
        )

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """The LLM by its name, with its settings, for `from_dict`."""
        name, settings = LLMName.of(self._generator), self._defaults.model_dump(mode="json")
        return {
            **super().to_dict(**kwargs),
            "llm": None if name is None else name.model_dump(mode="json"),
            "generation": settings,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any], generator: Generator | None = None, **kwargs: Any) -> Self:
        """What `to_dict` described.

        Args:
            data: The description.
            generator: Runs the LLM; None loads the one that `data` names when it is first asked.
            **kwargs: Fields to change.

        Raises:
            ConfigurationError: No LLM is named: it was an object in memory, or ran elsewhere.
        """
        named = ("class_name", "llm", "generation")
        fields = {name: value for name, value in data.items() if name not in named}
        settings = data.get("generation") or {}
        return cls(generator or named_generator(data), **{**settings, **fields, **kwargs})

    def to_payload(self) -> dict[str, Any]:
        """What observers are told of this LLM: name, window and settings."""
        return {**super().to_payload(), **self._defaults.model_dump()}

    def _plan(self, messages: Sequence[ChatMessage]) -> PromptPlan:
        turns = [Message(m.role.value, (text_of(m),)) for m in messages]
        return PromptPlan(tuple(PromptTemplate(self._generator.tokenizer).spans(turns, [])))

    def _config(self, kwargs: dict[str, Any]) -> GenerationConfig:
        return generation_of(self._defaults, kwargs)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        [made] = self._generator.generate([self._plan(messages)], self._config(kwargs))
        return self._chat_response(made)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer a conversation, piece by piece."""
        stream = self._generator.stream(self._plan(messages), self._config(kwargs))

        def pieces() -> ChatResponseGen:
            text = ""
            for piece in stream:
                text += piece
                yield ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text), delta=piece)
            yield self._chat_response(stream.result, delta="")  # says what the answer took

        return pieces()

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt, sent as one user turn."""
        [made] = self._generator.generate([self._user(prompt)], self._config(kwargs))
        return CompletionResponse(text=made.text, raw=raw_of(made, self._generator.name))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Answer a prompt, piece by piece."""
        stream = self._generator.stream(self._user(prompt), self._config(kwargs))

        def pieces() -> CompletionResponseGen:
            text = ""
            for piece in stream:
                text += piece
                yield CompletionResponse(text=text, delta=piece)
            made = stream.result
            yield CompletionResponse(text=made.text, delta="", raw=raw_of(made, self._generator.name))

        return pieces()

    def _chat_response(self, made: Generation, delta: str | None = None) -> ChatResponse:
        message = ChatMessage(role=MessageRole.ASSISTANT, content=made.text)
        return ChatResponse(message=message, delta=delta, raw=raw_of(made, self._generator.name))

    def _user(self, prompt: str) -> PromptPlan:
        return self._plan([ChatMessage(role=MessageRole.USER, content=prompt)])

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat` in a thread."""
        [made] = await asyncio.to_thread(self._generator.generate, [self._plan(messages)], self._config(kwargs))
        return self._chat_response(made)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """`stream_chat` in a thread."""
        stream = self._generator.stream(self._plan(messages), self._config(kwargs))

        async def pieces() -> AsyncGenerator[ChatResponse, None]:
            text = ""
            async for piece in in_thread(stream):
                text += piece
                yield ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text), delta=piece)
            yield self._chat_response(stream.result, delta="")

        return pieces()

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """`complete` in a thread."""
        [made] = await asyncio.to_thread(self._generator.generate, [self._user(prompt)], self._config(kwargs))
        return CompletionResponse(text=made.text, raw=raw_of(made, self._generator.name))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """`stream_complete` in a thread."""
        stream = self._generator.stream(self._user(prompt), self._config(kwargs))

        async def pieces() -> AsyncGenerator[CompletionResponse, None]:
            text = ""
            async for piece in in_thread(stream):
                text += piece
                yield CompletionResponse(text=text, delta=piece)
            made = stream.result
            yield CompletionResponse(text=made.text, delta="", raw=raw_of(made, self._generator.name))

        return pieces()

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """Answer a prompt with an object: tokens that its schema does not allow are never chosen.

        Args:
            output_cls: A pydantic model.
            prompt: Template of the prompt.
            llm_kwargs: Settings of this call.
            **prompt_args: What fills the template.

        Raises:
            StructuredAnswerError: The answer was cut off, or breaks a rule that no schema can tell.
            MissingExtraError: The extra `structured` is not installed.
        """
        dispatcher.event(
            LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=prompt_args)
        )
        messages, options = self._structured(output_cls, prompt, llm_kwargs, prompt_args)
        made = self._object(output_cls, self.chat(messages, **options), options)
        dispatcher.event(LLMStructuredPredictEndEvent(output=made))
        return made

    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """`structured_predict` in a thread."""
        dispatcher.event(
            LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=prompt_args)
        )
        messages, options = self._structured(output_cls, prompt, llm_kwargs, prompt_args)
        made = self._object(output_cls, await self.achat(messages, **options), options)
        dispatcher.event(LLMStructuredPredictEndEvent(output=made))
        return made

    def stream_structured_predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: there are no streams of objects.

        Raises:
            ConfigurationError: Always.
        """
        refuse_stream()

    async def astream_structured_predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: there are no streams of objects.

        Raises:
            ConfigurationError: Always.
        """
        refuse_stream()

    def _structured(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None,
        prompt_args: dict[str, Any],
    ) -> tuple[list[ChatMessage], dict[str, Any]]:
        """Messages and settings of a call whose answer is an object."""
        schema = schema_of(output_cls)
        messages = self._extend_messages(prompt.format_messages(llm=self, **prompt_args))
        return with_instructions(messages, output_cls), {**(llm_kwargs or {}), "json_schema": schema}

    def _object(self, output_cls: type[Model], response: ChatResponse, options: dict[str, Any]) -> Model:
        raw: Any = response.raw
        limit = self._config(options).max_new_tokens
        return parsed(output_cls, response.message.content or "", finish_reason=raw["finish_reason"], limit=limit)

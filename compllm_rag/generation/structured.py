"""Answers that follow a JSON schema: tokens that would leave it are never chosen (xgrammar)."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from compllm_rag.errors import ConfigurationError, MissingExtraError
from compllm_rag.models.llm import TargetLLM


class SchemaConstraint:
    """Keeps each row of a batch within a JSON schema.

    Args:
        llm: Whose tokens are chosen.
        schema: JSON schema, as text.
        rows: Prompts of the batch.

    Raises:
        MissingExtraError: xgrammar is not installed.
        ConfigurationError: The schema is none, or has what no grammar can be made of.
    """

    def __init__(self, llm: TargetLLM, schema: str, rows: int) -> None:
        self._xgrammar = _library()
        self._grammar = _compiler(llm).compiled(schema)
        self._matchers = [self._xgrammar.GrammarMatcher(self._grammar) for _ in range(rows)]

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (batch, vocab_size) with the tokens that may not come now at minus infinity."""
        rows, vocab_size = logits.shape
        allowed = self._xgrammar.allocate_token_bitmask(rows, vocab_size)  # (batch, vocab_size / 32), all allowed
        for row, matcher in enumerate(self._matchers):
            if not matcher.is_terminated():  # what a row says once it has ended is not looked at
                matcher.fill_next_token_bitmask(allowed, row)
        masked = logits.clone()
        self._xgrammar.apply_token_bitmask_inplace(masked, allowed.to(logits.device))
        return masked

    def accept(self, tokens: Sequence[int]) -> None:
        """Take note of the token of each row that was chosen."""
        for matcher, token in zip(self._matchers, tokens, strict=True):
            if not matcher.is_terminated():
                matcher.accept_token(token)


class _Compiler:
    """Grammars over the tokens of one LLM; the last few are kept."""

    def __init__(self, llm: TargetLLM) -> None:
        xgrammar = _library()
        # The matrix of logits may be wider than the tokenizer.
        vocab_size = int(llm.model.get_output_embeddings().weight.shape[0])
        self._stop = sorted(llm.stop_ids())
        info = xgrammar.TokenizerInfo.from_huggingface(llm.tokenizer, vocab_size=vocab_size, stop_token_ids=self._stop)
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1)
        self.compiled = functools.lru_cache(maxsize=16)(self._compile)

    def _compile(self, schema: str) -> Any:
        try:
            # No white space of the LLM's own choice: a small one would go on with it until the limit.
            return self._compiler.compile_json_schema(schema, any_whitespace=False)
        except (RuntimeError, ValueError) as error:
            raise ConfigurationError(
                "the schema of the answer cannot be followed",
                got=" ".join(str(error).split())[:200],
                expected="a JSON schema that xgrammar makes a grammar of",
                next_step="make the model of the answer simpler",
            ) from error


_COMPILERS: weakref.WeakKeyDictionary[TargetLLM, _Compiler] = weakref.WeakKeyDictionary()


def _compiler(llm: TargetLLM) -> _Compiler:
    if llm not in _COMPILERS:
        _COMPILERS[llm] = _Compiler(llm)
    return _COMPILERS[llm]


def _library() -> Any:
    try:
        import xgrammar
    except ImportError as error:
        raise MissingExtraError(
            "answers of a given structure need xgrammar",
            got="no such package",
            expected="the extra `structured`",
            next_step="pip install 'compllm-rag[structured]'",
        ) from error
    return xgrammar

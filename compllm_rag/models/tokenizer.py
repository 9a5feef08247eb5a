"""A model's tokenizer alone, for what needs no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compllm_rag.errors import UnsupportedModelError
from compllm_rag.fingerprint import mapping_digest
from compllm_rag.models import resolve_model
from compllm_rag.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        source: Alias, folder or `org/name@revision`.

    Raises:
        UnsupportedModelError: transformers cannot load it.
        UnknownModelError, ModelFetchError, DigestMismatchError, UnsafeModelError: See `resolve_model`.
    """
    from transformers import AutoTokenizer

    files = resolve_model(source)
    try:
        with quiet_transformers():
            made: Any = AutoTokenizer.from_pretrained(files.path, trust_remote_code=False, local_files_only=True)
    except MemoryError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower on a file of a later release
        raise UnsupportedModelError(
            "transformers cannot load this model's tokenizer",
            got=f"{files.path} ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]})",
            expected="a fast tokenizer (tokenizer.json)",
            next_step="name another model, or update transformers",
        ) from error
    tokenizer: PreTrainedTokenizerBase = made
    return tokenizer


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of the tokens and their ids."""
    return mapping_digest("compllm-rag/vocabulary", {token: str(i) for token, i in tokenizer.get_vocab().items()})

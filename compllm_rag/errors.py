"""Every error this package raises on purpose.

Each one says what went wrong, what was got, what was expected and what to do next. Each derives from
`CompLLMError` and from the builtin that a caller would catch anyway, so `except FileNotFoundError` keeps working.
"""

from __future__ import annotations


class CompLLMError(Exception):
    """Base of all errors raised on purpose by this package.

    Args:
        what: What went wrong, in one clause.
        got: What was met (a value, a path, a digest); left out when None.
        expected: What would have been right; left out when None.
        next_step: What the reader should do now; left out when None.
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, next_step: str | None = None) -> None:
        self.what, self.got, self.expected, self.next_step = what, got, expected, next_step
        super().__init__(self._message())

    def _message(self) -> str:
        facts = []
        if self.got is not None:
            facts.append(f"got {self.got}")
        if self.expected is not None:
            facts.append(f"expected {self.expected}")
        text = f"{self.what}: {', '.join(facts)}" if facts else self.what
        text = f"{text}. Next step: {self.next_step}" if self.next_step else text
        return text.encode(errors="backslashreplace").decode()  # half a character in a path cannot be printed

    def __str__(self) -> str:
        return self._message()

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the trip between processes (keyword arguments are not in `args`)."""
        return (_rebuild, (type(self), self.what, str_or_none(self.got), str_or_none(self.expected), self.next_step))


def str_or_none(value: object) -> str | None:
    """Text of a value, None kept."""
    return None if value is None else str(value)


def _rebuild(
    cls: type[CompLLMError], what: str, got: str | None, expected: str | None, next_step: str | None
) -> CompLLMError:
    return cls(what, got=got, expected=expected, next_step=next_step)


class UntrainedCompressorWarning(UserWarning):
    """Concepts are made without anything that was trained for this LLM, and lose more than trained ones."""


class StoreSettingsWarning(UserWarning):
    """The server of a shared concept store is set up so that it may lose records."""


class ConfigurationError(CompLLMError, ValueError):
    """A setting has a value that makes no sense."""


class RateOutOfReachError(ConfigurationError):
    """The compression rate cannot be reached at this segment length."""


class RateNotHeldError(ConfigurationError):
    """A passage is not kept at the rate that was asked for."""


class BudgetError(ConfigurationError):
    """What is to be kept does not fit the budget, however high the rates."""


class UnsupportedDtypeError(ConfigurationError):
    """The compute dtype is not one the device and this package support."""


class MissingExtraError(CompLLMError, ImportError):
    """A package is not installed that only an extra of this one brings."""


class StructuredAnswerError(CompLLMError, ValueError):
    """An answer is not the object that was asked for: cut off by the length limit, or refused by its own rules."""


class UnknownModelError(CompLLMError, LookupError):
    """No alias, folder or hub id answers to this name."""


class ModelFetchError(CompLLMError, ConnectionError):
    """A model could not be fetched: no network, no such package, hub not reachable."""


class DigestMismatchError(CompLLMError, ValueError):
    """A file's SHA-256 is not the pinned one."""


class UnsupportedModelError(CompLLMError, TypeError):
    """The model or its tokenizer cannot be used (no `inputs_embeds`, per-layer embeddings, slow tokenizer)."""


class UnsafeModelError(CompLLMError, ValueError):
    """The model folder asks for code or holds pickled weights; this package never runs either."""


class CorpusPathError(CompLLMError, FileNotFoundError):
    """A path named for ingestion does not exist."""


class EmptyCorpusError(CompLLMError, ValueError):
    """Nothing to ingest was found."""


class UnreadableFileError(CompLLMError, OSError):
    """A file exists but cannot be read as text."""


class PruneRefusedError(CompLLMError, OSError):
    """Documents were to be pruned, and not every file could be looked at; nothing was deleted."""


class DataFileError(CompLLMError, ValueError):
    """A file of questions or texts cannot be read, or holds nothing that can be used."""


class EvaluationDataError(CompLLMError, ValueError):
    """Training was pointed at data that is kept for evaluation."""


class DivergedError(CompLLMError, ArithmeticError):
    """Training reached a loss that is not finite; the last good checkpoint is kept."""


class StorageNotFoundError(CompLLMError, FileNotFoundError):
    """No storage lies at this path."""


class StorageMismatchError(CompLLMError, ValueError):
    """The storage was made with other settings than the ones asked for."""


class FingerprintMismatchError(StorageMismatchError):
    """Concepts were made by another compressor, tokenizer or target LLM."""


class EmbedderMismatchError(StorageMismatchError):
    """Vectors were made by another embedder, or have another dimension."""


class UnsupportedFormatError(CompLLMError, ValueError):
    """Something on disk was written in a format version this release does not read."""


class CorruptRecordError(CompLLMError, ValueError):
    """Stored bytes fail their checksum or their bounds."""


class InvalidConceptsError(CompLLMError, ValueError):
    """Concepts have a wrong shape, a wrong dtype, or hold NaN or infinite values."""


class MissingConceptsError(CompLLMError, LookupError):
    """Concepts are not in the store and the policy forbids to make them now."""


class StoreFullError(CompLLMError, OSError):
    """The disk or the size limit of the store is reached; nothing was evicted."""


class GeneratorUnavailableError(CompLLMError, ConnectionError):
    """A server that runs the LLM cannot be reached, has no time, or was lost on the way."""


class GeneratorRefusedError(CompLLMError, RuntimeError):
    """A server that runs the LLM refuses a request, or answers what makes no sense."""


class GeneratorMismatchError(CompLLMError, ValueError):
    """A server runs another LLM than the one that prompts are made for, or was started in another way."""


class StoreUnavailableError(CompLLMError, ConnectionError):
    """The server of a shared concept store cannot be reached, or does not let this client in."""


class UploadQueueFullError(CompLLMError, BlockingIOError):
    """The upload queue has no room for more documents now."""


class OverloadedError(CompLLMError, BlockingIOError):
    """As many prompts wait for an answer as may, or none is answered here any more."""


class StoreLockedError(CompLLMError, OSError):
    """Another process writes to this storage."""


class StoreReadOnlyError(CompLLMError, PermissionError):
    """The storage was opened for reading, or its folder cannot be written."""


class NotTransferableError(CompLLMError, TypeError):
    """Something that holds files and locks was to be pickled or copied."""


class WorkersFailedError(CompLLMError, RuntimeError):
    """Workers of an ingest could not encode all parts of the corpus; those they did are kept for the next run."""


class PromptTooLongError(CompLLMError, ValueError):
    """The prompt does not fit the window of the target LLM."""


class ReadBudgetError(PromptTooLongError):
    """Not even the smallest piece of a passage fits the budget that was set for reading."""


class NotCalibratedError(ConfigurationError, LookupError):
    """A time was given as a budget, and nobody has measured how fast this machine reads."""


class DeviceMemoryError(CompLLMError, MemoryError):
    """A GPU, or the machine, has no memory left, although the step was made as small as it can be."""

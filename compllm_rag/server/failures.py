"""What goes wrong as statuses and bodies; texts of documents and questions stay out of logs."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping

from compllm_rag import errors
from compllm_rag.server.schemas import ErrorBody, ErrorDetail

logger = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
    503: "overloaded_error", 500: "server_error", 507: "server_error",
}  # fmt: skip

# The first that fits counts. A damaged storage is nothing that a client could mend: 500.
_KNOWN: tuple[tuple[type[Exception], int, str], ...] = (
    (errors.UploadQueueFullError, 429, "upload_queue_full"),
    (errors.StoreLockedError, 409, "storage_locked"),
    (errors.StoreFullError, 507, "storage_full"),
    (errors.StoreUnavailableError, 503, "store_unavailable"),
    (errors.MissingConceptsError, 409, "concepts_missing"),
    (errors.StoreReadOnlyError, 403, "not_allowed"),
    (errors.PromptTooLongError, 422, "prompt_too_long"),
    (errors.DeviceMemoryError, 503, "overloaded"),
    (errors.OverloadedError, 503, "overloaded"),
    (errors.GeneratorUnavailableError, 503, "generator_unavailable"),
    (errors.GeneratorMismatchError, 503, "generator_unavailable"),
    (errors.GeneratorRefusedError, 503, "generator_unavailable"),
    (errors.EmptyCorpusError, 400, "empty_document"),
    (errors.UnreadableFileError, 400, "bad_request"),
    (errors.StorageNotFoundError, 404, "no_such_namespace"),
)
RETRY_AFTER_S = {
    "upload_queue_full": 10, "storage_locked": 2, "overloaded": 5, "store_unavailable": 10, "generator_unavailable": 5,
    "shutting_down": 10,
}  # fmt: skip


class Refusal(Exception):
    """A request that is refused.

    Args:
        status: Of HTTP.
        code: For programs; docs/guide/server.md lists them.
        message: What is wrong, and what to do.
        param: The field that is meant.
        retry_after_s: When to come again.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after_s = retry_after_s if retry_after_s is not None else RETRY_AFTER_S.get(code)

    @property
    def body(self) -> ErrorBody:
        """What the client is told."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return ErrorBody(error=ErrorDetail(message=self.message, type=kind, code=self.code, param=self.param))

    @property
    def headers(self) -> Mapping[str, str]:
        """`Retry-After`, and what challenges to send a key."""
        made = {}
        if self.retry_after_s is not None:
            made["Retry-After"] = str(max(1, round(self.retry_after_s)))
        if self.status == 401:
            made["WWW-Authenticate"] = "Bearer"
        return made


def refusal_of(error: Exception) -> Refusal:
    """Any error as what the client is told.

    Errors of ours say what to do; of all others, and of damage, the client learns only that it is not its fault.
    """
    if isinstance(error, Refusal):
        return error
    for kind, status, code in _KNOWN:
        if isinstance(error, kind):
            return Refusal(status, code, str(error))
    if isinstance(error, errors.ConfigurationError):
        return Refusal(422, "invalid_request", str(error))
    log_fault(error)
    return internal()


def internal() -> Refusal:
    """What a client learns of a fault that is not its own."""
    return Refusal(500, "internal", "the server could not do this; its log says why. Next step: tell whoever runs it")


def code_of(error: Exception) -> str:
    """What is wrong, as the code that a client would be told."""
    return next((code for kind, _, code in _KNOWN if isinstance(error, kind)), "internal")


def log_fault(error: BaseException) -> None:
    """Log where an error happened, without its message: that may quote a document or a question."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    where = " < ".join(
        f"{frame.name} ({frame.filename.rsplit('/', 1)[-1]}:{frame.lineno})" for frame in reversed(frames)
    )
    logger.error("%s in %s", type(error).__name__, where)

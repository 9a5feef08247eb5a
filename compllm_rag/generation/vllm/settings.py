"""Settings of a vLLM server's client."""

from __future__ import annotations

import os
from typing import Self

from pydantic import ConfigDict, Field, SecretStr, ValidationError, field_validator

from compllm_rag.config import Frozen
from compllm_rag.errors import ConfigurationError

KEY_VARIABLE = "COMPLLM_VLLM_API_KEY"
"""The environment variable with the server's API key: an address stands in process lists, a key must not."""


class VLLMSettings(Frozen):
    """How a vLLM server is asked."""

    model_config = ConfigDict(hide_input_in_errors=True)  # a key may be among it

    model: str | None = Field(default=None, description="name under which it serves the LLM; None: the only one")
    api_key: SecretStr | None = Field(default=None, description="that it was started with")
    connect_s: float = Field(default=5.0, gt=0.0, description="seconds a connection may take")
    timeout_s: float = Field(default=120.0, gt=0.0, description="seconds to the first token, and from one to the next")
    retries: int = Field(default=4, ge=0, le=20, description="further tries before the first token")
    longest_wait_s: float = Field(default=20.0, ge=0.0, description="most seconds between two tries")
    concurrency: int = Field(default=8, ge=1, le=1024, description="requests at a time; others wait here")
    max_payload_bytes: int = Field(default=64 << 20, ge=1, description="longest request")
    recheck_s: float = Field(
        default=30.0, ge=0.0, description="seconds without a word from it after which it is checked again"
    )
    cache_salt: str | None = Field(
        default=None, min_length=1, max_length=1024, description="who shares it shares the server's prefix cache"
    )
    tolerance: float = Field(
        default=0.1, gt=0.0, description="most mean difference of log-probabilities from the same LLM in this process"
    )

    @field_validator("api_key")
    @classmethod
    def _fits_a_header(cls, key: SecretStr | None) -> SecretStr | None:
        told = "" if key is None else key.get_secret_value()
        if told != told.strip() or not all(" " <= sign <= "~" for sign in told):
            raise ValueError("an API key has no line breaks, blanks at its ends or signs beyond ASCII")
        return key

    @classmethod
    def from_environment(cls, model: str | None = None) -> Self:
        """Settings with the API key of the environment (`COMPLLM_VLLM_API_KEY`).

        Raises:
            ConfigurationError: The key can be none.
        """
        key = os.environ.get(KEY_VARIABLE, "").strip()  # of a file that ends with a line break, as secrets often do
        try:
            return cls(model=model, api_key=SecretStr(key) if key else None)
        except ValidationError as error:
            raise ConfigurationError(
                f"settings of the vLLM server make no sense, {KEY_VARIABLE} among them",
                got=str(error.errors()[0]["msg"]),
                next_step="set the variable to the key that the server was started with",
            ) from None

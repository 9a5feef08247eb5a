"""Limits of the server; each is a flag of `compllm-rag serve`."""

from __future__ import annotations

from pydantic import Field

from compllm_rag.config import Frozen


class ServerSettings(Frozen):
    """How much a server takes on."""

    generations: int = Field(default=8, ge=1, le=64, description="answers made at a time, and decoded together")
    waiting: int = Field(default=32, ge=0, le=10_000, description="answers that may wait for their turn")
    max_tokens: int = Field(default=512, ge=1, description="longest answer that may be asked for, in tokens")
    default_tokens: int = Field(default=128, ge=1, description="longest answer where nothing is asked for")
    max_upload_mb: int = Field(default=32, ge=1, le=4096, description="most megabytes of an upload")
    max_queue: int = Field(default=1000, ge=1, description="documents of a namespace that may wait for concepts")
    requests_per_minute: int = Field(default=600, ge=1, description="of each key, or address where there are no keys")
    grace_s: float = Field(default=30.0, ge=0.0, description="seconds that what runs may take to end at shutdown")

    @property
    def upload_bytes(self) -> int:
        """Most bytes of an upload."""
        return self.max_upload_mb << 20

    @property
    def request_bytes(self) -> int:
        """Most bytes of any other request."""
        return 1 << 20

    @property
    def answer_tokens(self) -> int:
        """Longest answer where a request says nothing."""
        return min(self.default_tokens, self.max_tokens)

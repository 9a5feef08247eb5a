"""From names to a ready compressor: target LLM, reader adapter and compressor that belong together."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import torch

from compllm_rag.compression.compressor import Compressor
from compllm_rag.compression.deep import DeepCompressor
from compllm_rag.compression.pretrained import read_compressor
from compllm_rag.compression.segmentation import unit_length_for
from compllm_rag.compression.spec import ConceptCompressor
from compllm_rag.config import DEFAULT_LLM, LONGEST_UNIT, Codec, CompressorConfig, Pin, checked
from compllm_rag.errors import ConfigurationError
from compllm_rag.models.halves import default_entry_layer
from compllm_rag.models.llm import TargetLLM
from compllm_rag.prompt import QAPrompt

logger = logging.getLogger(__name__)

AUTO = "auto"


def shipped_adapter(llm: str, kind: str) -> Path | None:
    """Folder of the adapter that ships for an LLM, None where there is none.

    Args:
        llm: The LLM's alias.
        kind: `reader`, `deep` or `compressor`.
    """
    if "/" in llm or llm in (".", ".."):
        return None
    folder = Path(str(resources.files("compllm_rag"))) / "data" / "adapters" / llm / kind
    return folder if folder.is_dir() else None


def shipped_compressor(llm: str, codec: Codec | str, entry_layer: int | None = None) -> Path | None:
    """Folder of the compressor that ships for an LLM with its shipped reader, None where there is none.

    Args:
        llm: The LLM's alias.
        codec: Of which kind.
        entry_layer: Of deep concepts: at which layer they are to enter; None leaves that to what ships.
    """
    if codec != "deep":
        return shipped_adapter(llm, "compressor") if entry_layer is None else None
    found = shipped_adapter(llm, "deep")
    return found if found is None or entry_layer in (None, _entry_layer_of(found)) else None


def compressor_folder(
    llm: str, compressor: str | Path | None, codec: Codec | str, entry_layer: int | None
) -> Path | None:
    """The folder that a user's word for a compressor means; None for an untrained one.

    Args:
        llm: The LLM's alias.
        compressor: A folder, `auto` or None; see `load_compressor_for`.
        codec: See `load_compressor_for`.
        entry_layer: See `load_compressor_for`.
    """
    if compressor is None:
        return None
    return shipped_compressor(llm, codec, entry_layer) if compressor == AUTO else Path(compressor)


def _entry_layer_of(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]["entry_layer"])


def load_compressor_for(
    llm: str = DEFAULT_LLM,
    *,
    reader: str | Path | None = AUTO,
    compressor: str | Path | None = AUTO,
    codec: Codec | str = "deep",
    entry_layer: int | None = None,
    other_reader: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    cache_dir: Path | None = None,
    offline: bool = False,
    progress: Callable[[str, float | None], None] | None = None,
) -> ConceptCompressor:
    """Load an LLM with its reader and its compressor.

    Args:
        llm: Alias, local folder, or `org/name@revision`.
        reader: Folder of a reader adapter; `auto` takes the shipped one where there is one, None none.
        compressor: Folder of a compressor; `auto` takes the shipped one where there is one and the reader is the
            shipped one too, else the untrained one; None takes the untrained one.
        codec: Where no folder is given: `deep`, concepts that enter at a middle layer, or `input`, those of CompLLM at
            the input embeddings.
        entry_layer: Of deep concepts: L, with `auto` of the compressor that ships for this layer, where there is one;
            None takes the layer of the one that ships, or of untrained ones half the LLM's layers.
        other_reader: Take the compressor, with `auto` the shipped one, although it was made with another reader of this
            LLM: to be trained further. See `read_compressor`.
        dtype: See `TargetLLM.from_pretrained`.
        device: See `TargetLLM.from_pretrained`.
        device_map: See `TargetLLM.from_pretrained`.
        cache_dir: Where fetched models lie.
        offline: Never touch the network.
        progress: See `resolve_model`.

    Raises:
        ConfigurationError: There is no such codec or entry layer, or the compressor has another entry layer.
        FingerprintMismatchError: The compressor was made for another LLM or reader.
        UnknownModelError, ModelFetchError, DigestMismatchError, UnsafeModelError: See `resolve_model`.
    """
    if codec not in get_args(Codec):
        raise ConfigurationError(
            "unknown codec", got=codec, expected=" or ".join(get_args(Codec)), next_step="leave it out for deep"
        )
    own = shipped_adapter(llm, "reader") if reader == AUTO else (Path(reader) if reader is not None else None)
    target = TargetLLM.from_pretrained(
        llm,
        reader=own,
        dtype=dtype,
        device=device,
        device_map=device_map,
        cache_dir=cache_dir,
        offline=offline,
        progress=progress,
    )
    folder = compressor_folder(llm, compressor, codec, entry_layer)
    if compressor == AUTO and reader != AUTO and not other_reader:
        folder = None  # what ships was made with the reader that ships
    made: ConceptCompressor
    if folder is not None:
        made = load_compressor(folder, target, other_reader=other_reader)
    else:
        made = untrained_deep(target, entry_layer) if codec == "deep" else Compressor(target)
    if entry_layer not in (None, made.config.entry_layer):
        raise ConfigurationError(
            "the compressor has another entry layer",
            got=entry_layer,
            expected=made.config.entry_layer,
            next_step="leave it out, or take untrained deep concepts",
        )
    return made


def load_compressor(folder: str | Path, llm: TargetLLM | None = None, **options: Any) -> ConceptCompressor:
    """Load a compressor of either kind; arguments and errors as of `read_compressor`."""
    saved = read_compressor(folder, llm, **options)
    made = DeepCompressor.of(saved) if saved.config.deep else Compressor.of(saved)
    logger.info("loaded compressor %s of LLM %s", made.fingerprint[:16], made.llm.source)
    return made


def pinned(compressor: ConceptCompressor, pins: Sequence[Pin]) -> DeepCompressor:
    """The same deep concepts, of other tokens: those of pinned words come first.

    It has a fingerprint of its own, so that its concepts are not taken for those without pins. A new storage takes it
    as `ConceptIndex.create(folder, compressor=...)`.

    Args:
        compressor: Of deep concepts; its weights are copied.
        pins: Which words; see `compllm_rag.compression.pins`. None of them gives the compressor without pins.

    Raises:
        ConfigurationError: It is of concepts at the input embeddings, or there is no such pin.
    """
    return _remade(compressor, "pins are", pins=tuple(sorted(set(pins))))


def with_unit_length(compressor: ConceptCompressor, unit_length: int) -> DeepCompressor:
    """The same deep concepts, made of longer or shorter runs of text at once; see `CompressorConfig.unit_length`.

    Below the entry layer no unit sees another, so that a chunk loses least as a single one. It has a fingerprint of
    its own: from the second unit of a text on, its concepts are other ones. What was learned beside the compressor,
    losses of rates and the relevance of sentences, goes with it, learned from units as they were.

    Args:
        compressor: Of deep concepts; its weights are copied.
        unit_length: Most tokens of a unit.

    Raises:
        ConfigurationError: It is of concepts at the input embeddings, or no unit can be as long, or as short.
    """
    made = _remade(compressor, "units are", unit_length=unit_length)
    window = compressor.llm.window - len(made.config.opening)
    if unit_length > max(window, compressor.config.longest_unit):
        raise ConfigurationError(
            "the LLM does not read units as long as that",
            got=unit_length,
            expected=f"at most {window}, its window of {compressor.llm.window} without the prompt's opening",
            next_step="choose shorter ones, or smaller chunks",
        )
    if compressor.losses is not None:
        made.losses = compressor.losses.model_copy(update={"compressor": made.fingerprint})
    if compressor.interaction is not None:
        made.interaction = compressor.interaction.beside(made.fingerprint)
    return made


def with_room_for_chunks(compressor: ConceptCompressor, chunk_size: int) -> ConceptCompressor:
    """The compressor with units that hold a chunk of this size, as far as units go; itself where they do.

    Args:
        compressor: Of either kind; segments of concepts at the input embeddings are no chunks.
        chunk_size: Tokens of a chunk, about.
    """
    longest = min(LONGEST_UNIT, compressor.llm.window - len(compressor.config.opening))
    wanted = min(unit_length_for(chunk_size), longest)
    if not compressor.config.deep or wanted <= compressor.config.unit_length:
        return compressor
    return with_unit_length(compressor, wanted)


def _remade(compressor: ConceptCompressor, what: str, **settings: Any) -> DeepCompressor:
    """Deep concepts by the same weights with other settings, none of which needs weights of its own."""
    if not isinstance(compressor, DeepCompressor):
        raise ConfigurationError(
            f"{what} of deep concepts", got="concepts at the input embeddings", next_step="use codec deep"
        )
    fields = compressor.config.model_dump() | settings
    tables = {"information": compressor.information, "selector": compressor.selector}
    made = DeepCompressor(compressor.llm, checked(CompressorConfig, **fields), **tables)
    made.take_lora(compressor)
    made.refresh_fingerprint()
    return made


def untrained_deep(
    llm: TargetLLM, entry_layer: int | None = None, *, information: torch.Tensor | None = None, **settings: Any
) -> DeepCompressor:
    """Deep concepts as any LLM reads them without training.

    Args:
        llm: The target LLM.
        entry_layer: L; None takes half the LLM's layers.
        information: See `DeepCompressor`.
        **settings: Further fields of `CompressorConfig`.

    Raises:
        ConfigurationError, UnsupportedModelError: See `DeepCompressor`.
    """
    settings.setdefault("opening", QAPrompt(llm.tokenizer).opening.ids)
    layer = default_entry_layer(llm.depth) if entry_layer is None else entry_layer
    return DeepCompressor(llm, checked(CompressorConfig, entry_layer=layer, **settings), information=information)

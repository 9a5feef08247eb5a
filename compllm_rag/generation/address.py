"""A generator by the address of the server that runs it: what is typed where a generator is chosen."""

from __future__ import annotations

from urllib.parse import urlsplit

from compllm_rag.config import Codec, GenerationConfig
from compllm_rag.errors import ConfigurationError
from compllm_rag.generation.base import Generator
from compllm_rag.generation.vllm import VLLMGenerator, VLLMSettings
from compllm_rag.models.halves import Halves
from compllm_rag.models.llm import TargetLLM

_KINDS = ("vllm", "vllm-deep")


def check_address(address: str) -> str:
    """An address that may be one, before anything is loaded.

    Args:
        address: `vllm:http://HOST:PORT`, with `#NAME` of the model where the server serves several; `vllm-deep:` where
            it serves what `models export --deep` wrote.

    Returns:
        The same.

    Raises:
        ConfigurationError: There is no such kind of generator, or a password stands in it.
    """
    kind, _, url = address.partition(":")
    try:
        parts = urlsplit(url)
        sound = kind in _KINDS and parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query
        _ = parts.port
    except ValueError:
        sound = False
    if not sound:
        raise ConfigurationError(
            "there is no such generator",
            got=ascii(address)[:200],
            expected="vllm:http://HOST:PORT or vllm-deep:http://HOST:PORT, with #NAME where the server serves several "
            "models",
            next_step="start `vllm serve MODEL --enable-prompt-embeds`, and give its address; or leave it out",
        )
    if "@" in parts.netloc:
        raise ConfigurationError(
            "a generator's address holds a password",
            got="an @",
            expected="the address alone",
            next_step="put the server's key into COMPLLM_VLLM_API_KEY",
        )
    return address


def codec_of(address: str) -> Codec:
    """The concepts that the server behind an address reads.

    Raises:
        ConfigurationError: See `check_address`.
    """
    return "deep" if check_address(address).startswith("vllm-deep:") else "input"


def check_codec(address: str, *, deep: bool) -> None:
    """Refuse a server that cannot read the concepts of a storage.

    Args:
        address: See `check_address`.
        deep: Whether they are deep.

    Raises:
        ConfigurationError: It cannot; or see `check_address`.
    """
    if codec_of(address) == "input" and deep:
        raise ConfigurationError(
            "an ordinary vLLM cannot read deep concepts",
            got="a vllm: address for a storage of --codec deep",
            expected="a storage of --codec input, or vllm-deep:",
            next_step="make another storage with `--codec input`; or serve what `models export --deep` writes and give "
            "vllm-deep: in place of vllm:; or leave the generator out, and this process runs the LLM",
        )
    if codec_of(address) == "deep" and not deep:
        raise ConfigurationError(
            "this storage has no deep concepts",
            got="a vllm-deep: address for concepts at the input embeddings",
            expected="a storage of --codec deep",
            next_step="serve the LLM as it is, and give vllm: in place of vllm-deep:",
        )


def check_generator(generator: Generator | str | None) -> None:
    """Look at a generator that may be given as an address, before anything is opened for it.

    Raises:
        ConfigurationError: See `check_address`.
    """
    if isinstance(generator, str):
        check_address(generator)


def generator_at(
    address: str, llm: TargetLLM, config: GenerationConfig | None = None, *, halves: Halves | None = None
) -> VLLMGenerator:
    """The generator behind an address.

    Args:
        address: See `check_address`.
        llm: The target LLM, with its reader: prompts are made for it.
        config: Used where a call gives none.
        halves: Of deep concepts: the LLM in two halves, as it reads them.

    Raises:
        ConfigurationError: See `check_address`; or the address is one for deep concepts, and there are none.
        MissingExtraError: The extra that it needs is not installed.
    """
    kind, _, place = check_address(address).partition(":")
    url, _, model = place.partition("#")
    deep = kind == "vllm-deep"
    if deep:  # the other way round text can still be read
        check_codec(address, deep=halves is not None)
    settings = VLLMSettings.from_environment(model=model or None)
    return VLLMGenerator(url, llm, config, settings=settings, halves=halves if deep else None)

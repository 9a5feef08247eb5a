"""Which package indexes a user has set, for pip or for uv, and where these list a file.

Environments made by uv have no pip, so nothing here calls it; but whoever has set an index, a proxy or a certificate
for either of them has done so for a reason. A file is asked for by its name, and its digest is compared afterwards.
"""

from __future__ import annotations

import configparser
import html.parser
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit
from urllib.request import url2pathname

PYPI = "https://pypi.org/simple"

_SECTIONS = ("global", "download", "install")
_JSON = "application/vnd.pypi.simple.v1+json"
ACCEPT = f"{_JSON}, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"


@dataclass(frozen=True)
class IndexSettings:
    """Where to look, and how to get there.

    Attributes:
        indexes: Base URLs of simple indexes (PEP 503, PEP 691), in order.
        links: Folders and pages that list files directly.
        cert: A file of certificates to trust instead of the usual ones.
        proxy: URL of a proxy; None leaves it to the environment.
        timeout_s: Seconds without an answer after which an attempt ends.
    """

    indexes: tuple[str, ...] = (PYPI,)
    links: tuple[str, ...] = ()
    cert: str | None = None
    proxy: str | None = None
    timeout_s: float = 60.0


@dataclass
class _Links(html.parser.HTMLParser):
    """The addresses that a page links to."""

    found: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the address of an `<a>`."""
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def index_settings() -> IndexSettings:
    """What the environment and pip's configuration files say; the environment wins, as it does for pip."""
    kept = _configured()

    def value(*names: str, option: str = "") -> str:
        for name in names:
            if os.environ.get(name):
                return os.environ[name]
        return kept.get(option, "")

    if value("PIP_NO_INDEX", "UV_NO_INDEX", option="no-index").lower() in ("1", "true", "yes", "on"):
        indexes: list[str] = []
    else:
        main = value("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL", option="index-url") or PYPI
        extra = value("PIP_EXTRA_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", option="extra-index-url")
        # uv lets an index have a name: `ours=https://...`.
        indexes = [re.sub(r"^[\w.-]+=(?=\w+:)", "", url) for url in [main, *extra.split()]]
    timeout = value("PIP_DEFAULT_TIMEOUT", "UV_HTTP_TIMEOUT", option="timeout")
    return IndexSettings(
        indexes=tuple(dict.fromkeys(indexes)),
        links=tuple(value("PIP_FIND_LINKS", "UV_FIND_LINKS", option="find-links").replace(",", " ").split()),
        cert=value("PIP_CERT", option="cert") or None,
        proxy=value("PIP_PROXY", option="proxy") or None,
        timeout_s=float(timeout) if re.fullmatch(r"\d+(\.\d+)?", timeout) else 60.0,
    )


def page_of(index: str, requirement: str) -> str:
    """Address of the page where a simple index lists the files of `name==version`."""
    name = re.sub(r"[-_.]+", "-", requirement.partition("==")[0]).lower()
    return f"{index.rstrip('/')}/{name}/"


def listed(page: str, content: str, filename: str) -> str | None:
    """Address of a file that a page of an index lists, None where it does not.

    Args:
        page: The page's own address.
        content: JSON (PEP 691) or HTML (PEP 503).
        filename: Of the file.
    """
    if content.lstrip().startswith("{"):
        try:
            files = json.loads(content)["files"]
            found = [str(file["url"]) for file in files if file["filename"] == filename]
        except (ValueError, KeyError, TypeError):
            return None
    else:
        links = _Links()
        links.feed(content)
        found = [link for link in links.found if unquote(urlsplit(link).path).rpartition("/")[2] == filename]
    return urljoin(page, found[0]) if found else None


def local_path(address: str) -> Path | None:
    """The path that a `file:` address or a bare path names, None for anything else."""
    if address.startswith("file:"):
        return Path(url2pathname(urlsplit(address).path))
    return None if re.match(r"[a-z][a-z0-9+.-]+://", address, re.IGNORECASE) else Path(address).expanduser()


def without_secrets(address: str) -> str:
    """An address without user and password, for messages."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return "an address that cannot be read"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _configured() -> dict[str, str]:
    """Options of pip's configuration files, later ones over earlier ones; what cannot be read says nothing."""
    parser = configparser.RawConfigParser()
    kept: dict[str, str] = {}
    for path in _configuration_files():
        parser.clear()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError, OSError):
            continue
        for section in _SECTIONS:
            if parser.has_section(section):
                kept.update(parser.items(section))
    return kept


def _configuration_files() -> Iterator[Path]:
    given = os.environ.get("PIP_CONFIG_FILE")
    if given == os.devnull:
        return
    name = "pip.ini" if sys.platform == "win32" else "pip.conf"
    home = Path.home()
    if sys.platform == "win32":
        yield Path(os.environ.get("PROGRAMDATA", r"C:\ProgramData")) / "pip" / name
        yield Path(os.environ.get("APPDATA", str(home))) / "pip" / name
    else:
        for folder in reversed(os.environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":")):
            yield Path(folder) / "pip" / name
        yield Path("/etc") / name
        yield home / ".pip" / name
        yield home / "Library" / "Application Support" / "pip" / name
        yield Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / name
    yield Path(sys.prefix) / name
    if given:
        yield Path(given)

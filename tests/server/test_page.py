"""The page, used in a real Chromium against a real server with toy models.

Every test also fails when the page asks another origin for anything, or when the browser's console shows an error.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

import toy
from compllm_rag.generation.local import LocalStream
from compllm_rag.server import routes_about
from compllm_rag.server.keys import KeyFile
from compllm_rag.server.registry import Registry
from tests.server.browser import DONE, ask
from tests.server.server_samples import QUESTION, running

pytest.importorskip("playwright", reason="the page is tested with playwright: pip install playwright")
from playwright.sync_api import Page, expect

expect.set_options(timeout=60_000)  # many tests share a machine

ROCK = {"name": "rock.md", "mimeType": "text/markdown", "buffer": f"# Gull Rock\n\n{toy.TEXT}".encode()}


def test_documents_come_in_are_compressed_looked_at_and_deleted(visit: Callable[..., Page]) -> None:
    page = visit("uploads", errors="40[04]")  # the namespace is made by its first document
    expect(page.get_by_text("No documents yet.")).to_be_visible()
    expect(page.get_by_text("There are no documents yet")).to_be_visible()
    photo = {"name": "photo.heic", "mimeType": "image/heic", "buffer": b"\0"}
    large = {"name": "large.txt", "mimeType": "text/plain", "buffer": b"a " * 600_000}
    page.get_by_label("Choose files").set_input_files([ROCK, photo])
    uploads = page.locator("#upload-list li")
    expect(uploads.filter(has_text="rock.md")).to_contain_text("Ready")
    expect(uploads.filter(has_text="photo.heic")).to_contain_text("no reader for such files")
    page.get_by_label("Choose files").set_input_files([large])
    expect(uploads.filter(has_text="large.txt")).to_contain_text("Too large: 1.14 MiB")
    listed = page.locator("#document-list li")
    expect(listed).to_have_count(1)
    expect(listed).to_contain_text("chunks")
    expect(page.locator("#announcer")).not_to_be_empty()
    page.get_by_label("Choose files").set_input_files([ROCK])
    expect(uploads.last).to_contain_text("Was there already")
    page.get_by_role("button", name="Clear finished").click()
    expect(page.locator("#uploads")).to_be_hidden()

    listed.get_by_role("button", name="Gull Rock", exact=True).click()
    dialog = page.get_by_role("dialog", name="Gull Rock")
    expect(dialog.locator(".chunks > li").first).to_contain_text("concepts")
    dialog.get_by_role("button", name="Chunk 1").click()
    expect(dialog.locator("mark").first).to_be_visible()
    dialog.get_by_role("button", name="Back to the document").click()
    expect(dialog.locator(".chunks > li").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(listed.locator(".document-open")).to_be_focused()

    page.get_by_role("button", name="Delete Gull Rock").click()
    page.get_by_role("button", name="Keep it").click()
    expect(listed).to_have_count(1)
    page.get_by_role("button", name="Delete Gull Rock").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
    expect(page.get_by_text("No documents yet.")).to_be_visible()


def test_files_are_dropped(visit: Callable[..., Page]) -> None:
    page = visit("dropped", errors="404")
    expect(page.get_by_text("No documents yet.")).to_be_visible()
    transfer = page.evaluate_handle(
        """() => {
          const all = new DataTransfer();
          all.items.add(new File(["The ferry leaves at seven."], "ferry.txt"));
          return all;
        }"""
    )
    page.dispatch_event("main", "dragenter", {"dataTransfer": transfer})
    expect(page.locator("#drop-cover")).to_be_visible()
    page.dispatch_event("main", "drop", {"dataTransfer": transfer})
    expect(page.locator("#drop-cover")).to_be_hidden()
    expect(page.locator("#document-list li")).to_contain_text("ferry.txt")


def test_two_answers_side_by_side_with_their_costs_and_passages(visit: Callable[..., Page]) -> None:
    page = visit()
    expect(page.locator("#about")).to_contain_text("deep concepts from layer")
    ask(page)
    for mode in ("Text", "Concepts"):
        card = page.get_by_role("article", name=mode)
        expect(card.locator(".state")).to_have_text(re.compile("Done|Cut off"))
        assert card.locator(".answer").inner_text().strip()
        expect(card.locator(".facts")).to_contain_text("written in")
    boxes = [page.get_by_role("article", name=mode).bounding_box() for mode in ("Text", "Concepts")]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]

    measures = {each.get_attribute("data-measure"): each for each in page.locator("#measures > li").all()}
    assert set(measures) == {"ttft_s", "positions", "prefill_cost", "kv_bytes"}
    for name in ("positions", "prefill_cost", "kv_bytes"):
        text, concepts = (
            float(v.inner_text().split()[0].replace(",", "")) for v in measures[name].locator(".value").all()
        )
        widths = [measures[name].locator(f".bar.{mode}").bounding_box()["width"] for mode in ("text", "concepts")]
        assert concepts < text
        assert widths[1] / widths[0] == pytest.approx(concepts / text, abs=0.03)
        expect(measures[name].locator(".share")).to_have_text(re.compile(r"concepts: \d+ % of text"))
    assert re.search(r"\d+ ms|\d s", measures["ttft_s"].inner_text())

    passages = page.locator("#passage-list > li")
    expect(passages.first).to_contain_text(re.compile(r"as text \d+ positions; as concepts \d+ positions"))
    citation = page.get_by_role("article", name="Concepts").get_by_role("button", name="Passage 1: Gull Rock")
    citation.click()
    dialog = page.get_by_role("dialog", name="Gull Rock")
    shown = dialog.locator(".passage")
    expect(shown.locator("mark").first).to_be_visible()
    whole = shown.text_content()
    assert whole.strip() and whole.strip() in toy.TEXT
    kept = "".join(shown.locator("mark").all_text_contents())
    assert 0 < len(kept) < len(whole)
    facts = dialog.locator("dl.facts").inner_text()
    tokens, concepts = (int(re.search(rf"{name}\n(\d+)", facts)[1]) for name in ("Tokens", "Concepts"))
    assert tokens / 2 <= concepts <= tokens / 2 + 1
    dialog.get_by_label("Show only what was kept").check()
    expect(shown.locator(".gone").first).to_be_hidden()
    dialog.get_by_role("button", name="Close").click()
    expect(citation).to_be_focused()


def slowly(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Answers come at ten tokens a second, until the event is set."""
    hurry, stock = threading.Event(), LocalStream.__iter__

    def pieces(stream: LocalStream) -> Iterator[str]:
        for piece in stock(stream):
            yield piece
            hurry.wait(0.1)

    monkeypatch.setattr(LocalStream, "__iter__", pieces)
    return hurry


def test_answers_stream_and_can_be_cancelled(
    visit: Callable[..., Page], server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry = slowly(monkeypatch)
    page = visit()
    page.get_by_label("Most tokens").select_option("512")
    page.get_by_label("Your question").fill(QUESTION)
    page.keyboard.press("Enter")
    first = page.locator('.card[data-state="Writing"]')
    expect(first).to_have_count(1)
    expect(first.locator(".answer")).not_to_be_empty()  # while the rest is not even made
    expect(page.locator(".card .state", has_text="Waiting for its turn")).to_have_count(1)
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator('.card[data-state="Cancelled"]')).to_have_count(2)
    expect(page.get_by_label("Your question")).to_be_focused()
    expect(page.locator("#cancel")).to_be_hidden()
    for _ in range(500):
        if server.service.generations._admitted == 0:
            break
        page.wait_for_timeout(20)
    assert server.service.generations._admitted == 0  # the server has stopped as well
    hurry.set()
    ask(page)


def test_errors_in_plain_words(visit: Callable[..., Page]) -> None:
    page = visit(errors="ERR_INTERNET_DISCONNECTED")
    expect(page.locator("#document-list li")).to_have_count(1)
    page.context.set_offline(True)
    page.get_by_label("Your question").fill(QUESTION)
    page.keyboard.press("Enter")
    expect(page.locator(".card .notice")).to_have_count(2)
    expect(page.locator(".card .notice").first).to_contain_text("The server cannot be reached. Is it still running?")
    page.context.set_offline(False)
    page.locator(".card").first.get_by_role("button", name="Ask again").click()
    expect(page.locator(DONE)).to_have_count(2)
    expect(page.locator(".card .notice:visible")).to_have_count(0)


def test_a_server_with_keys(visit: Callable[..., Page], server: SimpleNamespace) -> None:
    path = server.folder / "keys.json"
    reads = _key(path, "reader", "read")
    registry = Registry(server.registry.storage, server.registry.settings, read_only=True, **server.own)
    registry.start()
    with running(registry, keys=KeyFile(path)) as (url, _):
        page = visit(url=url, errors="401|403")
        dialog = page.get_by_role("dialog", name="Key and namespace")
        expect(dialog).to_be_visible()  # by itself: nothing can be done before
        expect(page.locator("#trouble")).to_have_text("This server needs an API key.")
        dialog.get_by_label("Key", exact=True).fill("cr-wrong")
        page.keyboard.press("Enter")
        expect(dialog.locator("#key-trouble")).to_have_text("This API key is not known here. Was it copied completely?")
        dialog.get_by_label("Key", exact=True).fill("not a key")
        page.keyboard.press("Enter")
        expect(dialog.locator("#key-trouble")).to_contain_text("without spaces")
        dialog.get_by_label("Key", exact=True).fill(reads)
        page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        expect(page.locator("#document-list li")).to_have_count(1)
        expect(page.get_by_text("Documents can be read here, but not changed.")).to_be_visible()
        expect(page.locator("#drop")).to_be_hidden()
        expect(page.get_by_role("button", name="Delete Gull Rock")).to_have_count(0)
        ask(page)
        assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]
        page.get_by_role("button", name="Key and namespace").click()
        dialog.get_by_label("Namespace").fill("of others")
        page.keyboard.press("Enter")
        expect(page.locator("#trouble")).to_contain_text("belongs to another namespace")
        expect(page.locator("#document-list li, .card")).to_have_count(0)
        page.get_by_role("button", name="Key and namespace").click()
        dialog.get_by_role("button", name="Forget both").click()
        expect(page.locator("#trouble")).to_have_text("This server needs an API key.")
        assert page.evaluate("sessionStorage.length") == 0
        # What the key could see has gone with it.
        expect(page.locator("#document-list li, .card, #passage-list li")).to_have_count(0)
        expect(page.get_by_label("Your question")).to_have_value("")


def test_a_namespace_of_a_server_without_keys(visit: Callable[..., Page], server: SimpleNamespace) -> None:
    from llama_index.core import Document

    name = "Bücher 書"  # headers carry bytes only
    server.registry.get(name, create=True).ingest([Document(id_="tides.md", text="The tide turns at six.")])
    page = visit(errors="404")
    expect(page.locator("#document-list li")).to_have_count(1)
    own = page.locator("#document-list").inner_text()
    page.get_by_role("button", name="Key and namespace").click()
    dialog = page.get_by_role("dialog", name="Key and namespace")
    dialog.get_by_label("Key", exact=True).fill("")
    page.keyboard.press("Enter")
    expect(dialog.locator("#key-trouble")).to_have_text("Enter a key or a namespace first.")
    dialog.get_by_label("Namespace").fill(name)
    page.keyboard.press("Enter")
    expect(page.locator("#about")).to_contain_text(f"namespace {name}")
    expect(page.locator("#document-list li")).to_contain_text("tides")
    page.reload()
    expect(page.locator("#about")).to_contain_text(f"namespace {name}")
    page.get_by_role("button", name="Key and namespace").click()
    dialog.get_by_label("Namespace").fill("nobody has written here")
    page.keyboard.press("Enter")
    expect(page.locator("#welcome-next")).to_contain_text("There are no documents yet")
    page.get_by_role("button", name="Key and namespace").click()
    dialog.get_by_role("button", name="Forget both").click()
    expect(page.locator("#document-list")).to_have_text(own, use_inner_text=True)
    assert page.evaluate("sessionStorage.length") == 0


def _key(path: Path, name: str, rights: str) -> str:
    return KeyFile(path).add(name, "default", rights)


def test_many_documents(visit: Callable[..., Page], server: SimpleNamespace) -> None:
    from llama_index.core import Document

    index = server.registry.get("many", create=True)
    index.ingest([Document(id_=f"{number:02}.md", text=f"Ferry {number}.") for number in range(60)])
    page = visit("many")
    rows = page.locator("#document-list li")
    expect(rows).to_have_count(50)
    page.get_by_role("button", name="Show more").click()
    expect(rows).to_have_count(60)
    expect(rows.nth(50).get_by_role("button", name="50.md", exact=True)).to_be_focused()
    expect(page.locator("#documents-more")).to_be_hidden()
    expect(page.locator("#documents-total")).to_have_text("60")
    # A list that is asked for again stays as long as it is, and leaves its rows in place.
    rows.nth(3).evaluate("row => { row.marked = true; }")
    page.get_by_role("button", name="Delete 07.md").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
    expect(rows).to_have_count(59)
    assert rows.nth(3).evaluate("row => row.marked")


def test_files_of_the_page(server: SimpleNamespace) -> None:
    served = {name: httpx.get(f"{server.url}/{name}") for name in ("", "app.js", "style.css", "icon.svg")}
    kinds = [each.headers["content-type"].partition(";")[0] for each in served.values()]
    assert kinds == ["text/html", "text/javascript", "text/css", "image/svg+xml"]
    for each in served.values():
        assert each.headers["cache-control"] == "no-cache"
        assert "default-src 'self'" in each.headers["content-security-policy"]
    assert not re.search(r"\sstyle=|\son\w+=|<script>|<style", served[""].text)  # would be refused by that policy
    everything = "".join(path.read_text(encoding="utf-8") for path in routes_about.PAGE.iterdir())
    assert set(re.findall(r"https?://[^\s\"']+", everything)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in everything


def test_events_are_read_however_they_are_cut(visit: Callable[..., Page]) -> None:
    page = visit()
    told = page.evaluate("""async () => {
      const { events } = await import("/sse.js");
      const lines = [": ping", "", "event: token", 'data: {"text": "é漢"}', ""].map((line) => line + "\\r\\n");
      const more = ["data: a", "data:b", "", "event: lost", "data: x"].map((line) => line + "\\n");
      const bytes = new TextEncoder().encode([...lines, ...more].join(""));
      const found = [];
      for (const size of [1, 2, 3, 7, 1000]) {
        const parts = [];
        for (let at = 0; at < bytes.length; at += size) parts.push(bytes.slice(at, at + size));
        const body = new ReadableStream({ pull(c) { parts.length ? c.enqueue(parts.shift()) : c.close(); } });
        const each = [];
        for await (const event of events(body)) each.push([event.event, event.data]);
        found.push(each);
      }
      return found;
    }""")
    assert told == [[["token", '{"text": "é漢"}'], ["message", "a\nb"]]] * 5

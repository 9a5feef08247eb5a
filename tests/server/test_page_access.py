"""The page for those who cannot see it, see little, use no mouse, or have a small screen."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

import toy
from tests.server.browser import DONE, ask, contrast, nameless, texts
from tests.server.server_samples import QUESTION

pytest.importorskip("playwright", reason="the page is tested with playwright: pip install playwright")
from playwright.sync_api import Page, expect

expect.set_options(timeout=60_000)  # many tests share a machine


def test_all_of_it_with_the_keyboard(visit: Callable[..., Page]) -> None:
    page = visit()
    expect(page.locator("#document-list li")).to_have_count(1)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the question")).to_be_focused()
    assert page.get_by_role("link", name="Skip to the question").bounding_box()["y"] >= 0  # and seen
    page.keyboard.press("Enter")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Shift+Enter")
    assert page.get_by_label("Your question").input_value() == f"{QUESTION}\n"
    page.keyboard.press("Enter")
    expect(page.locator(DONE)).to_have_count(2)
    expect(page.locator("#announcer")).to_contain_text("Prefill cost: text 100 %")
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "cite":
            break
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    expect(page.locator("#reader-title")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Close")).to_be_focused()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert page.evaluate("document.activeElement.className") == "cite"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_names_and_landmarks(visit: Callable[..., Page], scheme: str) -> None:
    page = visit(color_scheme=scheme)
    expect(page.locator("#document-list li")).to_have_count(1)
    ask(page)
    seen = texts(page)
    page.get_by_role("article", name="Concepts").get_by_role("button", name="Passage 1").click()
    expect(page.locator(".passage mark").first).to_be_visible()
    seen += texts(page)
    assert len(seen) > 60
    weak = {(text, colour, ground) for text, colour, ground in seen if contrast(colour, ground) < 4.5}
    assert weak == set()
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (contrast(ground, "rgb(0, 0, 0)") < 2) == (scheme == "dark")
    track = page.evaluate("getComputedStyle(document.querySelector('.track')).backgroundColor")
    assert (
        contrast(page.evaluate("getComputedStyle(document.querySelector('.bar.concepts')).backgroundColor"), track) >= 3
    )
    assert "repeating-linear-gradient" in page.evaluate(
        "getComputedStyle(document.querySelector('.bar.text')).backgroundImage"
    )
    edge = page.evaluate(
        "(e => [e.borderTopColor, e.backgroundColor])(getComputedStyle(document.querySelector('#question')))"
    )
    assert contrast(*edge) >= 3

    assert nameless(page) == []
    page.keyboard.press("Escape")
    for role, name in (
        ("banner", None),
        ("main", None),
        ("complementary", "Documents"),
        ("form", "Ask"),
        ("status", None),
    ):
        expect(page.get_by_role(role, **({"name": name} if name else {})).first).to_be_attached()
    headings = [
        int(tag[1])
        for tag in page.evaluate(
            "[...document.querySelectorAll('h1,h2,h3')].filter(h => h.checkVisibility()).map(h => h.tagName)"
        )
    ]
    assert headings[0] == headings.count(1) == 1
    assert all(later - former <= 1 for former, later in zip(headings, headings[1:], strict=False))
    assert page.evaluate("document.documentElement.lang") == "en"
    names = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(names) == len(set(names))


def test_long_hostile_and_right_to_left_texts_in_360_pixels(
    visit: Callable[..., Page], server: SimpleNamespace
) -> None:
    from llama_index.core import Document

    title = "<img src=x onerror=alert(1)>" + "Donaudampfschifffahrt" * 20
    hebrew = "המגדלור נבנה בשנת 1871 על ידי עדה מארש."
    index = server.registry.get("strange", create=True)
    index.ingest(
        [
            Document(id_="a/very/" + "long" * 40 + ".md", text=toy.TEXT, metadata={"title": title}),
            Document(id_="hebrew.md", text=hebrew, metadata={"title": "מגדלור"}),
        ]
    )
    page = visit("strange", viewport={"width": 360, "height": 740})
    expect(page.locator("#document-list li")).to_have_count(2)
    page.get_by_role("combobox", name="Passages").select_option("12")  # all there are
    ask(page, "Who built " + "it" * 400, tokens="512")
    expect(page.locator("#passage-list")).to_contain_text("<img src=x")
    assert page.locator("img[src=x]").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    wrong = page.evaluate(
        "[...document.querySelectorAll('main *, aside *')].filter(e => e.checkVisibility() && !e.closest('.unseen')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.className)"
    )
    assert wrong == []
    answers = [page.get_by_role("article", name=mode) for mode in ("Text", "Concepts")]
    assert answers[0].bounding_box()["y"] + answers[0].bounding_box()["height"] <= answers[1].bounding_box()["y"]
    page.locator("#passage-list button", has_text="מגדלור").click()
    passage = page.get_by_role("dialog").locator(".passage")
    expect(passage).to_contain_text("המגדלור")
    assert passage.evaluate("e => e.matches(':dir(rtl)')")
    assert page.get_by_role("dialog").evaluate("e => e.scrollWidth <= e.clientWidth")

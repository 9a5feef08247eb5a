"""A real Chromium for tests of the page, and a look at a page as those see it who cannot see, or see little."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.server_samples import QUESTION

DONE = ".card:not([aria-busy])"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A headless Chromium; where there is none the test is skipped, or fails in CI."""
    if CHROMIUM is None:
        why = "the page is tested in Chromium, which is not here: apt-get install chromium, or set CHROMIUM"
        assert not os.environ.get("CI"), why
        pytest.skip(why)
    from playwright.sync_api import sync_playwright

    # Chromium's sandbox does not work for root, which is who runs the tests in a container.
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*flags, "--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()


def ask(page: Any, question: str = QUESTION, tokens: str = "32") -> None:
    """Ask, and wait for both answers."""
    from playwright.sync_api import expect

    page.get_by_label("Most tokens").select_option(tokens)
    page.get_by_label("Your question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(DONE)).to_have_count(2)


# Every text that is seen, with its colour and what it stands on.
_TEXTS = """() => {
  const seen = [];
  const ground = (element) => {
    while (element && getComputedStyle(element).backgroundColor === "rgba(0, 0, 0, 0)") element = element.parentElement;
    return getComputedStyle(element ?? document.body).backgroundColor;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const said = walker.currentNode.data.trim();
    if (!said || !element.checkVisibility() || element.closest(".unseen, noscript")) continue;
    seen.push([said.slice(0, 40), getComputedStyle(element).color, ground(element)]);
  }
  return seen;
}"""

_NEED_NAMES = "article|button|checkbox|combobox|complementary|dialog|form|link|navigation|progressbar|textbox"


def texts(page: Any) -> list[tuple[str, str, str]]:
    """Text, colour and background of all that is seen."""
    return [tuple(each) for each in page.evaluate(_TEXTS)]


def nameless(page: Any) -> list[str]:
    """Lines of the tree that a screen reader sees whose part has no name, and should have one."""
    tree = page.locator("body").aria_snapshot().splitlines()
    assert len(tree) > 5
    return [line for line in tree if re.match(rf'\s*- ({_NEED_NAMES})(?! ")', line)]


def contrast(one: str, other: str) -> float:
    """Of two colours as Chromium computes them, by WCAG 2.2: 1 to 21."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    found = re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour)
    assert found, f"{colour} is no opaque colour"
    parts = [int(part) / 255 for part in found.groups()]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

"""A real headless browser that looks at a page as a reader would: `with page_of(file) as page`."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

__all__ = ["CHROMIUM", "browser", "open_page", "wait_for_charts"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@contextlib.contextmanager
def browser() -> Iterator["Browser"]:
    """A Chromium that asks nothing of its maker."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET, headless=True)
        try:
            yield chromium
        finally:
            chromium.close()


@contextlib.contextmanager
def open_page(chromium: "Browser", file: Path, **options: Any) -> Iterator[tuple["Page", list[str]]]:
    """A page, and what went wrong on it so far: errors, words on the console, anything asked of a network."""
    context = chromium.new_context(**options)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url))
    page.goto(file.resolve().as_uri())
    try:
        yield page, wrong
    finally:
        context.close()


def wait_for_charts(page: "Page") -> None:
    """Bring every chart of the place that is shown into view, so that all are drawn."""
    for plot in page.locator(".place:not([hidden]) .plot").all():
        plot.scroll_into_view_if_needed()
        plot.locator("svg").wait_for()
    page.evaluate("scrollTo(0, 0)")

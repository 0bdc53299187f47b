"""A headless Chromium that uses the UI as people do, and notes whom its pages ask for anything."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Locator, Page, Request, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--no-sandbox",  # which root has to do without
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 60_000.0
"""Milliseconds for a page to show what it has to, on a machine that computes meanwhile."""


class Browser:
    """One page of a Prefect server's UI."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self._url = page, url
        self.asked: list[str] = []
        """Every URL that a page has asked for."""
        self._refused: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("websocket", lambda socket: self.asked.append(socket.url))
        page.on("requestfailed", self._note_refusal)

    def _note_refusal(self, request: Request) -> None:
        # The browser's own refusal, of which nothing leaves the machine.
        if request.failure == "csp":
            self._refused.append(request.url)

    def elsewhere(self) -> set[str]:
        """What was asked of others than the server, however it was answered."""
        mine = urlsplit(self._url).netloc
        embedded = ("data:", "blob:")
        left = [url for url in self.asked if not url.startswith(embedded) and urlsplit(url).netloc != mine]
        for url in self._refused:
            left.remove(url)
        return set(left)

    def open(self, path: str) -> None:
        """Goes to a page."""
        self.page.goto(f"{self._url}/{path}")

    def link(self, name: str) -> None:
        """Follows the first link of a name."""
        self.page.get_by_role("link", name=name, exact=True).first.click()

    def button(self, name: str) -> None:
        """Presses a button."""
        self.page.get_by_role("button", name=name, exact=True).last.click()

    def passing_button(self, name: str) -> None:
        """Presses a button of a message that is there for seconds only: too few to wait until it moves no more."""
        button = self.page.get_by_role("button", name=name, exact=True).last
        # Found anew each time: what waits for it across the change of pages may go on looking at the page before.
        expect(button).to_be_visible()
        button.dispatch_event("click")

    def tab(self, name: str) -> None:
        """Opens a tab of a page."""
        self.page.get_by_role("listitem").filter(has_text=re.compile(rf"^{name}$")).click()

    def artifact(self, run: str, key: str) -> None:
        """Opens an artifact of the run at a URL by its card."""
        self.page.goto(run)
        self.tab("Artifacts")
        self.page.get_by_role("link").filter(has=self.page.get_by_text(key, exact=True)).last.click()

    def fields(self) -> dict[str, str]:
        """The titles of a form's fields in their order, those in a group after it, and what is said of each."""
        labels = self.page.locator(".schema-form-property__label")
        expect(labels.first).to_be_visible()
        found = {}
        for label in labels.all():
            field = label.locator("xpath=ancestor::*[contains(concat(' ', @class, ' '), ' schema-form-property ')][1]")
            text = field.locator("> .p-label__header .schema-form-property__description").all_inner_texts()
            title = label.inner_text()
            found[f"{title} again" if title in found else title] = " ".join(text).strip()
        return found

    def field(self, title: str, group: str | None = None) -> Locator:
        """A field of a form by its title, in a group where one is named."""
        place: Page | Locator = self.page if group is None else self.field(group)
        exactly = re.compile(rf"^{re.escape(title)}( \(Optional\))?$")
        label = self.page.locator("> .p-label__header .schema-form-property__label", has_text=exactly)
        return place.locator(".schema-form-property").filter(has=label).first

    def options(self, field: Locator) -> list[str]:
        """Opens a list; gives what there is to choose from."""
        # Its arrow: a click on its text opens the list and closes it at once.
        field.locator(".p-select-button__icon").first.click()
        found = self.page.locator(".p-select-option")
        expect(found.first).to_be_visible()
        return [text.strip() for text in found.all_inner_texts()]

    def choose(self, field: Locator, option: str) -> None:
        """Chooses from a list."""
        assert option in self.options(field)
        self.page.locator(".p-select-option").get_by_text(option, exact=True).click()
        expect(field.locator(".p-select-button__value").first).to_have_text(option)

    def state(self, state: str, seconds: float) -> None:
        """Waits until the page of a run says that it is in a state."""
        badge = self.page.locator(".page-heading-flow-run__meta .state-badge")
        expect(badge).to_have_text(state, timeout=seconds * 1000)

    def picture(self, folder: str | None, name: str, height: int, start: str = "header") -> None:
        """Takes a picture of the page from its first element of a selector on, where a folder for it is named."""
        if folder is None:
            return
        self.page.set_viewport_size({"width": 1200, "height": height})
        shown = "element => { document.activeElement.blur(); element.scrollIntoView() }"
        self.page.locator(start).first.evaluate(shown)
        # What moves on its way to its place would else be taken on the way.
        self.page.wait_for_timeout(3000)
        self.page.screenshot(path=Path(folder, f"{name}.png"), animations="disabled")


@contextmanager
def browser(url: str) -> Iterator[Browser]:
    """A browser for the UI at a URL, with nothing known from before."""
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        page = chromium.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(PATIENCE)
        try:
            yield Browser(page, url)
        finally:
            chromium.close()

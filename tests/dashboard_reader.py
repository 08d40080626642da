"""One session of the dashboard in a browser, as its tests drive it."""

from __future__ import annotations

import base64
import zlib
from typing import Any

PATIENCE = 240_000  # ms; a busy machine with two cores


class Reader:
    """One session in a browser of its own, with everything that its page complained about."""

    def __init__(self, browser: Any, address: str) -> None:
        self.address = address
        self.page = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
        self.page.set_default_timeout(PATIENCE)
        self.complaints: list[str] = []
        # Opened at a page, streamlit itself first asks below that page for files that lie at the root.
        self.page.on(
            "console",
            lambda m: self.complaints.append(m.text) if m.type == "error" and "404" not in m.text else None,
        )
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("dialog", lambda d: (self.complaints.append(f"dialog {d.message}"), d.dismiss()))
        self.page.on("request", self._note)

    def _note(self, request: Any) -> None:
        if not request.url.startswith((self.address, self.address.replace("http", "ws"), "data:", "blob:")):
            self.complaints.append(f"asked for {request.url}")

    def open(self, path: str = "") -> Reader:
        """Open a page and wait until its text is there."""
        self.page.goto(f"{self.address}/{path}")
        self.page.locator(".pk-strip-token").first.wait_for()
        self.settle()
        return self

    def settle(self) -> None:
        """Wait until the script has run."""
        self.page.wait_for_timeout(300)
        self.page.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for()
        self.page.wait_for_timeout(200)

    def token(self, i: int) -> Any:
        """A token of the spine."""
        return self.page.locator(f".pk-spine .pk-strip-token[data-i='{i}']").first

    def selected(self) -> int:
        """The token that is marked in the spine."""
        return int(self.page.locator(".pk-spine [data-selected]").first.get_attribute("data-i"))

    def text(self) -> str:
        """What the spine shows."""
        return str(self.page.locator(".pk-spine .pk-strip-body").inner_text()).replace("\xa0", " ")

    def errors(self) -> list[str]:
        """Error boxes and tracebacks on the page."""
        boxes = self.page.locator("[data-testid=stException], [data-testid=stAlertContentError]")
        return boxes.all_inner_texts()


def own(text: str) -> str:
    """A text as a link holds it."""
    return base64.urlsafe_b64encode(zlib.compress(text.encode("utf-8", "surrogatepass"), 9)).decode()

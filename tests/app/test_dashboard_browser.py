"""The dashboard in a real browser, on the embedded model: as a reader uses it, and as one who means harm does."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("streamlit", reason="the dashboard needs streamlit: pip install 'probekit[app]'")
pytestmark = pytest.mark.real
ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240_000  # ms; a busy machine with two cores
HOSTILE = "<img src=x onerror=alert(1)> <script>alert(2)</script> \u202eright to left\u202c \U0001f52c\U0001f469‍\U0001f680 [a](javascript:alert(3)) `code` \x00 end"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "probekit", "app", "--no-browser", "--port", str(port), "--address", "127.0.0.1"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "apps"), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, start_new_session=True) as server:
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/_stcore/health", timeout=2).close()
                break
            except OSError:
                assert server.poll() is None, "the dashboard ended at its start"
                time.sleep(0.5)
        yield url
        os.killpg(server.pid, 15)


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
        self.page.locator("[data-testid=stStatusWidget]").wait_for(state="detached")
        self.page.wait_for_timeout(200)

    def token(self, i: int) -> Any:
        """A token of the spine."""
        return self.page.locator(f".pk-spine .pk-strip-token[data-i='{i}']").first

    def selected(self) -> int:
        """The token that is marked in the spine."""
        return int(self.page.locator(".pk-spine [data-selected]").first.get_attribute("data-i"))

    def errors(self) -> list[str]:
        """Error boxes and tracebacks on the page."""
        boxes = self.page.locator("[data-testid=stException], [data-testid=stAlertContentError]")
        return boxes.all_inner_texts()


@pytest.fixture
def reader(browser: Any, address: str) -> Iterator[Reader]:
    made = Reader(browser, address)
    yield made
    made.page.context.close()


def own(text: str) -> str:
    """A text as a link holds it."""
    return base64.urlsafe_b64encode(zlib.compress(text.encode("utf-8", "surrogatepass"), 9)).decode()


def test_it_opens_ready_and_asks_nothing_of_the_network(reader: Reader) -> None:
    reader.open()
    reader.page.get_by_text("Position 0 is a sink").wait_for()
    assert reader.errors() == [] and reader.complaints == []


def test_a_clicked_token_is_selected_kept_in_the_link_and_reopened(reader: Reader, browser: Any) -> None:
    reader.open("?text=list")
    reader.token(5).click()
    reader.page.wait_for_url("**token=5*")
    reader.settle()
    assert reader.selected() == 5
    other = Reader(browser, reader.address)
    other.page.goto(reader.page.url)
    other.page.locator(".pk-spine [data-selected]").first.wait_for()
    assert other.selected() == 5 and other.errors() == []
    other.page.context.close()


@pytest.mark.parametrize(
    "page", ["lens", "sinks", "massive", "forks", "critical", "strange", "compare", "intervene", "runs"]
)
def test_every_page_opens_at_a_link_without_an_error(reader: Reader, page: str) -> None:
    reader.open(f"{page}?text=maths&token=83&layer=20&head=3")
    reader.page.locator("[data-testid=stMain] button").first.wait_for()
    assert reader.selected() == 83
    assert reader.errors() == [] and reader.complaints == []


def test_the_page_of_an_analysis_is_made_from_the_registry(reader: Reader) -> None:
    reader.open("analysis-value-drain?text=capital")
    reader.page.get_by_role("button", name="Run").wait_for()
    assert reader.page.get_by_text("Are the values of sink tokens small").count() == 1
    assert reader.errors() == []


def test_a_lens_cell_and_a_head_are_selected_by_a_click(reader: Reader) -> None:
    reader.open("lens?text=capital&token=18&layer=29")
    canvas = reader.page.locator(".pk-grid-canvas").first
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] / 2, "y": 60})
    reader.page.wait_for_function("!location.search.includes('layer=29') && !location.search.includes('token=18')")
    reader.settle()
    reader.open("sinks?text=capital&layer=29&head=0")
    canvas = reader.page.locator(".pk-grid-canvas").first
    canvas.click(position={"x": canvas.bounding_box()["width"] / 2, "y": 60})
    reader.page.wait_for_function("!location.search.includes('head=0')")
    reader.settle()
    assert reader.errors() == []


def test_a_change_is_run_and_its_effect_shown(reader: Reader) -> None:
    reader.open("intervene?text=capital&token=0&layer=11")
    reader.page.get_by_role("button", name="Add").click()
    reader.page.get_by_role("button", name="Run").click()
    reader.page.get_by_text("KL (before ‖ after), nats").wait_for()
    assert "Loss after" in reader.page.locator("[data-testid=stMain]").inner_text()
    assert reader.errors() == []


def test_a_rollout_is_cancelled_and_keeps_what_was_written(reader: Reader) -> None:
    reader.open("forks?text=maths&token=83")
    reader.page.get_by_label("Continuations of each").fill("100")
    reader.page.keyboard.press("Enter")
    reader.settle()
    reader.page.get_by_role("button", name="Write", exact=True).last.click()
    reader.page.get_by_text("continuations (").first.wait_for()
    reader.page.get_by_role("button", name="Cancel").click()
    reader.page.get_by_text("Cancelled. What was written until then").wait_for()
    reader.page.get_by_text("All continuations (").wait_for()
    assert reader.errors() == []


def test_tokens_are_reached_by_keyboard(reader: Reader) -> None:
    reader.open("?text=list&token=3")
    reader.token(3).focus()
    reader.page.keyboard.press("ArrowRight")
    reader.page.keyboard.press("Enter")
    reader.page.wait_for_url("**token=4*")


def test_hostile_text_does_no_harm(reader: Reader) -> None:
    reader.open(f"?own={own(HOSTILE)}")
    shown = reader.page.locator(".pk-spine .pk-strip-body").inner_text()
    assert "onerror" in shown and "alert" in shown
    reader.token(3).click()
    reader.settle()
    assert reader.page.locator("img[src='x']").count() == 0
    assert reader.errors() == [] and reader.complaints == []


def test_a_damaged_link_opens_and_says_so(reader: Reader) -> None:
    reader.open("?own=%%%25&token=many&layer=99")
    assert "could not be read in full" in reader.page.locator("[data-testid=stAlert]").inner_text()
    assert reader.errors() == []


def test_a_bad_file_is_refused_in_words(reader: Reader, tmp_path: Path) -> None:
    reader.open()
    reader.page.get_by_text("Your own text").last.click()
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe\x00bad\x81")
    reader.page.locator("input[type=file]").set_input_files(str(bad))
    box = reader.page.get_by_text("is no text")
    box.wait_for()
    assert "UTF-8" in box.inner_text()
    assert not reader.page.locator("[data-testid=stException]").count()


def test_two_sessions_get_their_own_results(browser: Any, address: str) -> None:
    one, two = Reader(browser, address), Reader(browser, address)
    texts = "The first reader looks at a red boat.", "Another reader has a text about green hills."
    for who, text in zip((one, two), texts, strict=True):
        who.page.goto(f"{address}/?own={own(text)}")
    for who, text in zip((one, two), texts, strict=True):
        who.page.locator(".pk-strip-token").first.wait_for()
        who.settle()
        assert who.page.locator(".pk-spine .pk-strip-body").inner_text().replace("\xa0", " ").strip() == text
        assert who.errors() == []
        who.page.context.close()

"""What the dashboard adds to the analyses it shows: seconds beside the bare run, seconds of a click, bytes of a page.

    python analyses/dashboard_benchmark.py --out reports/dashboard-benchmark     # some minutes on two cores; needs a browser

The dashboard runs as its readers run it, in a process of its own, and is driven through a real browser. A text of about
200 tokens is given to `pk.run` here and to the dashboard there, in turn, each text once; the row is the difference.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from capture_tables import Case, cost_table
from corpora import python_texts
from dashboard_server import server
from dashboard_tables import DashboardBenchmark
from playwright.sync_api import sync_playwright
from timing import processor

import probekit as pk

CORE = ["token-uncertainty", "logit-lens", "attention-sinks", "massive-activations"]
PAGES = (
    "Overview", "Lens", "Attention & sinks", "Massive activations", "Forks", "Critical tokens", "Strange tokens",
    "Compare", "Intervene", "Runs",
)  # fmt: skip
CLICKS = 7
MB = 1e6


class Reader:
    """A browser on the dashboard, which counts what it receives."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.address, self.received = page, address, 0
        page.set_default_timeout(600_000)
        page.on("websocket", lambda ws: ws.on("framereceived", self._count))

    def _count(self, frame: Any) -> None:
        self.received += len(frame)

    def idle(self) -> None:
        """Until the script has run."""
        self.page.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for()

    def open(self) -> None:
        """The first page, with its text read."""
        self.page.goto(self.address)
        self.page.locator(".pk-spine .pk-strip-token").first.wait_for()
        self.page.wait_for_timeout(1500)
        self.idle()

    def give(self, text: str) -> float:
        """Seconds from the click on the button until the text's spine stands and the page has followed."""
        box = self.page.locator("[data-testid=stSidebar] textarea").first
        if not box.is_visible():
            self.page.get_by_text("Your own text").last.click()
            box.wait_for()
        box.fill(text)
        box.press("Control+Enter")
        self.page.wait_for_timeout(1500)
        self.idle()
        begin = time.perf_counter()
        self.page.get_by_role("button", name="Look at it").click()
        self.page.locator(".pk-spine .pk-strip-body").filter(has_text=text.split()[0]).first.wait_for()
        self.idle()
        return time.perf_counter() - begin

    def turn_to(self, title: str) -> float:
        """Go to a page by the navigation; the megabytes that it sends, without the browser's own scripts."""
        before = self.received
        self.page.locator("[data-testid=stSidebarNav]").get_by_role("link", name=title, exact=True).click()
        self.page.wait_for_timeout(1000)
        self.idle()
        self.page.wait_for_timeout(1000)
        return (self.received - before) / MB

    def _timed(self, act: Callable[[], Any]) -> float:
        before, begin = self.page.url, time.perf_counter()
        act()
        self.page.wait_for_function("(old) => location.href !== old", arg=before, polling=10)
        self.idle()
        return time.perf_counter() - begin

    def click(self, token: int) -> float:
        """Seconds from the click on a token until it is the selected one and the page has followed."""
        return self._timed(self.page.locator(f".pk-spine .pk-strip-token[data-i='{token}']").click)

    def click_cell(self, x: float, y: float) -> float:
        """The same for a cell of the page's first heat map; x and y are shares of its width and height."""
        canvas = self.page.locator(".pk-grid-canvas").first
        box = canvas.bounding_box()
        return self._timed(lambda: canvas.click(position={"x": x * box["width"], "y": y * box["height"]}))


def texts_of(model: Any, n_texts: int, n_tokens: int) -> list[str]:
    """Texts of about so many tokens, each beginning with a word of its own."""
    source = "\n".join(python_texts(200, 3000)["prose"])
    pieces = model.tokenize([source]).texts[0].strings
    if len(pieces) < n_texts * n_tokens:
        raise SystemExit(f"Python's documents hold {len(pieces):,} tokens, and {n_texts * n_tokens:,} are asked for.")
    return [f"Number{i} " + "".join(pieces[i * n_tokens : (i + 1) * n_tokens]).strip() for i in range(n_texts)]


def waiting(reader: Reader, model: Any, pairs: int) -> Case:
    """Seconds that a reader waits for a new text, beyond the bare run of the same analyses on it."""
    texts = texts_of(model, pairs + 1, 200)
    added, bare = [], []

    def run(text: str) -> float:
        begin = time.perf_counter()
        pk.run(CORE, model, text, progress=False)
        return time.perf_counter() - begin

    run(texts[-1]), reader.give(texts[-1])
    for i, text in enumerate(texts[:-1]):
        first, second = (run, reader.give) if i % 2 else (reader.give, run)
        seconds = {first: first(text), second: second(text)}
        bare.append(seconds[run])
        added.append(seconds[reader.give] - seconds[run])
    note = f"bare runs: {min(bare):.1f} to {max(bare):.1f} s"
    return Case("a new text of 200 tokens to all core views, added", "pk.run", 0.5, "s", added, note=note)


def pages_of(reader: Reader, n_tokens: int) -> list[Case]:
    """Bytes of each page, and seconds of clicks, for the text that is open."""
    about = f"{n_tokens:,} tokens"
    rows = [Case(f"{title}, {about}", "nothing", 3.0, "MB", [reader.turn_to(title)]) for title in PAGES]
    reader.turn_to("Overview")
    clicks = [reader.click(10 + 7 * i) for i in range(CLICKS)]
    rows.append(Case(f"a click on a token, {about}", "nothing", 1.0, "s", clicks, note="page Overview"))
    for title, what in (("Lens", "cell"), ("Attention & sinks", "head"), ("Massive activations", "cell")):
        reader.turn_to(title)
        clicks = [reader.click_cell(0.12 + 0.11 * i, 0.15 + 0.08 * i) for i in range(CLICKS)]
        rows.append(Case(f"a click on a {what} of {title}, {about}", "nothing", 1.0, "s", clicks))
    return rows


def cases_of(reader: Reader, model: Any, pairs: int, long: int) -> list[Case]:
    """Every row of the table."""
    reader.open()
    rows = [waiting(reader, model, pairs), *pages_of(reader, 200)]
    if long:
        reader.give(texts_of(model, 1, long)[0])
        rows += pages_of(reader, long)
    return rows


def main() -> None:
    """Measure, and write a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="texts given to both")
    parser.add_argument(
        "--long", type=int, default=4000, help="tokens of a long text that is looked at, too; 0 for none"
    )
    parser.add_argument("--out", type=Path, default=Path("reports/dashboard-benchmark"))
    options = parser.parse_args()
    model = pk.open_model("smollm2-135m-instruct")
    found = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    with server() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        cases = cases_of(Reader(browser.new_page(viewport={"width": 1280, "height": 1000}), address), model,
                         options.pairs, options.long)  # fmt: skip
        browser.close()
    for case in cases:
        print(f"{case.what}: {case.median:.3f} {case.unit} ({case.note})", flush=True)
    machine = {"processor": processor(), "cores": psutil.cpu_count()}
    result = pk.result_of(DashboardBenchmark.name, cost_table(cases), {**model.provenance(), "machine": machine})
    print("Report:", pk.report([result], options.out))


if __name__ == "__main__":
    main()

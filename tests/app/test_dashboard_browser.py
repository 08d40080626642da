"""The dashboard in a real browser, on the embedded model: as a reader uses it, and as one who means harm does."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from dashboard_reader import Reader, own

pytest.importorskip("streamlit", reason="the dashboard needs streamlit: pip install 'probekit[app]'")
pytestmark = pytest.mark.real
HOSTILE = "<img src=x onerror=alert(1)> <script>alert(2)</script> \u202eright to left\u202c \U0001f52c\U0001f469‍\U0001f680 [a](javascript:alert(3)) `code` \x00 end"


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


def test_a_click_moves_the_mark_and_keeps_the_rest_of_the_text_as_it_stands(reader: Reader) -> None:
    reader.open("?text=list&token=2")
    reader.token(0).evaluate("node => { node.kept = true }")
    for token in (5, 9):
        reader.token(token).click()
        reader.page.locator(f".pk-spine [data-selected][data-i='{token}']").first.wait_for()
        reader.settle()
        assert reader.page.locator(".pk-spine .pk-strip-body [data-selected]").count() == 1
        assert reader.page.locator(".pk-spine .pk-line-mark").first.get_attribute("x") == str(token)
        assert f"{token}:" in reader.page.locator(".pk-spine .pk-line-label").first.inner_text()
    assert reader.token(0).evaluate("node => node.kept")
    reader.page.get_by_role("button", name="rank").first.click()
    reader.page.wait_for_url("**by=rank*")
    reader.settle()
    assert (
        reader.selected() == 9
        and reader.page.get_by_role("button", name="rank").first.get_attribute("aria-pressed") == "true"
    )


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


def test_a_new_reader_is_led_from_a_prepared_text_to_what_it_shows(reader: Reader) -> None:
    reader.open("?text=sinks&token=3")
    reader.page.get_by_role("button", name="Show it").click()
    reader.page.wait_for_url("**/sinks?**token=0*")
    reader.settle()
    assert "The sink of this text is token 0" in reader.page.locator("[data-testid=stMain]").inner_text()
    assert reader.errors() == [] and reader.complaints == []


def test_a_finding_opens_its_page_at_its_place(reader: Reader) -> None:
    reader.open("?text=capital&layer=3")
    finding = reader.page.locator("[data-testid=stHorizontalBlock]").filter(has_text="Block 11 writes it").last
    finding.get_by_role("button", name="Show").click()
    reader.page.wait_for_url("**/massive?**layer=11*")
    reader.settle()
    assert reader.errors() == []


def test_the_model_writes_on_and_its_words_become_the_text(reader: Reader) -> None:
    reader.open("?text=story")
    reader.page.get_by_text("Let the model write on").last.click()
    reader.settle()  # a page that is drawn again under the pointer swallows the click
    reader.page.get_by_role("button", name="Write", exact=True).click()
    reader.page.wait_for_url("**own=*")
    reader.settle()
    start = "Once upon a time there was a lighthouse keeper who"
    assert reader.text().replace("\n", "").startswith(start) and len(reader.text()) > len(start) + 40
    assert reader.selected() == 10 and reader.errors() == []  # the first token that was written


def test_a_model_named_to_do_harm_is_refused_in_plain_words(reader: Reader) -> None:
    name = "![pixel](http://127.0.0.1:9/pixel.png)<img src=x onerror=alert(1)>"
    reader.page.goto(f"{reader.address}/?model={quote(name)}&text=nothing{quote(name)}")
    reader.page.get_by_text("Choose another model in the sidebar").wait_for()
    assert reader.page.locator("[data-testid=stAlert] img, img[src='x'], img[src*=pixel]").count() == 0
    assert any("pixel.png" in said for said in reader.errors()) and reader.complaints == []


def test_a_text_of_twenty_thousand_characters_is_read_and_its_link_reopens_it(reader: Reader, browser: Any) -> None:
    text = f"{HOSTILE} " + "=" * (20_000 - len(HOSTILE) - 1)
    reader.open()
    reader.page.get_by_text("Your own text").last.click()
    box = reader.page.locator("[data-testid=stSidebar] textarea").first
    box.fill(text.replace("\x00", ""))  # no keyboard types it
    box.press("Control+Enter")
    reader.page.get_by_role("button", name="Look at it").click()
    reader.page.wait_for_url("**own=*")
    reader.page.locator(".pk-spine .pk-strip-body").filter(has_text="onerror").wait_for()
    reader.settle()
    assert reader.errors() == [] and reader.complaints == []
    other = Reader(browser, reader.address).open(reader.page.url.split("/", 3)[3])
    assert other.text() == reader.text() and other.errors() == []
    other.page.context.close()

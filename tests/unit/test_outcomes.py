"""What answers say: categories, and from when on nothing can change them."""

from __future__ import annotations

from typing import Any

import pytest

from probekit.core import InputError, Outcome
from probekit.sampling import Choice, Contains, LastNumber, Pattern, Rule


@pytest.mark.parametrize(
    ("outcome", "text", "read", "settled"),
    [
        (Pattern(r"#### (\S+)"), "so 5.\n#### 12\n", "12", True),
        (Pattern(r"#### (\S+)"), "so 5.\n#### 12", "12", False),  # 12 may become 120
        (Pattern(r"#### (\S+)"), "so 5.", None, False),
        (Pattern(r"answer is ([\d,.]*\d)", numeric=True), "the answer is 1,200.00. Or the answer is 7", "1200", True),
        (Pattern(r"answer is (yes)|no"), "no, it is not", None, True),
        (Pattern(r"yes|no"), "no, it is not", "no", True),
        (LastNumber(), "3 apples and 4 pears are 7.", "7", False),
        (LastNumber(), "It costs $1,234.50", "1234.5", False),
        (LastNumber(), "minus: -0.0", "0", False),
        (LastNumber(), "none", None, False),
        (Choice(), "I think (B), not C.", "B", True),
        (Choice(), "A", "A", False),
        (Choice(after="answer is"), "A good start: the answer is (C).", "C", True),
        (Choice(), "ABBA's best", None, False),
        (Choice("12"), "12 or 2 .", "2", True),
        (Contains(("heads", "tails")), "It shows Tails.", "tails", True),
        (Contains(("New", "New York")), "new york is", "New York", True),
        (Contains(("cat",)), "concatenate", None, False),
        (Rule(lambda text: "long" if len(text) > 3 else None, "length"), "abcd", "long", False),
    ],
)
def test_categories(outcome: Outcome, text: str, read: str | None, settled: bool) -> None:
    assert isinstance(outcome, Outcome)
    assert (outcome.read(text), outcome.settled(text)) == (read, settled)


@pytest.mark.parametrize(
    "outcome",
    [Pattern(r"is (\d+)\b"), Choice(), Choice(after="is"), Contains(("yes", "no")), Pattern("b+", numeric=True)],
)
def test_what_is_settled_stays(outcome: Outcome) -> None:
    """Whatever follows, a settled answer reads the same: every cut of a text that is settled reads as the whole."""
    text = "It is 1 or bb, no? yes: A is 23. The answer is B; is it 4?"
    for i in range(len(text)):
        if outcome.settled(text[:i]):
            assert outcome.read(text[:i]) == outcome.read(text), text[:i]


def test_keys_tell_outcomes_apart() -> None:
    some: list[Any] = [
        Pattern("a"), Pattern("b"), Pattern("a", numeric=True), LastNumber(), Choice(), Choice("AB"), Choice(after="is"),
        Contains(("a",)), Contains(("a", "b")), Rule(str, "x"), Rule(str, "y"),
    ]  # fmt: skip
    assert len({o.key for o in some}) == len(some)
    assert Pattern("a").key == Pattern("a").key


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pattern("("), "no regular expression"),
        (lambda: Pattern(r"\d*"), "matches the empty text"),
        (lambda: Choice("A"), "two or more letters"),
        (lambda: Choice("A!"), "two or more letters"),
        (lambda: Choice(after="("), "no regular expression"),
        (lambda: Contains(()), "words to look for"),
        (lambda: Contains(("a", " ")), "none of them blank"),
    ],
)
def test_what_cannot_be_read_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()

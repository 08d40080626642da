"""What a written answer says, in categories: a pattern, the last number, a choice, a word, or the user's own rule."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from probekit.core import InputError

# Digits may be grouped by commas; a point at the end closes a sentence.
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


@dataclass(frozen=True)
class Pattern:
    """What a regular expression catches, the first time it matches.

    Args:
        pattern: in Python's syntax; its first group is the category, or the whole match if it has none.
        numeric: whether the category is a number, so that "1,200", "1200" and "1200.0" are the same.

    Raises:
        InputError: the pattern is not valid, or matches the empty text.
    """

    pattern: str
    numeric: bool = False

    def __post_init__(self) -> None:
        try:
            found = re.compile(self.pattern).match("")
        except re.error as error:
            raise InputError(f"The pattern {self.pattern!r} is no regular expression: {error}.") from None
        if found is not None:
            raise InputError(f"The pattern {self.pattern!r} matches the empty text, so every answer would fit at once.")

    @property
    def key(self) -> str:
        """A short unique spelling."""
        return f"pattern({self.pattern!r}, numeric={self.numeric})"

    def read(self, text: str) -> str | None:
        """What the first match caught, without blanks around it; None if nothing matches."""
        found = re.search(self.pattern, text)
        if found is None:
            return None
        caught = found.group(1 if found.re.groups else 0)
        if caught is None:
            return None
        return _plain_number(caught) if self.numeric else caught.strip()

    def settled(self, text: str) -> bool:
        """Whether the first match ends before the text does: a match at the end may still grow."""
        found = re.search(self.pattern, text)
        return found is not None and found.end() < len(text)


@dataclass(frozen=True)
class LastNumber:
    """The last number of an answer, as reports on grade-school mathematics read it; never settled before the end."""

    @property
    def key(self) -> str:
        """A short unique spelling."""
        return "last_number()"

    def read(self, text: str) -> str | None:
        """The number in plain digits; None if there is none."""
        found = _NUMBER.findall(text)
        return _plain_number(found[-1]) if found else None

    def settled(self, text: str) -> bool:
        """Another number may always follow."""
        return False


@dataclass(frozen=True)
class Choice:
    """Which of the letters that stand for the choices is named first, on its own.

    Args:
        letters: such as "ABCD".
        after: what has to precede it, as a regular expression, such as "answer is"; anything if empty.
    """

    letters: str = "ABCD"
    after: str = ""

    def __post_init__(self) -> None:
        if len(set(self.letters)) < 2 or not self.letters.isalnum():
            raise InputError(f"Choices are two or more letters or digits, each once; found {self.letters!r}.")
        Pattern(self._pattern)

    @property
    def _pattern(self) -> str:
        before = rf"(?:{self.after})\W*" if self.after else ""
        return rf"{before}(?<![A-Za-z0-9])([{self.letters}])(?![A-Za-z0-9'])"

    @property
    def key(self) -> str:
        """A short unique spelling."""
        return f"choice({self.letters}, after={self.after!r})"

    def read(self, text: str) -> str | None:
        """The letter; None if none is named."""
        return Pattern(self._pattern).read(text)

    def settled(self, text: str) -> bool:
        """Whether the letter is followed by something."""
        return Pattern(self._pattern).settled(text)


@dataclass(frozen=True)
class Contains:
    """Which of some words or phrases comes first, upper and lower case alike.

    Args:
        words: the categories.
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.words or not all(w.strip() for w in self.words):
            raise InputError(f"Expected words to look for, none of them blank; found {list(self.words)}.")

    @property
    def _pattern(self) -> str:
        longest_first = sorted(self.words, key=len, reverse=True)
        return rf"(?i)(?<!\w)({'|'.join(map(re.escape, longest_first))})(?!\w)"

    @property
    def key(self) -> str:
        """A short unique spelling."""
        return f"contains({list(self.words)})"

    def read(self, text: str) -> str | None:
        """The word as it was given; None if none occurs."""
        found = Pattern(self._pattern).read(text)
        return None if found is None else next(w for w in self.words if w.lower() == found.lower())

    def settled(self, text: str) -> bool:
        """Whether the word is followed by something."""
        return Pattern(self._pattern).settled(text)


@dataclass(frozen=True)
class Rule:
    """The user's own function from an answer to its category.

    Args:
        function: takes the answer's text and returns a category, or None if it says nothing.
        name: tells rules apart when draws are kept; two functions of one name count as the same.
    """

    function: Callable[[str], str | None]
    name: str

    @property
    def key(self) -> str:
        """A short unique spelling."""
        return f"rule({self.name})"

    def read(self, text: str) -> str | None:
        """What the function says."""
        found = self.function(text)
        return None if found is None else str(found)

    def settled(self, text: str) -> bool:
        """More text could always change it, for all that is known."""
        return False


def _plain_number(text: str) -> str | None:
    """A number without commas, signs of plus and needless zeros; None if it is none."""
    found = _NUMBER.search(text)
    if found is None:
        return None
    try:
        number = Decimal(found.group().replace(",", ""))
    except InvalidOperation:
        return None
    return format(number.normalize() + 0, "f")

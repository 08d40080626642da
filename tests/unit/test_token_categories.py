"""What becomes of a token's text: every category, the order of the rules, and the bytes that pieces stand for."""

from __future__ import annotations

import numpy as np
import pytest

from probekit.core import VocabularyTable
from probekit.methods.token_categories import (
    CATEGORIES,
    OK,
    SPECIAL,
    UNDECODABLE,
    UNREACHABLE_MULTI,
    UNREACHABLE_SINGLE,
    UNREACHABLE_SPECIAL,
    UNUSED,
    categories,
    is_byte_level,
    looks_special,
    token_bytes,
    unused_bytes,
)


def table(*rows: tuple[str, str, tuple[int, ...], bool]) -> VocabularyTable:
    """Piece, text, what it encodes to, whether special."""
    pieces, decoded, encoded, special = zip(*rows, strict=True)
    return VocabularyTable(pieces, decoded, decoded, encoded, np.array(special))


def test_every_category_and_the_order_of_the_rules() -> None:
    """An earlier rule wins: ok before special looks, special looks before bytes, bytes before the number of ids."""
    rows = (
        ("cat", "cat", (0,), False, OK),
        ("<s>", "<s>", (1,), True, SPECIAL),
        ("[unused1]", "[unused1]", (0, 1), True, UNREACHABLE_SPECIAL),
        ("<x\ufffd>", "<x\ufffd>", (0, 1), False, UNREACHABLE_SPECIAL),
        ("<b>", "<b>", (4,), False, OK),
        ("\ufffd", "\ufffd", (5,), False, OK),
        ("Ā", "\ufffd", (5,), False, UNDECODABLE),
        ("Cat", "cat", (0,), False, UNREACHABLE_SINGLE),
        ("catcat", "catcat", (0, 0), False, UNREACHABLE_MULTI),
        ("▁", "", (), False, UNREACHABLE_MULTI),
        ("", "", (), False, UNUSED),
    )
    found = categories(table(*(row[:4] for row in rows)))
    assert found.tolist() == [row[4] for row in rows]
    assert set(found) == set(CATEGORIES), "a category is not tried"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<s>", True), ("[CLS]", True), ("<|end|>", True), ("<a\nb>", True), ("[a>", True),
        ("<>", False), ("<1>", False), ("a<b>", False), ("<b> ", False), ("", False),
    ],
)  # fmt: skip
def test_what_looks_special(text: str, expected: bool) -> None:
    assert looks_special(text) is expected


def test_bytes_of_a_byte_alphabet() -> None:
    """GPT-2's: printable characters are themselves, the others are moved up from U+0100 on, in order."""
    assert token_bytes("Ġcaf", " caf", byte_level=True) == b" caf"
    for piece, byte in (("Ā", 0), ("Ċ", 10), ("Ġ", 32), ("ł", 0xA0), ("À", 0xC0), ("õ", 0xF5), ("ÿ", 0xFF)):
        assert token_bytes(piece, "\ufffd", byte_level=True) == bytes([byte])
    assert token_bytes("âĢ", "\ufffd", byte_level=True) == b"\xe2\x80"
    assert token_bytes("âĢ", "\ufffd", byte_level=False) is None, "pieces of other tokenizers spell characters"
    assert token_bytes("<0xE2>", "\ufffd", byte_level=False) == b"\xe2"
    assert token_bytes("日", "\ufffd", byte_level=True) is None


def test_bytes_that_utf8_never_uses_in_both_spellings() -> None:
    """C0, C1, F5 to FF; only in a byte-level vocabulary is "õ" a byte."""
    never = [0xC0, 0xC1, *range(0xF5, 0x100)]
    named = table(*((f"<0x{b:02X}>", "\ufffd", (0, 1), False) for b in range(256)))
    assert unused_bytes(named).tolist() == never
    letters = [chr(b) for b in range(0xA1, 0x100) if b != 0xAD]
    words = [f"Ġw{i}" for i in range(40)]
    level = table(*((p, "\ufffd" if len(p) == 1 else p, (0, 1), False) for p in letters + words))
    assert is_byte_level(level) and [ord(letters[i]) for i in unused_bytes(level)] == never
    plain = table(*((p, p, (i,), False) for i, p in enumerate(letters)))
    assert not is_byte_level(plain) and not len(unused_bytes(plain))

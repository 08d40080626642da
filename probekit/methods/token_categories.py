"""Which tokens of a vocabulary a text can bring about: categories from decoding and encoding again."""

from __future__ import annotations

import functools
import re

import numpy as np

from probekit.core import VocabularyTable

OK, SPECIAL = "ok", "ok, special"
UNREACHABLE_SPECIAL = "unreachable, looks special"
UNDECODABLE = "undecodable"
UNREACHABLE_SINGLE = "unreachable, becomes another token"
UNREACHABLE_MULTI = "unreachable, becomes several tokens"
UNUSED = "no token"
CATEGORIES = (OK, SPECIAL, UNREACHABLE_SPECIAL, UNDECODABLE, UNREACHABLE_SINGLE, UNREACHABLE_MULTI, UNUSED)

_BRACKETED = re.compile(r"(?s)[\[<].+[\]>]")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NEVER_IN_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})


def looks_special(text: str) -> bool:
    """Whether a token is bracketed by [ ] or < > and has a letter."""
    return len(text) >= 3 and _BRACKETED.fullmatch(text) is not None and any(c.isalpha() for c in text)


def categories(table: VocabularyTable) -> np.ndarray:
    """The category of each id; axis vocab, of strings.

    A token is ok if its text encodes to it again. Otherwise, in this order: it looks special (brackets and a letter); its
    text is no whole character; its text encodes to one other token; to several (arXiv 2405.05417, appendix, and released
    code). Ids without a token have a category of their own.
    """
    found = np.full(len(table), UNREACHABLE_MULTI, dtype=object)
    for i, (text, encoded) in enumerate(zip(table.decoded, table.encoded, strict=True)):
        if not table.pieces[i]:
            found[i] = UNUSED
        elif encoded == (i,):
            found[i] = SPECIAL if table.special[i] else OK
        elif looks_special(text):
            found[i] = UNREACHABLE_SPECIAL
        elif "\ufffd" in text:
            found[i] = UNDECODABLE
        elif len(encoded) == 1:
            found[i] = UNREACHABLE_SINGLE
    return found


def unused_bytes(table: VocabularyTable) -> np.ndarray:
    """Ids of single bytes that no UTF-8 text holds (C0, C1, F5 to FF)."""
    byte_level = is_byte_level(table)
    found = [token_bytes(piece, "\ufffd", byte_level=byte_level) for piece in table.pieces]
    return np.array([i for i, b in enumerate(found) if b and len(b) == 1 and b[0] in _NEVER_IN_UTF8], dtype=np.int64)


def is_byte_level(table: VocabularyTable) -> bool:
    """Whether pieces spell bytes: more than a tenth of them start with the mark of a space, "Ġ"."""
    return sum(p.startswith("Ġ") for p in table.pieces) > 0.1 * len(table)


def token_bytes(piece: str, text: str, *, byte_level: bool) -> bytes | None:
    """The bytes that a token stands for; None where neither its text nor its piece tells.

    Args:
        piece: how the vocabulary spells it.
        text: what it decodes to; where that is no whole character, the piece is read.
        byte_level: whether pieces spell bytes, as GPT-2's do.
    """
    if "\ufffd" not in text:
        return text.encode("utf-8", "surrogatepass")
    if named := _BYTE.fullmatch(piece):
        return bytes([int(named.group(1), 16)])
    alphabet = _byte_alphabet()
    if byte_level and all(c in alphabet for c in piece):
        return bytes(alphabet[c] for c in piece)
    return None


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}

"""What is looked at: a text in a model, one token, one layer, one head. It lives in the URL, so that links reopen it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from .prepared import PREPARED

LONGEST_LINK = 6000  # characters of a URL that browsers and proxies let through
LONGEST_TEXT = 200_000  # characters that a link may unpack to


@dataclass(frozen=True)
class Selection:
    """The view that all pages share.

    Args:
        model: what `pk.open_model` takes.
        text: the text itself.
        prepared: name of the prepared text that it is; "" for one of the reader's own.
        token: position of the selected token.
        layer: the selected block; negative from the end.
        head: the selected head.
        by: the quantity that colours the spine; "" for the first.
        lens: folder, file or hub id of the lens that reads; "" for the logit lens.
    """

    model: str
    text: str
    prepared: str = ""
    token: int = 0
    layer: int = -1
    head: int = 0
    by: str = ""
    lens: str = ""

    def to_query(self) -> dict[str, str]:
        """The view as parameters of a URL; of a text that is too long for one, its digest."""
        found = {k: str(v) for k, v in asdict(self).items() if k not in ("text", "prepared") and v != ""}
        if self.prepared:
            return found | {"text": self.prepared}
        return found | ({"own": self._packed} if self.link_holds_text else {"long": digest(self.text)})

    @property
    def link_holds_text(self) -> bool:
        """Whether the text itself, or its name, is in the link."""
        return bool(self.prepared) or len(self._packed) <= LONGEST_LINK

    @cached_property
    def _packed(self) -> str:
        return base64.urlsafe_b64encode(zlib.compress(self.text.encode("utf-8", "surrogatepass"), 9)).decode()

    def within(self, n_tokens: int, n_layers: int, n_heads: int) -> Selection:
        """The selection moved to what there is."""
        layer = self.layer if self.layer >= 0 else n_layers + self.layer
        return replace(
            self,
            token=min(max(self.token, 0), n_tokens - 1),
            layer=min(max(layer, 0), n_layers - 1),
            head=min(max(self.head, 0), n_heads - 1),
        )


def digest(text: str) -> str:
    """What stands in a link for a text that is too long for it."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def from_query(
    query: Mapping[str, str], default_model: str, held: Callable[[str], str | None] = lambda _: None
) -> tuple[Selection, str]:
    """The view that a URL asks for, and what could not be read of it ("" if all could).

    Args:
        query: parameters of the URL.
        default_model: where it names none.
        held: gives a long text by its digest, or None where it is no longer known.
    """
    wrong = []
    prepared = query.get("text", "")
    if prepared and prepared not in PREPARED:
        wrong.append(f"there is no prepared text {prepared!r}")
        prepared = ""
    text = ""
    if not prepared and query.get("own"):
        try:
            text = _unpacked(query["own"])
        except ValueError:
            wrong.append("its text is damaged")
    elif not prepared and query.get("long"):
        text = held(query["long"]) or ""
        if not text:
            wrong.append("its text is too long for a link, and this dashboard no longer holds it; paste it again")
    if not text:
        prepared = prepared or next(iter(PREPARED))
        text = PREPARED[prepared].text
    numbers = {}
    usual = {"token": PREPARED[prepared].token if prepared else 0, "layer": -1, "head": 0}
    for name, default in usual.items():
        try:
            numbers[name] = int(query.get(name, default))
        except ValueError:
            numbers[name] = default
            wrong.append(f"{name}={query[name]!r} is no number")
    found = Selection(
        query.get("model") or default_model,
        text,
        prepared,
        by=query.get("by", ""),
        lens=query.get("lens", ""),
        **numbers,
    )
    return found, f"This link could not be read in full: {'; '.join(wrong)}." if wrong else ""


def _unpacked(packed: str) -> str:
    try:
        stream = zlib.decompressobj()
        raw = stream.decompress(base64.urlsafe_b64decode(packed.encode("ascii")), 4 * LONGEST_TEXT)
        if stream.unconsumed_tail:
            raise ValueError("too long")
        return raw.decode("utf-8", "surrogatepass")
    except (binascii.Error, zlib.error, UnicodeError) as error:
        raise ValueError(str(error)) from error

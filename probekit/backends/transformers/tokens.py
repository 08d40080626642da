"""From text to the exact ids that run, and from ids to what a reader sees."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from probekit.core import Batch, BosPolicy, Chat, InputError, TextError, TokenText

from .chat import about_template, render_chats


def tokenize(tokenizer: Any, texts: Sequence[Any], bos: BosPolicy, chat: Chat = False) -> Batch:
    """Token ids of each text, with what each id shows as.

    Args:
        tokenizer: a transformers tokenizer.
        texts: the texts.
        bos: "model" does what the tokenizer does by itself, "always" puts a beginning-of-sequence
            token in front, "never" adds no special token.
        chat: put each text into the tokenizer's chat template, as `probekit.backends.transformers.chat` says. The
            template writes its special tokens itself, so "model" adds none, and "always" only a missing one.

    Raises:
        TextError: a text is empty or turns into no token.
        InputError: `bos` is "always" and the tokenizer has no such token, "never" and the chat template writes one,
            or a chat was asked for and cannot be made.
    """
    if bos not in ("model", "always", "never"):
        raise InputError(f"bos must be 'model', 'always' or 'never', found {bos!r}.")
    if bos == "always" and tokenizer.bos_token_id is None:
        raise InputError("bos='always' needs a beginning-of-sequence token, and this tokenizer has none; use 'never'.")
    done = []
    chats = chat is not False
    for i, text in enumerate(render_chats(tokenizer, texts, chat) if chats else texts):
        if not isinstance(text, str):
            raise TextError(f"Text {i} must be a string, found {type(text).__name__}.")
        if not text.strip():
            raise TextError(f"Text {i} is empty. Every text needs at least one visible character.")
        ids = list(tokenizer(text, add_special_tokens=bos == "model" and not chats, verbose=False)["input_ids"])
        begun = chats and ids[:1] == [tokenizer.bos_token_id]
        if begun and bos == "never":
            raise InputError(
                f"The chat template begins with {tokenizer.bos_token!r}, which bos='never' excludes; leave bos out."
            )
        if bos == "always" and not begun:
            ids = [tokenizer.bos_token_id, *ids]
        if not ids:
            raise TextError(f"Text {i} ({text[:30]!r}) turns into no token.")
        done.append(TokenText(tuple(ids), token_strings(tokenizer, ids), text=text))
    if not done:
        raise TextError("No text was given.")
    template = about_template(tokenizer, chat) if chats else ""
    return Batch(tuple(done), bos, begins=_begins(tokenizer, done), template=template)


def _begins(tokenizer: Any, texts: Sequence[TokenText]) -> str:
    """Whether texts begin with a beginning-of-sequence token, however it came there."""
    if tokenizer.bos_token_id is None:
        return "no token for it: the tokenizer has none"
    shown = f"{tokenizer.bos_token!r} (id {tokenizer.bos_token_id})"
    n = sum(t.ids[0] == tokenizer.bos_token_id for t in texts)
    if n in (0, len(texts)):
        return f"{shown} in front of every text" if n else f"no token for it: {shown} exists, and was not added"
    return f"{shown} in front of {n} of {len(texts)} texts"


def token_strings(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """What each id shows as: its text with its leading space, or its bytes where they are no whole character.

    Ids without a token, with which vocabularies are padded, show as `<unused 49153>`.
    """
    cache: dict[int, str] = {}
    for token_id in set(ids):
        piece = _piece(tokenizer, token_id)
        if piece is None:
            cache[token_id] = f"<unused {token_id}>"
        elif "▁" in piece:
            cache[token_id] = piece.replace("▁", " ")
        else:
            text = tokenizer.convert_tokens_to_string([piece])
            cache[token_id] = _bytes_of(piece) if "�" in text else text
    return tuple(cache[i] for i in ids)


def _piece(tokenizer: Any, token_id: int) -> str | None:
    try:
        piece: str | None = tokenizer.convert_ids_to_tokens(int(token_id))
    except (IndexError, KeyError, OverflowError):  # what tokenizers in Python say of an id that they do not have
        return None
    return piece


def _bytes_of(piece: str) -> str:
    byte = {char: number for number, char in bytes_to_unicode().items()}
    return "".join(f"\\x{byte[c]:02x}" if c in byte else c for c in piece)


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 over everything that decides how this tokenizer cuts a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

"""From text to the exact ids that run, and from ids to what a reader sees."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from probekit.core import Batch, BosPolicy, InputError, TextError, TokenText


def tokenize(tokenizer: Any, texts: Sequence[str], bos: BosPolicy) -> Batch:
    """Token ids of each text, with what each id shows as.

    Args:
        tokenizer: a transformers tokenizer.
        texts: the texts.
        bos: "model" does what the tokenizer does by itself, "always" puts a beginning-of-sequence
            token in front, "never" adds no special token.

    Raises:
        TextError: a text is empty or turns into no token.
        InputError: `bos` is "always" and the tokenizer has no such token.
    """
    if bos not in ("model", "always", "never"):
        raise InputError(f"bos must be 'model', 'always' or 'never', found {bos!r}.")
    if bos == "always" and tokenizer.bos_token_id is None:
        raise InputError("bos='always' needs a beginning-of-sequence token, and this tokenizer has none; use 'never'.")
    done = []
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TextError(f"Text {i} must be a string, found {type(text).__name__}.")
        if not text.strip():
            raise TextError(f"Text {i} is empty. Every text needs at least one visible character.")
        ids = list(tokenizer(text, add_special_tokens=bos == "model", verbose=False)["input_ids"])
        if bos == "always":
            ids = [tokenizer.bos_token_id, *ids]
        if not ids:
            raise TextError(f"Text {i} ({text[:30]!r}) turns into no token.")
        done.append(TokenText(tuple(ids), token_strings(tokenizer, ids)))
    if not done:
        raise TextError("No text was given.")
    return Batch(tuple(done), bos)


def token_strings(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """What each id shows as: its text with its leading space, or its bytes where they are no whole character."""
    cache: dict[int, str] = {}
    for token_id in set(ids):
        piece = tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            cache[token_id] = f"[{token_id}]"
        elif "▁" in piece:
            cache[token_id] = piece.replace("▁", " ")
        else:
            text = tokenizer.convert_tokens_to_string([piece])
            cache[token_id] = _bytes_of(piece) if "�" in text else text
    return tuple(cache[i] for i in ids)


def _bytes_of(piece: str) -> str:
    byte = {char: number for number, char in bytes_to_unicode().items()}
    return "".join(f"\\x{byte[c]:02x}" if c in byte else c for c in piece)


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 over everything that decides how this tokenizer cuts a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

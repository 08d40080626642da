"""Texts as turns of a chat, in the words of the tokenizer's own template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from probekit.core import Chat, InputError, TextError


def render_chats(tokenizer: Any, texts: Sequence[Any], chat: Chat) -> list[str]:
    """Each text as the model would be given it in a chat, special tokens spelled out.

    A text is one user turn, and the words that open the model's answer follow. A text that is a JSON list of
    messages ({"role": …, "content": …}), or such a list itself, is a whole chat; the opening words follow unless
    the last message is the model's own.

    Args:
        tokenizer: a transformers tokenizer.
        texts: strings or lists of messages.
        chat: True, or the system message that precedes chats without one.

    Raises:
        InputError: the tokenizer has no template, the template refuses a chat, or a message is malformed.
        TextError: a text is empty, or neither string nor list of messages.
    """
    if not isinstance(chat, (bool, str)) or (isinstance(chat, str) and not chat.strip()):
        raise InputError(f"chat must be True, False or the words of a system message, found {chat!r}.")
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "This tokenizer has no chat template, so its model was probably not trained on chats. Run the texts "
            "without chat, or give the tokenizer a template (tokenizer.chat_template)."
        )
    done = []
    for i, text in enumerate(texts):
        messages = _messages(text, i)
        if isinstance(chat, str) and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": chat}, *messages]
        try:
            opens = messages[-1]["role"] != "assistant"
            done.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens))
        except Exception as error:  # a template raises whatever its engine raises
            raise InputError(f"The chat template refuses text {i}: {error}") from error
    return done


def about_template(tokenizer: Any, chat: Chat) -> str:
    """What was applied, in words, with a hash of the template."""
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    system = f", system message {chat!r}" if isinstance(chat, str) else ""
    return f"the tokenizer's own (sha256:{digest}), each text a user turn or a list of messages{system}"


def _messages(text: Any, i: int) -> list[dict[str, Any]]:
    if isinstance(text, str):
        if not text.strip():
            raise TextError(f"Text {i} is empty. Every text needs at least one visible character.")
        found = _json_list(text)
        if found is None:
            return [{"role": "user", "content": text}]
    elif isinstance(text, Sequence) and not isinstance(text, bytes):
        found = list(text)
    else:
        raise TextError(f"Text {i} must be a string or a list of messages, found {type(text).__name__}.")
    for n, message in enumerate(found):
        fits = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not fits or not isinstance(message.get("content"), str):
            raise InputError(
                f"Message {n} of text {i} is {str(message)[:60]!r}; expected a role and a content, both strings, as in "
                '{"role": "user", "content": "…"}.'
            )
    if not any(m["content"].strip() for m in found):
        raise TextError(f"Text {i} is a list of messages without any words.")
    return [dict(m) for m in found]


def _json_list(text: str) -> list[Any] | None:
    """The messages that a text spells in JSON; None if it is an ordinary text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return None
    alike = (
        isinstance(found, list) and found and all(isinstance(m, dict) and {"role", "content"} & set(m) for m in found)
    )
    return found if alike else None

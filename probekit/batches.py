"""From what a user gives as texts to the exact tokens that will run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from probekit.core import Batch, BosPolicy, CapabilityError, Chat, InputError, Model, TextError, TokenText
from probekit.engine import Job, check_texts


def make_batch(
    model: Model,
    jobs: Sequence[Job],
    texts: Any,
    bos: BosPolicy,
    window: int | None,
    chat: Chat = False,
    *,
    opening: int | None = None,
) -> Batch:
    """The exact tokens that will run, checked against what the analyses and the model need.

    Raises:
        TextError: a text is empty, too short for an analysis or too long for the model.
        CapabilityError: a chat was asked for, and the model has no tokenizer that could make one.
    """
    unread = bool(jobs) and not any(job.analysis.reads_texts for job in jobs)
    if texts is None and unread:
        return Batch(())
    domains: list[str] = []
    answers: list[str] = []
    if isinstance(texts, Mapping) and "text" not in texts:
        domains, texts = _flatten(texts)
    elif isinstance(texts, Mapping) or _has_records(texts):
        domains, answers, texts = _records([texts] if isinstance(texts, Mapping) else texts)
    if isinstance(texts, Batch):
        if chat is not False:
            raise InputError("chat applies to texts; these are tokenised already. Give chat to model.tokenize.")
        batch = texts
    else:
        if not isinstance(texts, (str, Sequence)):
            raise InputError(
                f"texts must be a string or a list of strings, or a dictionary of such lists by domain; found "
                f"{type(texts).__name__}."
            )
        if unread and model.info.kind == "encoder" and chat is False:
            batch = _as_strings([texts] if isinstance(texts, str) else texts)
        elif chat is False:
            batch = model.tokenize([texts] if isinstance(texts, str) else list(texts), bos)
        else:
            batch = tokenize_chats(model, texts, bos, chat)
        if domains:
            named = tuple(replace(t, domain=d) for t, d in zip(batch, domains, strict=True))
            batch = replace(batch, texts=named)
        if any(answers):
            said = tuple(replace(t, answer=a) for t, a in zip(batch, answers, strict=True))
            batch = replace(batch, texts=said)
    if window is not None:
        if window < 2:
            raise InputError(f"window must be at least 2 tokens, found {window}.")
        longest = max(batch.lengths)
        batch = batch.windows(window)
        if not len(batch):
            raise TextError(f"No text fills a window of {window} tokens; the longest has {longest}.")
    if opening is not None:
        batch = _openings(batch, opening)
    check_texts(jobs, batch, model.info.context_length)
    return batch


def source_digest(texts: Any) -> str:
    """sha256 over texts as they were given, before any model cut them into tokens; "" of texts that are tokens already.

    Two models that read the same texts have this in common, whatever their tokenizers make of them.
    """
    if texts is None or isinstance(texts, Batch):
        return ""
    listed = [texts] if isinstance(texts, str) else texts
    spelled = json.dumps(listed, ensure_ascii=False, sort_keys=True, default=str)
    return f"sha256:{hashlib.sha256(spelled.encode('utf-8', 'surrogatepass')).hexdigest()}"


def _openings(batch: Batch, size: int) -> Batch:
    """The first tokens of each text that has as many."""
    if size < 2:
        raise InputError(f"opening must be at least 2 tokens, found {size}.")
    cut = batch.openings(size)
    if not len(cut):
        raise TextError(f"No text has {size} tokens for an opening; the longest has {max(batch.lengths, default=0)}.")
    gone = [domain for domain in dict.fromkeys(batch.domains) if domain not in cut.domains]
    if gone:
        raise TextError(f"No text of {', '.join(map(repr, gone))} has {size} tokens for an opening.")
    return cut


def _as_strings(texts: Sequence[Any]) -> Batch:
    """Sentences that an analysis embeds in its own way: not tokenised here, and of any length."""
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise TextError(f"Text {i} is {text!r}; expected a string with at least one visible character.")
    return Batch(tuple(TokenText((), (), text=text) for text in texts))


def _flatten(texts: Mapping[Any, Any]) -> tuple[list[str], list[Any]]:
    """The domain of each text, and the texts, of a dictionary of texts by domain."""
    if {"role", "content"} <= set(texts):
        raise InputError("Found one chat message as texts; give a list of messages, or texts by domain.")
    domains, flat = [], []
    for domain, some in texts.items():
        if not isinstance(domain, str) or not domain:
            raise InputError(f"A dictionary of texts has the names of their domains as keys; found {domain!r}.")
        listed = [some] if isinstance(some, str) else some
        if not isinstance(listed, Sequence) or not len(listed):
            raise InputError(f"The domain {domain!r} holds {some!r}; expected a text or a list of texts.")
        if all(isinstance(message, Mapping) for message in listed):
            listed = [listed]  # one chat
        domains += [domain] * len(listed)
        flat += list(listed)
    if not flat:
        raise TextError("No text was given.")
    return domains, flat


def _has_records(texts: Any) -> bool:
    return isinstance(texts, Sequence) and any(isinstance(t, Mapping) and "text" in t for t in texts)


def _records(texts: Sequence[Any]) -> tuple[list[str], list[str], list[Any]]:
    """Domain and right answer of each text, and the texts, of a list of records and plain texts."""
    domains, answers, flat = [], [], []
    for i, one in enumerate(texts):
        record = one if isinstance(one, Mapping) and "text" in one else {"text": one}
        strange = sorted(set(record) - {"text", "domain", "answer"})
        domain, answer = record.get("domain") or "", record.get("answer", "")
        if (
            strange
            or not isinstance(domain, str)
            or isinstance(answer, bool)
            or not isinstance(answer, (str, int, float))
        ):
            raise InputError(
                f"Text {i} is a record with {', '.join(f'{k}={v!r}' for k, v in record.items() if k != 'text')}; expected "
                "a text, and a domain and an answer (a string or a number) if wanted."
            )
        domains.append(domain)
        answers.append(str(answer))
        flat.append(record["text"])
    if any(domains) and not all(domains):
        raise InputError(
            f"Text {domains.index('')} names no domain and others do ({', '.join(dict.fromkeys(filter(None, domains)))}). "
            "Give all of them one."
        )
    return domains if any(domains) else [], answers, flat


def tokenize_chats(model: Any, texts: Any, bos: BosPolicy, chat: Chat) -> Batch:
    """Each text as a turn in the model's chat template.

    Raises:
        CapabilityError: the model has no tokenizer that could make one.
    """
    if model.info.kind != "decoder" or not hasattr(getattr(model, "native", model), "tokenizer"):
        raise CapabilityError(
            f"{model.info.name!r} ({type(model).__name__}) has no chat template; open a decoder that was trained on "
            "chats, such as 'smollm2-135m-instruct', or leave chat out."
        )
    one = isinstance(texts, str) or (len(texts) > 0 and all(isinstance(message, Mapping) for message in texts))
    batch: Batch = model.tokenize([texts] if one else list(texts), bos, chat)
    return batch

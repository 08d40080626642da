"""What a terminal is told of the texts that run."""

from __future__ import annotations

from probekit.core import Batch

SHOWN_TEXTS, SHOWN_TOKENS = 3, 24


def about_tokens(batch: Batch) -> list[str]:
    """The exact tokens that would run, as far as a terminal has room for them."""
    lines = [beginning(batch.begins, batch.template)]
    for i, text in enumerate(batch.texts[:SHOWN_TEXTS]):
        shown = "  ".join(f"{n} {s!r}" for n, s in zip(text.ids[:SHOWN_TOKENS], text.strings, strict=False))
        lines.append(f"text {i:<5}{shown}{f'  … ({len(text)} in all)' if len(text) > SHOWN_TOKENS else ''}")
    if len(batch) > SHOWN_TEXTS:
        lines.append(f"          … ({len(batch)} texts in all)")
    return lines


def beginning(begins: str, template: str) -> str:
    """How texts begin, and the chat template that was applied."""
    chat = f"\nchat      {template}" if template else ""
    return f"begins    {begins or 'as the model was given it'}{chat}"

"""What a model wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .text import Batch

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class Written:
    """One token, just written.

    Args:
        text: corpus index of its text.
        id: the token.
        shown: what it shows as.
        logprob_nats: its log-probability at temperature 1.
        entropy_nats: of the distribution it was drawn from, at temperature 1.
    """

    text: int
    id: int
    shown: str
    logprob_nats: float
    entropy_nats: float


@dataclass(frozen=True)
class Generated:
    """Texts with their continuations.

    Args:
        batch: each prompt with what the model wrote after it, ready to be run; `index` as in the prompts.
        n_prompt: tokens of each text that are prompt.
        texts: what was written after each prompt, special tokens left out.
        data: axis `token` over the written tokens only, texts end to end (coordinates text, pos, token_id,
            token_str): `logprob_nats` of the token and `entropy_nats` of the distribution it was drawn from, both
            at temperature 1; and `ended` (axis text): whether the text stopped at an end token.
    """

    batch: Batch
    n_prompt: tuple[int, ...]
    texts: tuple[str, ...]
    data: xr.Dataset

    def __repr__(self) -> str:
        lines = []
        for text, n, written in zip(self.batch, self.n_prompt, self.texts, strict=True):
            prompt = "".join(text.strings[:n])
            shown = prompt if len(prompt) <= 60 else f"… {prompt[-58:]}"
            lines.append(f"{shown!r}  →  {written!r} ({len(text) - n} tokens)")
        return "\n".join(lines)

"""Predicted tokens as text, for hovers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .text import visible

if TYPE_CHECKING:
    import xarray as xr


def words_by_id(vocab: xr.DataArray) -> dict[int, str]:
    """What ids show as, by id.

    Args:
        vocab: strings; axis `vocab` with the ids as its coordinate.
    """
    return dict(zip(vocab["vocab"].values.tolist(), map(str, vocab.values), strict=True))


def next_words(
    ids: xr.DataArray, logprobs: xr.DataArray, vocab: xr.DataArray, *, n: int = 5, separator: str = ", "
) -> xr.DataArray:
    """The likeliest tokens of each place with their probabilities, such as `the 31.0%, a 12.0%`; plain text.

    Args:
        ids: token ids; the last axis is `rank`.
        logprobs: their log-probabilities in nats; same axes.
        vocab: what ids show as; axis `vocab` with the ids as its coordinate.
        n: how many to name.
        separator: what stands between them.
    """
    words = {i: visible(s) for i, s in words_by_id(vocab).items()}
    shown_ids, shares = ids.values[..., :n], np.exp(logprobs.values[..., :n])
    out = np.empty(shown_ids.shape[:-1], dtype=object)
    for place in np.ndindex(*out.shape):
        pairs = zip(shown_ids[place].tolist(), shares[place].tolist(), strict=True)
        out[place] = separator.join(f"{words[i]} {p:.1%}" for i, p in pairs)
    return ids.isel(rank=0, drop=True).copy(data=out)

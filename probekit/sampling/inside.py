"""What the model is like inside at the tokens that matter: layers, attention on position 0 and alternatives.

An analysis that lets a model write reads its answers once more with the captures `INSIDE`; what they say of every token
of the answers lies beside what continuations say of them, from one and the same pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Measure
from probekit.core import Base, Batch, Capture, TokenText, Trace
from probekit.reduce import AttentionStats, NextToken, Readout

NEXT = Capture("logits", NextToken(20))
LENS = Capture("resid_post", Readout(1))
SINKS = Capture("pattern", AttentionStats())
INSIDE = (NEXT, LENS, SINKS)
MOST_SHOWN = 4  # tokens that are drawn together
_ALTERNATIVES = 6

INSIDE_MEASURES = {
    "probability": Measure(("token",), "share", "probability of the answer's own token"),
    "entropy_nats": Measure(("token",), "nats", "entropy of the distribution that the token was taken from"),
    "lens_logprob_nats": Measure(("layer", "token"), "nats", "log-probability of the token by the lens after each block"),
    "lens_top_id": Measure(("layer", "token"), "1", "id that the lens finds likeliest in its place after each block"),
    "lens_top_prob": Measure(("layer", "token"), "share", "probability of that id by the lens"),
    "sink_share": Measure(
        ("layer", "token"), "share", "attention on position 0 at the place that predicts the token, mean over heads"
    ),
    "top_id": Measure(("token", "rank"), "1", "ids that were likeliest in the token's place"),
    "top_prob": Measure(("token", "rank"), "share", "their probabilities"),
    "vocab_str": Measure(("vocab",), "1", "what ids show as"),
}  # fmt: skip


def answers_only(bases: Sequence[Base], inside: Trace) -> tuple[Batch, np.ndarray]:
    """The answers without their prompts, and the row of `inside` that holds each of their tokens.

    Args:
        bases: prompts with their answers.
        inside: a pass over them.

    Returns:
        A batch of the answers, and for each of their tokens its place on the pass' token axis; the distribution that
        it was taken from lies in the row before.
    """
    starts = inside.batch.starts
    rows = [starts[i] + np.arange(b.n_prompt, len(b.ids)) for i, b in enumerate(bases)]
    texts = [TokenText(b.ids[b.n_prompt :], t.strings[b.n_prompt :]) for b, t in zip(bases, inside.batch, strict=True)]
    return Batch(tuple(texts)), np.concatenate(rows)


def inside_measures(inside: Trace, rows: np.ndarray) -> dict[str, Any]:
    """The variables of `INSIDE_MEASURES`, for `xr.Dataset`.

    Args:
        inside: a pass with the captures `INSIDE`.
        rows: place of each token on the pass' token axis, none of them the first of its text.
    """
    next_, lens = inside[NEXT], inside[LENS]
    before = rows - 1
    return {
        "probability": ("token", np.exp(next_["logprob_nats"].values[before].astype(float))),
        "entropy_nats": ("token", next_["entropy_nats"].values[before]),
        "lens_logprob_nats": (("layer", "token"), lens["logprob_nats"].values[:, before]),
        "lens_top_id": (("layer", "token"), lens["top_id"].values[:, before, 0].astype(np.int64)),
        "lens_top_prob": (("layer", "token"), np.exp(lens["top_logprob"].values[:, before, 0].astype(float))),
        "sink_share": (("layer", "token"), inside[SINKS]["first_share"].values[:, :, before].mean(axis=1)),
        "top_id": (("token", "rank"), next_["top_id"].values[before, :_ALTERNATIVES].astype(np.int64)),
        "top_prob": (("token", "rank"), np.exp(next_["top_logprob"].values[before, :_ALTERNATIVES].astype(float))),
        "vocab_str": inside.vocab_table(),
    }


def inside_drawings(data: xr.Dataset, places: Mapping[str, int], about: str) -> dict[str, plots.Drawing]:
    """Layers, attention on position 0 and alternatives at a few tokens.

    Args:
        data: has the variables of `INSIDE_MEASURES`, and the coordinates of a token axis.
        places: by label, such as "critical", places on the token axis; the first is the one that matters most. At most
            four are shown.
        about: model and corpus, for the captions.

    Returns:
        Drawings by name: "inside-lens", "inside-sinks", "inside-alternatives"; none without places.
    """
    if not places:
        return {}
    shown = dict(list(places.items())[:MOST_SHOWN])
    named = {_label(data, name, at): at for name, at in shown.items()}
    first, place = next(iter(named.items()))
    word = plots.visible(str(data["token_str"].values[place]))
    middle = data["sink_share"].median("token").rename("sink_share")
    sinks = {label: data["sink_share"].isel(token=at).drop_vars(_token_coords(data)) for label, at in named.items()}
    lens = {n: data["lens_logprob_nats"].isel(token=at).drop_vars(_token_coords(data)) for n, at in named.items()}
    return {
        "inside-lens": plots.lines(
            lens,
            title=f"{word!r} {_since(data, place)}",
            unit="nats",
            quantity="log-probability by the lens",
            caption=f"{about} Logit lens at the position that predicts each token; 0 is certainty.",
            alt="Log-probability of chosen tokens by the logit lens against the block.",
        ),
        "inside-sinks": plots.lines(
            sinks | {"median of all tokens": middle},
            title="How much attention rests on position 0 where these tokens are predicted",
            unit="share",
            quantity="attention on position 0",
            y_range=(0, 1),
            caption=f"{about} Mean over heads, at the position that predicts each token; the median is over all tokens "
            "of the answers.",
            alt="Attention on position 0 at chosen tokens against the block, beside the median of all tokens.",
        ),
        "inside-alternatives": plots.bars(
            _alternatives(data, place),
            title=f"What else could have stood in the place of {word!r}",
            unit="share",
            quantity="probability",
            by="token",
            caption=f"{about} The likeliest tokens in the place of {first}, and the answer's own.",
            alt="Bars of the probabilities of the likeliest tokens in one place of an answer.",
        ),
    }


def _token_coords(data: xr.Dataset) -> list[str]:
    return [str(name) for name, c in data.coords.items() if c.dims == ("token",)]


def _label(data: xr.Dataset, name: str, place: int) -> str:
    first = int(np.flatnonzero(data["text"].values == data["text"].values[place])[0])
    return f"{name} {plots.visible(str(data['token_str'].values[place]))!r} ({place - first})"


def _since(data: xr.Dataset, place: int) -> str:
    """From which block on the lens says this token, in words."""
    own = data["lens_top_id"].values[:, place] == int(data["token_id"].values[place])
    if not own[-1]:
        return "is never what the lens finds likeliest" if not own.any() else "is not the likeliest token in the end"
    last = np.flatnonzero(~own)
    start = 0 if not last.size else int(last[-1]) + 1
    since = "after every block" if start == 0 else f"from block {int(data['layer'].values[start])} on"
    return f"is what the lens finds likeliest {since}"


def _alternatives(data: xr.Dataset, place: int) -> dict[str, float]:
    table = plots.words_by_id(data["vocab_str"])
    ids, probs = data["top_id"].values[place].tolist(), data["top_prob"].values[place].tolist()
    own = int(data["token_id"].values[place])
    if own not in ids:
        ids, probs = [*ids, own], [*probs, float(data["probability"].values[place])]
    words = [plots.visible(table.get(i, str(data["token_str"].values[place]))) for i in ids]
    labels = [f"{w} (the answer's own)" if i == own else w for w, i in zip(words, ids, strict=True)]
    return {
        label if labels.count(label) == 1 else f"{label} [{i}]": p
        for label, i, p in zip(labels, ids, probs, strict=True)
    }

"""Two models at the tokens of several answers, as labelled numbers: token by token, and how unevenly they are spread."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .concentration import HUNDREDTHS, Units, by_tenth, carried, ranked, tenths
from .divergences import compare, matched, unspecific

THRESHOLDS = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 0.6)  # nats
NATS = ("js", "kl_model_base", "kl_base_model", "delta_logprob", "entropy_model", "entropy_base")
Along = dict[str, np.ndarray]


def along(log_p: np.ndarray, log_q: np.ndarray, ids: Sequence[int], *, top_p: float, top_k: int) -> Along:
    """Everything about one answer: `compare`, and what unspecific noise on the base's logits does at every scale.

    The noise depends on the answer's tokens alone.

    Args:
        log_p: the base's log-probabilities; axes token, vocab.
        log_q: the model's.
        ids: the answer's tokens.
        top_p: of the nuclei.
        top_k: how many of the likeliest are compared.

    Returns:
        As `compare`, with `noise_js` and `noise_changed`; axes token, scale.
    """
    seed = int.from_bytes(hashlib.sha256(repr(tuple(ids)).encode()).digest()[:8], "little")
    js, changed = unspecific(log_p, seed)
    found = compare(log_p, log_q, ids, top_p=top_p, top_k=top_k)
    return found | {"noise_js": js.T, "noise_changed": changed.T}


def spread(parts: Sequence[Along], prompts: Sequence[int]) -> dict[str, Any]:
    """The variables of a comparison, for `xr.Dataset`; axes token, threshold, rank and bin.

    Args:
        parts: what `along` says of each answer.
        prompts: the prompt of each.
    """
    lengths = [len(part["js"]) for part in parts]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    noise = matched(whole.pop("noise_js").T, whole.pop("noise_changed").T, float(whole["js"].mean()))
    units = Units.choose(np.repeat(prompts, lengths), np.repeat(np.arange(len(parts)), lengths))
    place = np.concatenate([(np.arange(n) + 0.5) / n for n in lengths])
    js, cut, null = whole["js"], whole["js_cut"], noise[0]
    ends = units.interval(lambda rows: carried(js[rows]), low=0, high=1)
    curve = carried(js)
    low, high = (curve, curve) if ends is None else ends
    kinds = {"place": tenths(place), "entropy": tenths(ranked(whole["entropy_base"]))}
    curves: dict[str, Any] = {
        "carried": ("rank", curve),
        "carried_low": ("rank", low),
        "carried_high": ("rank", high),
        "carried_cut": ("rank", carried(cut)),
        "carried_unspecific": ("rank", carried(null)),
    }
    for kind, tenth in kinds.items():
        for end, values in zip(("", "_low", "_high"), by_tenth(js, tenth, units), strict=True):
            curves[f"js_by_{kind}{end}"] = ("bin", values)
        curves[f"unspecific_by_{kind}"] = ("bin", by_tenth(null, tenth, units)[0])
    return {
        **{_named(name): ("token", values) for name, values in whole.items()},
        "unspecific_nats": ("token", null),
        "unspecific_changed": ("token", noise[1]),
        "share_below": ("threshold", _below(js)),
        "share_below_cut": ("threshold", _below(cut)),
        "share_below_unspecific": ("threshold", _below(null)),
        **curves,
    }


def spread_coords() -> dict[str, Any]:
    """The coordinates of `spread`: thresholds in nats, middles of the tenths, hundredths counted from 0."""
    return {"threshold": np.array(THRESHOLDS), "bin": np.arange(10) / 10 + 0.05, "rank": np.arange(HUNDREDTHS)}


def _below(js: np.ndarray) -> np.ndarray:
    return np.array([(js < t).mean() for t in THRESHOLDS])


def _named(name: str) -> str:
    """With the unit in the name."""
    plain = name.removesuffix("_cut")
    return name if plain not in NATS else f"{plain}{'_cut' * name.endswith('_cut')}_nats"

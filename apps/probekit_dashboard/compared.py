"""Two texts, or two models, side by side: scales that both share, differences in words, tables. No streamlit here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

import probekit as pk
from probekit import plots
from probekit.stats import BLOCK, Estimate, difference, token_mean
from probekit_dashboard.frame import Seen, before

LN2 = float(np.log(2.0))
LARGEST = 25  # shifts that are listed
FEWEST = 3  # units of an interval
ACROSS_MODELS = ("surprisal", "entropy before", "rank", "sink mass")  # quantities that mean the same in every model


def same_scale(
    one: Sequence[plots.Quantity], other: Sequence[plots.Quantity]
) -> tuple[tuple[plots.Quantity, ...], tuple[plots.Quantity, ...]]:
    """The same quantities of two strips, each from the smallest to the largest value of both.

    Args:
        one: quantities of the first strip.
        other: the same ones of the second.
    """
    pairs = [_same(a, b) for a, b in zip(one, other, strict=True)]
    return tuple(a for a, _ in pairs), tuple(b for _, b in pairs)


def _same(a: plots.Quantity, b: plots.Quantity) -> tuple[plots.Quantity, plots.Quantity]:
    values = np.concatenate([np.asarray(a.values, dtype=float), np.asarray(b.values, dtype=float)])
    known = values[np.isfinite(values) & ((values > 0) | (a.scale != "log"))]
    if not known.size:
        return a, b
    low = float(known.min()) if a.low is None else a.low
    high = float(known.max()) if a.high is None else a.high
    return replace(a, low=low, high=high), replace(b, low=low, high=high)


def across_models(quantities: Sequence[plots.Quantity]) -> tuple[plots.Quantity, ...]:
    """Those quantities whose values two models can be compared by."""
    return tuple(q for q in quantities if q.label in ACROSS_MODELS)


@dataclass(frozen=True)
class Contrast:
    """One number of two texts.

    Args:
        what: in words.
        unit: of it.
        one: of the first.
        other: of the second.
    """

    what: str
    unit: str
    one: Estimate
    other: Estimate

    @property
    def words(self) -> str:
        """The two values and their difference in one sentence."""
        change = difference(self.one, self.other)
        said = f"{self.what}: {_value(self.one)} in the first, {_value(self.other)} in the second ({self.unit}). "
        said += f"Second minus first: {change.value:+.3g}"
        if change.ci95 is None:
            return f"{said}; no interval: a text needs more than {(FEWEST - 1) * BLOCK} tokens for one."
        inside = " The interval holds 0." if change.ci95[0] <= 0 <= change.ci95[1] else ""
        return f"{said} (95 % {change.ci95[0]:+.3g} to {change.ci95[1]:+.3g}).{inside}"

    def row(self) -> dict[str, Any]:
        """One line of a table."""
        change = difference(self.one, self.other)
        found: dict[str, Any] = {"quantity": self.what, "unit": self.unit}
        for name, e in (("first", self.one), ("second", self.other), ("difference", change)):
            low, high = e.ci95 or (np.nan, np.nan)
            found |= {name: e.value, f"{name} low": low, f"{name} high": high}
        return found | {"first n": self.one.n, "second n": self.other.n, "units": self.one.n_unit}


def _value(e: Estimate) -> str:
    if e.ci95 is None:
        return f"{e.value:.3g}"
    return f"{e.value:.3g} (95 % {e.ci95[0]:.3g} to {e.ci95[1]:.3g}, {e.n} {e.n_unit})"


def contrasts(one: Seen, other: Seen) -> list[Contrast]:
    """Surprisal and settled block of two texts in one model; means over tokens that weigh the same."""
    found = []
    for what, unit, kind, variable in (
        ("Mean surprisal", "nats per token", "uncertainty", "surprisal_nats"),
        ("Mean entropy of the predictions", "nats", "uncertainty", "entropy_nats"),
        ("Mean block from which the likeliest token stays", "block", "lens", "settled_layer"),
    ):
        a, b = (_mean(getattr(s, kind), variable) for s in (one, other))
        found.append(Contrast(what, unit, a, b))
    return found


def _mean(data: Any, variable: str) -> Estimate:
    found = token_mean(np.asarray(data[variable].values, dtype=float), data["text"].values, data["pos"].values)
    if found.n < FEWEST:  # Student's t on one degree of freedom says nothing
        return Estimate(found.value, None, found.n, found.n_unit)
    return found.within(0.0, np.inf) if variable != "delta_logprob_nats" else found


def horizon_of(seen: Seen) -> int:
    """Tokens over which sinks of a text were measured."""
    return int(seen.results["attention-sinks"].params.as_dict()["horizon"])


def sink_words(one: pk.Result, other: pk.Result) -> str:
    """Sink rates of two texts, measured over as many tokens; one number a text has no interval.

    Args:
        one: attention-sinks of the first.
        other: of the second, with the same parameters.
    """
    rates = [100 * float(r["sink_rate"].mean()) for r in (one, other)]
    p = one.params.as_dict()
    return (
        f"Sink rate: position 0 is a sink for {rates[0]:.1f} % of the heads in the first, {rates[1]:.1f} % in the second: it "
        f"receives more than {p['epsilon']:.0%} of their attention, over the first {p['horizon']} tokens of either. One text "
        "each has no interval."
    )


def at_token(quantities: Sequence[plots.Quantity], token: int) -> dict[str, float]:
    """Every quantity of one token, by label and unit."""
    return {f"{q.label} ({q.unit})" if q.unit != "1" else q.label: float(q.values[token]) for q in quantities}


def token_table(
    one: Sequence[plots.Quantity], other: Sequence[plots.Quantity], places: tuple[int, int]
) -> pd.DataFrame:
    """The quantities of a token of each text."""
    a, b = at_token(one, places[0]), at_token(other, places[1])
    names = list(dict.fromkeys([*a, *b]))
    return pd.DataFrame({"quantity": names, "first": [a.get(n) for n in names], "second": [b.get(n) for n in names]})


def shift_quantities(shift: pk.Shift) -> tuple[plots.Quantity, ...]:
    """What a strip of a shift can be coloured by; values stand at the token that both models predict."""
    data = shift.data
    return (
        plots.Quantity("JS divergence", "nats", before(data["js_nats"].values), low=0.0),
        plots.Quantity("change of log-probability", "nats", before(data["delta_logprob_nats"].values), "diverging"),
        plots.Quantity("another likeliest token", "1", before(data["argmax_changed"].values), low=0.0, high=1.0),
        plots.Quantity(
            "change of entropy", "nats", before(np.diff(data["entropy_nats"].values, axis=0)[0]), "diverging"
        ),
    )


def shift_words(shift: pk.Shift) -> list[str]:
    """How large the shift is along the text, in sentences."""
    data = shift.data
    js = _mean(data, "js_nats")
    n, changed = data.sizes["token"], int(data["argmax_changed"].values.sum())
    top = int(data["js_nats"].values.argmax())
    word = plots.visible(str(data["token_str"].values[top]))
    found = [
        f"Mean Jensen-Shannon divergence {_value(js)} nats. A model against itself has 0; two that have no token in common "
        f"have ln 2 = {LN2:.3f}.",
        f"Another likeliest token after {changed:,} of {n:,} tokens ({changed / n:.1%}).",
        f"The largest divergence, {float(data['js_nats'].values[top]):.3g} nats, is in what follows token {top}, {word!r}.",
    ]
    if n > 1:
        loss = _mean(data, "delta_logprob_nats")
        found.append(
            f"To the other model, the text's tokens are {abs(loss.value):.3g} nats {'less' if loss.value > 0 else 'more'} surprising on average."
        )
    return found


def shift_table(shift: pk.Shift, most: int = LARGEST) -> pd.DataFrame:
    """The places with the largest divergence, largest first: the token, and what either model would have said there.

    Place n, after the last token, is what both predict next.
    """
    data = shift.data
    order = np.argsort(-data["js_nats"].values, kind="stable")[:most]
    tokens, n = data["token_str"].values, data.sizes["token"]
    said = [top_tokens(shift, case) for case in range(2)]
    rows = []
    for t in map(int, order):
        rows.append({
            "token": t + 1,
            "text": plots.visible(str(tokens[t + 1])) if t + 1 < n else "(after the text)",
            "after": plots.visible("".join(map(str, tokens[max(0, t - 4) : t + 1])))[-40:],
            "JS (nats)": float(data["js_nats"].values[t]),
            "Δ log p (nats)": float(data["delta_logprob_nats"].values[t]),
            "likeliest": "another" if data["argmax_changed"].values[t] else "the same",
            "model": said[0](t), "other": said[1](t),
        })  # fmt: skip
    return pd.DataFrame(rows)


def top_tokens(shift: pk.Shift, case: int, most: int = 3) -> Any:
    """A function that names the likeliest tokens of a model after a token, with their probabilities."""
    words = {int(i): plots.visible(str(s)) for i, s in plots.words_by_id(shift.data["vocab_str"]).items()}
    ids, share = shift.data["top_id"].values[case], np.exp(shift.data["top_logprob"].values[case])

    def said(t: int) -> str:
        return ", ".join(f"{words[int(i)]} {p:.0%}" for i, p in zip(ids[t][:most], share[t][:most], strict=True))

    return said


def both_tops(shift: pk.Shift, after: int) -> list[pd.DataFrame]:
    """The likeliest tokens of the model and of the other after a token, with their probabilities."""
    words = {int(i): plots.visible(str(s)) for i, s in plots.words_by_id(shift.data["vocab_str"]).items()}
    return [
        pd.DataFrame({
            "token": [words[int(i)] for i in shift.data["top_id"].values[case, after]],
            "probability": np.exp(shift.data["top_logprob"].values[case, after]),
        })
        for case in range(2)
    ]  # fmt: skip


def next_tops(seen: Seen, after: int, most: int = 5) -> pd.DataFrame:
    """The likeliest tokens after a token of a text, with their probabilities."""
    data = seen.uncertainty
    words = plots.words_by_id(data["vocab_str"])
    ids, share = data["top_id"].values[after][:most], np.exp(data["top_logprob"].values[after][:most])
    return pd.DataFrame({"token": [plots.visible(str(words[int(i)])) for i in ids], "probability": share})

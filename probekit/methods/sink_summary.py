"""What attention-sinks says about texts, as sums that add up over texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from probekit.stats import text_moments, token_moments

from .sinks import entropy_without_first, sink_phases, uniform_received

# By name: axes, what it is, and how two are combined where they are not added.
STATISTICS: dict[str, tuple[Any, ...]] = {
    "texts": ((), "texts"),
    "later": ((), "tokens after position 0"),
    "rate": (("moment",), "percent of pairs with a sink at position 0, over texts"),
    "rate_any": (("moment",), "percent of pairs with any sink, over texts"),
    "rate_other": (("moment",), "percent of pairs with a sink after position 0, over texts"),
    "excess": (("unit", "moment"), "attention on position 0 beyond an even share, over later tokens"),
    "even_sum": ((), "sum of the even shares of later tokens"),
    "phases": (("moment",), "phases over depth, over texts"),
    "strongest": (("moment",), "share of pairs that the strongest sink after position 0 serves, over texts"),
    "strongest_of_all": ((), "the strongest of these, and where it is", "best"),
    "first_sum": (("layer", "head"), "texts in which position 0 is a sink"),
    "any_sum": (("layer", "head"), "texts in which a key is a sink"),
    "other_sum": (("layer", "head"), "texts in which a key after position 0 is"),
    "key_sum": (("key",), "Sink_k summed over texts"),
    "epsilon_sum": (("threshold",), "Sink_1 for other thresholds, summed over texts"),
    "length_rates": (("query", "moment"), "Sink_1 by length, over texts"),
    "length_received": (("query",), "alpha_0 by length, summed over texts"),
    "entropy_sum": (("layer",), "row entropies of later queries, summed over heads and queries"),
    "rest_sum": (("layer",), "the same without position 0"),
    "rest_rows": (("layer",), "rows that these are of"),
}
PLACES = {"first": "sink_rate", "any": "sink_rate_any", "other": "sink_rate_other"}


def summarise(dataset: xr.Dataset) -> xr.Dataset:
    """The statistics of the texts of a result of attention-sinks."""
    text, pos = dataset["text"].values, dataset["pos"].values
    later, even = pos > 0, 1 / (pos + 1)
    n = dataset.sizes["text"]
    hits = {place: dataset[name].astype(float) for place, name in PLACES.items()}
    first = dataset["first_share"].mean(("layer", "head"), dtype=float).values
    strongest, best = _strongest(dataset)
    per_text = hits["first"].mean("head").values
    rows = dataset[["row_entropy_nats", "first_share"]].isel(token=later)
    rest = entropy_without_first(rows["row_entropy_nats"], rows["first_share"])
    return xr.Dataset(
        {
            "texts": n,
            "later": int(later.sum()),
            **{
                name: ("moment", text_moments(100 * hits[place].mean(("layer", "head")).values))
                for name, place in (("rate", "first"), ("rate_any", "any"), ("rate_other", "other"))
            },
            "excess": (("unit", "moment"), token_moments(np.where(later, first - even, np.nan), text, pos)),
            "even_sum": float(even[later].sum()),
            "phases": ("moment", text_moments(np.array([len(sink_phases(r)) for r in per_text], dtype=float))),
            "strongest": ("moment", text_moments(strongest)),
            "strongest_of_all": ((), np.array(best, dtype=object)),
            **{f"{place}_sum": hit.sum("text") for place, hit in hits.items()},
            "key_sum": dataset["sink_rate_by_key"] * n,
            "epsilon_sum": dataset["sink_rate_by_epsilon"] * n,
            "length_rates": (("query", "moment"), text_moments(dataset["sink_rate_by_length"].values.T)),
            "length_received": dataset["received_by_length"].sum("text"),
            "entropy_sum": rows["row_entropy_nats"].sum(("head", "token"), dtype=float),
            "rest_sum": rest.sum(("head", "token"), dtype=float),
            "rest_rows": rest.notnull().sum(("head", "token")),
        },
        coords={"query": dataset["query"].values},
    )


def _strongest(dataset: xr.Dataset) -> tuple[np.ndarray, dict[str, Any]]:
    """Of each text the share of the strongest sink after position 0, and the strongest of all with its place."""
    share, pos = dataset["sink_share"].mean("layer").values, dataset["pos"].values
    share = np.where((pos > 0) & np.isfinite(share), share, -1.0)
    starts = np.flatnonzero(pos == 0)
    at = [a + int(np.argmax(share[a:b])) for a, b in zip(starts, [*starts[1:], len(pos)], strict=True)]
    top = max(at, key=lambda i: share[i])
    text, word = int(dataset["text"].values[top]), str(dataset["token_str"].values[top])
    return share[at], {"value": float(share[top]), "text": text, "pos": int(pos[top]), "word": word}


def share_of_texts(summary: xr.Dataset, place: str) -> xr.DataArray:
    """Share of texts with a sink at a place of `PLACES`; axes layer, head."""
    return summary[f"{place}_sum"] / summary["texts"]


def totals(summary: xr.Dataset) -> dict[str, xr.DataArray]:
    """Rates by key, threshold and length, and entropies over depth, of all texts."""
    texts, n_heads = summary["texts"], summary.sizes["head"]
    lengths = summary["query"].values + 1
    uniform = np.array([uniform_received(t)[0] for t in lengths])
    return {
        "sink_rate_by_key": summary["key_sum"] / texts,
        "sink_rate_by_epsilon": summary["epsilon_sum"] / texts,
        "uniform_by_length": xr.DataArray(uniform, {"query": summary["query"].values}, ["query"]),
        "layer_entropy_nats": summary["entropy_sum"] / (summary["later"] * n_heads),
        "layer_entropy_rest_nats": (summary["rest_sum"] / summary["rest_rows"]).where(summary["rest_rows"] > 0),
    }

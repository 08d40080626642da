"""What massive-activations says about texts, as sums that add up over texts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import xarray as xr

from probekit.stats import text_moments

from .extremes import ROLES, gaussian_ratio, tally_carriers

ENDS = ("", "_loose")  # of what is counted by the strict and by the looser criterion
_CARRIERS: dict[str, tuple[Any, ...]] = {
    "n_massive": (("layer",), "massive entries"),
    "dim_texts": (("d_model",), "texts in which the dimension holds a massive entry"),
    "first": (("moment",), "share of carriers at the first position, over texts with carriers"),
    "chance": ((), "the same if carriers lay anywhere alike, summed over these texts"),
    "carriers": (("case",), "tokens that carry massive entries, by role"),
    "carrier_texts": (("case",), "texts with such tokens, by role"),
    "carrier_words": ((), "what these tokens show as, by role", "tally"),
}
# By name: axes, what it is, and how two are combined where they are not added.
STATISTICS: dict[str, tuple[Any, ...]] = {
    "texts": ((), "texts"),
    "times_median": (("moment",), "largest entry over its layer's median, over texts"),
    "magnitude": (("moment",), "largest entry, over texts"),
    "gaussian": ((), "expected ratio of as many Gaussian entries, summed over texts"),
    "places": ((), "dimension and position of each text's largest entry", "tally"),
    "writers": (("layer",), "texts in which the block writes the largest entry"),
    "mlp_shares": (("layer",), "the share of the MLP in these, summed"),
    "grown": (("layer", "moment"), "change of the largest entry in a block, over texts"),
    "elsewhere": (("layer",), "median change in all other blocks, summed over texts"),
    "gone": (("moment",), "part of the peak that is gone at the end, over texts"),
    "path_sum": (("layer",), "magnitude of each text's largest entry, summed; 0 where unknown"),
    "path_known": (("layer",), "texts in which it is known"),
    "massive_blocks": (("moment",), "blocks after which a text holds a massive entry, over texts"),
    "largest": (("layer", "rank"), "largest entries of any token", "max"),
    "median_sum": (("layer",), "median magnitude, summed over texts"),
    "loss_sum": ((), "loss of the model as it is, summed over predicted tokens"),
    "predicted": ((), "predicted tokens"),
    **{f"{name}{end}": how for end in ENDS for name, how in _CARRIERS.items()},
}


def summarise(data: xr.Dataset, min_magnitude: float, ratio: float) -> xr.Dataset:
    """The statistics of the texts of a result.

    Args:
        data: of massive-activations.
        min_magnitude: magnitude that a massive entry exceeds.
        ratio: multiple of the median that it exceeds.
    """
    text, n = np.unique(data["text"].values, return_inverse=True)[1], data.sizes["text"]
    lengths = np.bincount(text, minlength=n)
    known = np.abs(data["peak_path"].values.astype(float))
    path = np.nan_to_num(known)
    peaks, writer = path.max(axis=0), data["writer"].values
    medians = data["median"].values[data["peak_layer"].values, np.arange(n)]
    hit = (data["times_median"] > ratio) & (np.abs(data["value"].isel(rank=0)) > min_magnitude)
    blocks = [(np.bincount(text, row, n) > 0).astype(float) for row in hit.values]
    steps = np.diff(path, axis=0, prepend=0.0)
    others = [np.delete(np.abs(steps), i, axis=0) for i in range(len(steps))]
    loss = data["loss_nats"].sel(case="as it is").values.astype(float)
    n_entries = int(data.attrs["d_model"]) * data.sizes["layer"]
    places = zip(data["peak_dim"].values.tolist(), data["peak_pos"].values.tolist(), strict=True)
    return xr.Dataset(
        {
            "texts": n,
            "times_median": ("moment", text_moments(peaks / medians)),
            "magnitude": ("moment", text_moments(peaks)),
            "gaussian": float(sum(gaussian_ratio(int(k) * n_entries) for k in lengths)),
            "places": ((), np.array(dict(Counter(f"{dim} {pos}" for dim, pos in places)), dtype=object)),
            "writers": ("layer", np.bincount(writer, minlength=len(path))),
            "mlp_shares": ("layer", np.bincount(writer, data["writer_mlp_share"].values, len(path))),
            "grown": (("layer", "moment"), text_moments(steps)),
            "elsewhere": ("layer", [np.median(o, axis=0).sum() if len(o) else 0.0 for o in others]),
            "gone": ("moment", text_moments(1 - path[-1] / np.maximum(peaks, 1e-30))),
            "path_sum": ("layer", path.sum(axis=1)),
            "path_known": ("layer", np.isfinite(known).sum(axis=1)),
            "massive_blocks": ("moment", text_moments(np.sum(blocks, axis=0))),
            "largest": abs(data["value"]).max("token"),
            "median_sum": data["median"].sum("text", dtype=float),
            "loss_sum": float(np.nansum(loss)),
            "predicted": int(np.isfinite(loss).sum()),
            **{f"{name}{end}": found for end in ENDS for name, found in _carriers(data, end, text, lengths).items()},
        }
    )


def _carriers(data: xr.Dataset, end: str, text: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """Where the massive entries of one criterion lie."""
    n, role = len(lengths), data["role"].values
    held = data[f"massive_layers{end}"].values > 0
    first = held & (role == ROLES[0])
    some = np.bincount(text, held, n)
    share = np.where(some > 0, np.bincount(text, first, n) / np.maximum(some, 1), np.nan)
    texts, words = tally_carriers(held, role, data["token_str"].values, text)
    return {
        "n_massive": (data[f"n_massive{end}"] * n).round(),
        "dim_texts": data[f"dim_texts{end}"],
        "first": ("moment", text_moments(share)),
        "chance": float((1 / lengths)[some > 0].sum()),
        "carriers": ("case", [int((held & (role == name)).sum()) for name in ROLES]),
        "carrier_texts": ("case", texts),
        "carrier_words": ((), np.array(words, dtype=object)),
    }


def totals(summary: xr.Dataset) -> dict[str, xr.DataArray]:
    """Massive entries by layer and dimension, and the perplexity, of all texts."""
    found = {f"n_massive{end}": summary[f"n_massive{end}"] / summary["texts"] for end in ENDS}
    perplexity = np.exp(float(summary["loss_sum"] / summary["predicted"]))
    return {
        **found,
        **{f"dim_texts{end}": summary[f"dim_texts{end}"] for end in ENDS},
        "perplexity": xr.DataArray([perplexity], {"case": np.array(["as it is"], dtype=object)}, ["case"]),
    }


def commonest(places: dict[str, int]) -> tuple[int, int]:
    """Dimension and position that most texts share; the lowest where they tie."""
    found = {tuple(map(int, place.split())): count for place, count in places.items()}
    dim, pos = min(found, key=lambda place: (-found[place], place))
    return dim, pos

"""What patches do to one text: the distribution of a next token, and the loss, before and after; directions to add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probekit.core import (
    SITES,
    Batch,
    BosPolicy,
    Capture,
    Forward,
    InputError,
    Model,
    ModelInfo,
    Patch,
    Point,
    TextError,
    Trace,
)
from probekit.engine import Listener, Progress, run_pass, told
from probekit.methods.divergences import kullback_leibler
from probekit.reduce import AtPosition, NextToken, log_softmax

if TYPE_CHECKING:
    import xarray as xr

CASES = ("before", "after")


@dataclass(frozen=True, repr=False, eq=False)
class Effect:
    """What patches change in one text.

    Args:
        model: name of the model.
        position: of the token whose next-token distribution is compared, from 0.
        kl_nats: KL(before ‖ after) of that distribution over the whole vocabulary, in nats.
        data: `loss_nats` (axes case, token; case is before, after): -ln p of the token that follows, NaN at the end
            of the text; `logprob_nats` (axes case, vocab): log-probabilities after the position, of the tokens that
            are among the likeliest in either case, likeliest before the patch first; `vocab_str` (axis vocab): what
            these tokens show as.
    """

    model: str
    position: int
    kl_nats: float
    data: xr.Dataset

    @property
    def loss_nats(self) -> tuple[float, float]:
        """Mean loss before and after, over all tokens that are predicted, all weighing the same; NaN if there is none."""
        values = self.data["loss_nats"].values
        known = np.isfinite(values).all(axis=0)
        before, after = (float(row[known].mean()) if known.any() else float("nan") for row in values)
        return before, after

    @property
    def nbytes(self) -> int:
        """Memory that the arrays take."""
        return int(self.data.nbytes)

    def __repr__(self) -> str:
        before, after = self.loss_nats
        return (
            f"Effect on {self.model}: KL {self.kl_nats:.4g} nats after token {self.position}; "
            f"loss {before:.4g} → {after:.4g} nats per token"
        )


def effect(
    model: Any,
    text: str | Batch,
    patches: Sequence[Patch],
    *,
    position: int = -1,
    top_k: int = 10,
    bos: BosPolicy = "model",
    memory_limit: int | None = None,
    progress: bool | Listener = True,
) -> Effect:
    """What patches do to the predictions of one text; two passes.

    Args:
        model: an opened model, or anything that `open_model` takes.
        text: one text, or a `Batch` that holds one.
        patches: what is changed on the way, in this order.
        position: the token after which the distributions are compared, negative from the end.
        top_k: how many of the likeliest tokens of each distribution are kept.
        bos: as in `run`.
        memory_limit: as in `run`.
        progress: as in `run`.

    Raises:
        CapabilityError: the model lacks a point.
        InputError: a patch or the position does not fit the model or the text.
        TextError: there is not exactly one text, or it is too long.

    Example:
        >>> effect("smollm2-135m-instruct", "One two three", [Patch("mlp_out.3", 0.0)])  # doctest: +SKIP
    """
    opened, batch = _ready(model, text, bos)
    if len(batch) != 1:
        raise TextError(f"The effect of patches is measured on one text; found {len(batch)}.")
    if top_k < 1:
        raise InputError(f"Found top_k={top_k}; expected at least 1.")
    place = _place(position, len(batch.texts[0]))
    losses, here = Capture("logits", NextToken(1)), Capture("logits", AtPosition(place))
    traces: list[Trace] = []
    with Progress(2, **told(progress)) as bar:
        for some in ((), tuple(patches)):
            request = Forward((losses, here), some)
            traces.append(run_pass(opened, request, batch, memory_limit=memory_limit, progress=bar)[0])
    log_p, log_q = (log_softmax(t[here]["value"].values[0]) for t in traces)
    order = np.argsort(-log_p, kind="stable")
    likely = set(order[:top_k].tolist()) | set(np.argsort(-log_q, kind="stable")[:top_k].tolist())
    ids = [int(i) for i in order if int(i) in likely]
    data = _table(opened, ids, np.stack([log_p[ids], log_q[ids]]), [-t[losses]["logprob_nats"] for t in traces])
    return Effect(opened.info.name, place, float(kullback_leibler(log_p, log_q)), data)


def _table(model: Model, ids: list[int], logprobs: np.ndarray, losses: list[xr.DataArray]) -> xr.Dataset:
    import xarray as xr

    loss = xr.concat(losses, "case", coords="minimal", compat="override")
    nats = {"units": "nats"}
    return xr.Dataset(
        {
            "loss_nats": loss.rename("loss_nats").assign_attrs(nats | {"long_name": "-ln p of the token that follows"}),
            "logprob_nats": (("case", "vocab"), logprobs, nats | {"long_name": "log-probability after the position"}),
            "vocab_str": ("vocab", np.asarray(model.decode(ids), dtype=object)),
        },
        coords={"case": list(CASES), "vocab": np.asarray(ids, dtype=np.int64)},
    )


def difference_of_means(
    model: Any,
    point: Point | str | tuple[str, int],
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    position: int = -1,
    bos: BosPolicy = "model",
    memory_limit: int | None = None,
) -> xr.DataArray:
    """The direction from one group of texts to another: mean activation over `positive` minus that over `negative`.

    Every text weighs the same.

    Args:
        model: an opened model, or anything that `open_model` takes.
        point: where to look, with its layer.
        positive: texts that the direction points to.
        negative: texts that it points away from.
        position: of the token in each text, negative from the end.
        bos: as in `run`.
        memory_limit: as in `run`.

    Returns:
        The direction, unscaled, in units of the activation; the axes of the point but for its tokens.

    Raises:
        CapabilityError: the model lacks the point.
        InputError: a group is empty, the point names no layer or has no tokens, or a text no such position.

    Example:
        >>> model = "smollm2-135m-instruct"
        >>> difference_of_means(model, "resid_post.12", ["I love it"], ["I hate it"])  # doctest: +SKIP
    """
    where = Point.of(point)
    if not positive or not negative:
        raise InputError(
            f"A difference of means needs texts on both sides; found {len(positive)} and {len(negative)}. Give some."
        )
    site = SITES[where.site]
    if site.dims[0] != "token" or (site.layered and where.layer is None):
        raise InputError(f"Found the point {where}; expected one with a row per token, in one layer (resid_post.12).")
    opened, batch = _ready(model, [*positive, *negative], bos)
    opened.info.require(where)
    capture = Capture(where, AtPosition(position))
    trace, _ = run_pass(opened, Forward((capture,)), batch, memory_limit=memory_limit)
    values = trace[capture]["value"]
    if site.layered:
        values = values.isel(layer=0, drop=True)
    n = len(positive)
    found = values.isel(text=slice(0, n)).mean("text") - values.isel(text=slice(n, None)).mean("text")
    words = f"mean over {n} texts minus mean over {len(negative)}, at {where}"
    return found.rename("direction").assign_attrs(units="activation", long_name=words)


def _ready(model: Any, text: str | Sequence[str] | Batch, bos: BosPolicy) -> tuple[Model, Batch]:
    """The model with its weights, and texts that it can read."""
    from probekit.models import open_model

    opened = open_model(model, lazy=True)
    batch = text if isinstance(text, Batch) else opened.tokenize([text] if isinstance(text, str) else list(text), bos)
    _check_lengths(batch, opened.info)
    if hasattr(opened, "load"):
        opened.load()
    return opened, batch


def _check_lengths(batch: Batch, info: ModelInfo) -> None:
    limit = info.context_length
    for i, n in enumerate(batch.lengths):
        if n == 0:
            raise TextError(f"Text {i} is empty. Type some words.")
        if limit is not None and n > limit:
            raise TextError(f"Text {i} has {n:,} tokens; the model reads at most {limit:,}. Shorten it.")


def _place(position: int, n: int) -> int:
    if not -n <= position < n:
        raise InputError(f"Position {position} is outside the text of {n} tokens, 0 to {n - 1}.")
    return position % n

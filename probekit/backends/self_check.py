"""The check every backend passes at load: what it captures is what the model computes.

On a short dummy text: residual sums (in the form that the family obeys), attention rows, the lens at the
last layer against the model's logits, an identity patch that changes nothing and a zero patch that
changes the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from probekit.core import Batch, Capture, Forward, ModelInfo, Patch, Progress, Request, SelfCheckError, TokenText
from probekit.reduce import Field, Keep, Partial, Reducer

if TYPE_CHECKING:
    import torch

    from probekit.reduce.attention_blocks import AttentionBlock

N_TOKENS = 10
TOLERANCE = {"float32": 1e-4, "float64": 1e-5}  # relative to the largest entry; lower precision: see _tolerance


class Checked(Protocol):
    """What the check asks of a model."""

    @property
    def info(self) -> ModelInfo:
        """Sizes and capabilities."""
        ...

    def execute(self, request: Request, batch: Batch, progress: Progress | None = None) -> list[Partial]:
        """Serve a request."""
        ...

    def own_logits(self, batch: Batch) -> np.ndarray:
        """The model's own logits for one text; axes token, vocab."""
        ...


@dataclass(frozen=True)
class _RowSums(Reducer):
    """Sum of each attention row over the keys up to the query, and beyond it; and what the former should be.

    It should be one; in ReLU attention, whose rows sum to anything, the sum of the magnitudes, so that no weight is
    negative.
    """

    reads: ClassVar = "attention"

    def fields(self) -> Mapping[str, Field]:
        return {
            "past": Field(("head", "token"), "share", "attention on the query itself and what precedes it"),
            "future": Field(("head", "token"), "share", "attention on what follows the query"),
            "whole": Field(("head", "token"), "share", "what `past` should be"),
        }

    def measure(self, piece: AttentionBlock) -> Mapping[str, torch.Tensor]:
        past = piece.probs.tril(piece.start)
        total = past.sum(-1)
        whole = total.new_ones(total.shape) if piece.normalised else past.abs().sum(-1)
        return {"past": total, "future": (piece.probs - past).sum(-1), "whole": whole}


Added = Callable[[str, np.ndarray], np.ndarray]  # site, its activations (layer, token, d_model)


def self_check(model: Checked, added: Added | None = None, *, sinks: bool = False) -> None:
    """Compare a model's captured activations with its own output.

    Args:
        model: the model.
        added: what a sub-layer adds to the residual stream, given "attn_out" or "mlp_out" and the raw output there:
            the same after a post-norm or a multiplier, in families that have them. None if it is the output itself.
        sinks: whether heads have a learned logit that is no key, so that attention rows sum to less than one.

    Raises:
        SelfCheckError: they disagree; the message says where and by how much.
    """
    info = model.info
    ids = np.linspace(0, min(info.d_vocab, 20_000) - 1, N_TOKENS).astype(int)
    batch = Batch((TokenText(tuple(map(int, ids)), tuple("?" * N_TOKENS)),), "never")
    sites = ["resid_pre", "resid_post", "attn_out", "mlp_out", "mlp_act", "resid_mid", "logits"]
    served = [s for s in sites if s in info.sites]
    seen = _see(model, batch, served)
    close = _Closeness(info)
    if "resid_pre" in seen and "resid_post" in seen:
        close("resid_pre of a block is resid_post of the block before", seen["resid_pre"][1:], seen["resid_post"][:-1])
    if "mlp_act" in seen and seen["mlp_act"].shape[-1] != info.d_mlp:
        raise SelfCheckError(
            f"{info.name!r} fails the self-check: mlp_act has {seen['mlp_act'].shape[-1]} entries per token, expected "
            f"d_mlp = {info.d_mlp}. The architecture table names the wrong module."
        )
    _check_sums(seen, added or (lambda _, values: values), close)
    logits = seen["logits"]
    close("the lens at the last layer = the model's logits", logits, model.own_logits(batch))
    if "pattern" in info.sites:
        _check_attention(model, batch, logits, close, sinks)
    _check_patches(model, batch, seen, close)


def _check_sums(seen: dict[str, np.ndarray], added: Added, close: _Closeness) -> None:
    parts = {site: added(site, seen[site]) for site in ("attn_out", "mlp_out") if site in seen}
    # Where a post-norm or a multiplier stands between a sub-layer and the stream, "+" stands for what arrives.
    if {"resid_pre", "attn_out", "resid_mid"} <= set(seen):
        close("resid_mid = resid_pre + attn_out", seen["resid_mid"], seen["resid_pre"] + parts["attn_out"])
    if {"resid_mid", "mlp_out", "resid_post"} <= set(seen):
        close("resid_post = resid_mid + mlp_out", seen["resid_post"], seen["resid_mid"] + parts["mlp_out"])
    elif {"resid_pre", "attn_out", "mlp_out", "resid_post"} <= set(seen):  # side by side
        whole = seen["resid_pre"] + parts["attn_out"] + parts["mlp_out"]
        close("resid_post = resid_pre + attn_out + mlp_out", seen["resid_post"], whole)


def _see(model: Checked, batch: Batch, sites: list[str], patches: tuple[Patch, ...] = ()) -> dict[str, np.ndarray]:
    parts = model.execute(Forward(tuple(Capture(s, Keep()) for s in sites), patches), batch)
    return {s: p.arrays["value"] for s, p in zip(sites, parts, strict=True)}


def _check_attention(model: Checked, batch: Batch, logits: np.ndarray, close: _Closeness, sinks: bool) -> None:
    request = Forward((Capture("pattern", _RowSums()), Capture("logits", Keep())))
    rows, watched = model.execute(request, batch)
    past, whole = rows.arrays["past"], rows.arrays["whole"]
    if sinks:
        close("attention rows sum to one with the sink's share, so to no more without it", past, np.minimum(past, 1))
    else:
        close("attention rows sum to one (ReLU attention: have no negative weight)", past, whole)
    close("attention is causal", rows.arrays["future"], np.zeros_like(rows.arrays["future"]), scale=1.0)
    close("watching attention leaves the logits as they are", watched.arrays["value"], logits)


def _check_patches(model: Checked, batch: Batch, seen: Mapping[str, np.ndarray], close: _Closeness) -> None:
    middle, logits = model.info.n_layers // 2, seen["logits"]
    for site in sorted({"resid_pre", "resid_post", "attn_out", "mlp_out", "mlp_act"} & model.info.sites):
        same = _see(model, batch, ["logits"], (Patch((site, middle), 1.0),))["logits"]
        if not np.array_equal(same, logits):
            raise SelfCheckError(f"{close.name}: an identity patch at {site}.{middle} changed the logits.")
        gone = _see(model, batch, ["logits"], (Patch((site, middle), 0.0),))["logits"]
        # What is zero already proves nothing: ReLU attention may be off at every token of the dummy text.
        if np.array_equal(gone, logits) and seen[site][middle].any():
            raise SelfCheckError(
                f"{close.name}: a zero patch at {site}.{middle} left the logits unchanged, so this point is not "
                "part of the model's computation. The architecture table names the wrong module."
            )


class _Closeness:
    """Compares two arrays at the precision of a model's weights."""

    def __init__(self, info: ModelInfo) -> None:
        self.name, self.tolerance = repr(info.name), TOLERANCE.get(info.dtype, 5e-2)

    def __call__(self, what: str, found: np.ndarray, expected: np.ndarray, scale: float | None = None) -> None:
        size = scale or float(np.abs(expected).max(initial=0.0)) or 1.0
        off = float(np.abs(found - expected).max()) / size if found.size else 0.0
        if not off <= self.tolerance:
            raise SelfCheckError(
                f"{self.name} fails the self-check: {what}; found a relative difference of {off:.2e}, "
                f"expected at most {self.tolerance:g}. Its family needs another row in the architecture table."
            )

"""The three extreme-token phenomena of a Bigram-Backcopy model, measured through probekit's captures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from probekit.core import Batch, Capture, Forward, Model, Trace
from probekit.engine import run_pass
from probekit.reduce import Field, Keep, Norm, Reducer, SinkLogitGap
from probekit.reduce.base import Reads

from .bigram_backcopy import BOS_ID, BigramBackcopy, Losses, losses
from .presets import DRAIN, PEAK, PHENOMENA, SINK

if TYPE_CHECKING:
    import torch

    from probekit.reduce.attention_blocks import AttentionBlock

# When a phenomenon counts as there. The publication shows curves and names no numbers, so these are fixed here, the same
# for every setting: more than half of the attention; a value of less than half of the usual size; a norm of more than
# twice the usual. Untrained models lie near 0.06, 1 and 1.
CRITERIA: Mapping[str, float] = {SINK: 0.5, DRAIN: 0.5, PEAK: 2.0}
N_MEASURED, SEED_MEASURED = 128, 1_000_003


@dataclass(frozen=True)
class _Rows(Reducer):
    """Per head and query: weight on position 0, weight on the token before, and the sum of the row."""

    reads: ClassVar[Reads] = "attention"

    def fields(self) -> Mapping[str, Field]:
        """`first`, `previous` and `total`."""
        dims = ("head", "token")
        return {
            "first": Field(dims, "share", "the query's weight on position 0"),
            "previous": Field(dims, "share", "the query's weight on the token before it; 0 at position 0"),
            "total": Field(dims, "share", "sum of the query's weights"),
        }

    def measure(self, piece: AttentionBlock) -> Mapping[str, torch.Tensor]:
        """Columns and sums of a block."""
        from torch.nn.functional import pad

        before = piece.probs.diagonal(piece.start - 1, dim1=2, dim2=3)
        if piece.start == 0:  # query 0 has no token before it
            before = pad(before, (1, 0))
        return {"first": piece.probs[..., 0], "previous": before, "total": piece.probs.sum(-1)}


_CAPTURES = {
    "rows": Capture("pattern", _Rows()),
    "gap": Capture("pattern", SinkLogitGap()),
    "value": Capture("v", Keep()),
    "stream": Capture("resid_post", Norm()),
    "logits": Capture("logits", Keep()),
}


@dataclass(frozen=True)
class ExtremeTokens:
    """What <s> attracts and carries in each block of a one-head model; arrays have the axis layer.

    Args:
        bos_attention: mean weight on <s> of queries that are no trigger, <s> itself left out.
        bos_attention_trigger: the same of queries that are triggers.
        bos_proxy: mean of weight on <s> over the row's sum, same queries as `bos_attention`; rows of zeros count as 0.
            Equal to it with softmax. The reading of arXiv 2410.10781 for weights that are no distribution.
        back_attention: mean weight of triggers on the token before them.
        value_ratio: ‖v_<s>‖ over the mean ‖v_j‖ of all other tokens; means over sequences first.
        stream_ratio: ‖h_<s>‖ over the mean ‖h_j‖ of all other tokens, after the block.
        bos_norm: mean ‖h_<s>‖ after the block.
        gap_nats: mean score on <s> minus mean score on the keys between, queries that are no trigger from the third
            token on (arXiv 2410.13835).
        losses: how well the task is solved.
    """

    bos_attention: np.ndarray
    bos_attention_trigger: np.ndarray
    bos_proxy: np.ndarray
    back_attention: np.ndarray
    value_ratio: np.ndarray
    stream_ratio: np.ndarray
    bos_norm: np.ndarray
    gap_nats: np.ndarray
    losses: Losses

    @property
    def sink_layer(self) -> int:
        """The block whose head puts most of its row on <s>; where the drain is looked for."""
        return int(self.bos_proxy.argmax())

    def value(self, phenomenon: str) -> float:
        """The number that decides.

        The sink: weight on <s> in the block where its proxy is largest. The drain: the value ratio in that block. The
        peak: the largest stream ratio after any block.
        """
        layer = self.sink_layer
        found = {
            SINK: self.bos_attention[layer],
            DRAIN: self.value_ratio[layer],
            PEAK: self.stream_ratio.max(),
        }
        return float(found[phenomenon])

    @property
    def appears(self) -> dict[str, bool]:
        """Which phenomena are there, by `CRITERIA`."""
        return {p: appears(p, self.value(p)) for p in PHENOMENA}


def appears(phenomenon: str, value: float) -> bool:
    """Whether a number passes the criterion of its phenomenon; the drain is a ratio that must be small."""
    return value < CRITERIA[phenomenon] if phenomenon == DRAIN else value > CRITERIA[phenomenon]


def measured_sequences(task: BigramBackcopy, context: int, n: int = N_MEASURED) -> np.ndarray:
    """The sequences on which models are measured: the same for all, drawn with a seed that no training uses."""
    return task.sample(n, context, SEED_MEASURED)


def extreme_tokens(model: Model, task: BigramBackcopy, ids: np.ndarray) -> ExtremeTokens:
    """One pass over some sequences, and what it shows.

    Args:
        model: an opened model with one head per block that reads the task's ids.
        task: the task.
        ids: axes sequence, position; sequences from their <s> on.
    """
    batch = task.batch(ids)
    trace, _ = run_pass(model, Forward(tuple(_CAPTURES.values())), batch)
    return _read(trace, task, batch, ids)


def _read(trace: Trace, task: BigramBackcopy, batch: Batch, ids: np.ndarray) -> ExtremeTokens:
    flat = batch.ids
    bos, trigger = flat == BOS_ID, task.is_trigger(flat)
    rest = ~bos & ~trigger
    rows = trace[_CAPTURES["rows"]]
    first, total, previous = (
        rows[name].isel(head=0).values.astype(np.float64) for name in ("first", "total", "previous")
    )
    share = np.divide(first, total, out=np.zeros_like(first), where=total > 0)
    gap = trace[_CAPTURES["gap"]]["gap_nats"].isel(head=0).values
    value = np.linalg.norm(_one_head(trace[_CAPTURES["value"]]["value"].values), axis=-1)  # layer token
    stream = trace[_CAPTURES["stream"]]["norm"].values
    logits = trace[_CAPTURES["logits"]]["value"].values.reshape(*ids.shape, -1)
    return ExtremeTokens(
        bos_attention=first[:, rest].mean(axis=1),
        bos_attention_trigger=first[:, trigger].mean(axis=1),
        bos_proxy=share[:, rest].mean(axis=1),
        back_attention=previous[:, trigger].mean(axis=1),
        value_ratio=value[:, bos].mean(axis=1) / value[:, ~bos].mean(axis=1),
        stream_ratio=stream[:, bos].mean(axis=1) / stream[:, ~bos].mean(axis=1),
        bos_norm=stream[:, bos].mean(axis=1),
        gap_nats=np.nanmean(gap[:, rest], axis=1),
        losses=losses(task, ids, logits),
    )


def _one_head(values: np.ndarray) -> np.ndarray:
    """Values of the only head; axes layer, token, d_head."""
    return values.reshape(*values.shape[:2], -1).astype(np.float64)

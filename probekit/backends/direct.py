"""Direct logit attribution after a run: directions from the final residual, shown to whoever reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from probekit.core import Batch
from probekit.reduce import DirectRows, LogitDirection, Recorder, pair_ids
from probekit.reduce.direct import Pair
from probekit.reduce.frozen_norm import FrozenNorm
from probekit.reduce.unembed import Unembed

_LEAST_SPAN = 1e-2  # logits closer than this share the slope of what lies around them


def show_directions(
    recorders: Sequence[Recorder],
    held: Mapping[tuple[str, int], Tensor],
    last: Tensor,
    top_id: np.ndarray,
    unembed: Unembed,
    batch: Batch,
) -> None:
    """Record what held activations add to logit differences.

    Args:
        recorders: of reducers that read directions.
        held: activations by site and layer; axes token, d_model.
        last: the stream leaving the last block; axes token, d_model.
        top_id: ids of the likeliest next tokens; axes token, rank.
        unembed: the way from a residual row to logits.
        batch: the texts.

    Raises:
        SelfCheckError: the final norm is not linear once its scale is known.
    """
    d_vocab, normed = unembed.weight.shape[0], unembed.norm(last)
    norm = FrozenNorm.of(unembed.norm, last)
    scale = norm.scale(last, normed)
    offsets: dict[Pair, Tensor] = {}
    directions: dict[Pair, Tensor] = {}
    for pair in {r.reducer.pair for r in recorders if isinstance(r.reducer, LogitDirection)}:
        plus, minus = (torch.as_tensor(i, device=last.device) for i in pair_ids(pair, top_id, batch, d_vocab))
        readers, added, slope = _readers(unembed, normed, plus.clamp(min=0), minus.clamp(min=0))
        slope = slope.masked_fill(plus < 0, torch.nan)
        directions[pair] = norm.direction(readers, scale) * slope[:, None]
        offsets[pair] = ((norm.offset(readers) + added) * slope)[:, None]
    ones = {pair: torch.ones_like(offset) for pair, offset in offsets.items()}
    for recorder in recorders:
        assert isinstance(recorder.reducer, LogitDirection), recorder.reducer
        for layer in recorder.layers:
            if recorder.point.site == "logits":
                recorder.rows(layer, DirectRows(offsets[recorder.reducer.pair], ones))
            else:
                recorder.rows(layer, DirectRows(held[recorder.point.site, layer], directions))


def _readers(unembed: Unembed, normed: Tensor, plus: Tensor, minus: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unembedding differences (token, d_model), bias differences and the slope of what follows (token); float64."""
    rows = [unembed.weight[ids].double() for ids in (plus, minus)]
    biases = [normed.new_zeros(len(ids), dtype=torch.float64) for ids in (plus, minus)]
    if unembed.bias is not None:
        biases = [unembed.bias[ids].double() for ids in (plus, minus)]
    high, low = (
        (normed.to(unembed.weight.dtype).double() * row).sum(-1) + bias for row, bias in zip(rows, biases, strict=True)
    )
    middle, half = (high + low) / 2, ((high - low).abs() / 2).clamp(min=_LEAST_SPAN / 2)
    above, below = (unembed.finish(middle + half), unembed.finish(middle - half))
    return rows[0] - rows[1], biases[0] - biases[1], (above - below) / (2 * half)

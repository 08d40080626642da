"""The reducer that asks by how much each query's score on one key exceeds its scores on the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Field, Reads, Reducer

if TYPE_CHECKING:
    import torch

    from .attention_blocks import AttentionBlock

_LEAST = 1e-38  # probabilities below count as this one where only probabilities are known


@dataclass(frozen=True)
class SinkLogitGap(Reducer):
    """Score of each query on position 0 minus its mean score on the keys between that and the query.

    delta_i = z[i, 0] - mean over 0 < j < i of z[i, j], with z the scaled scores that the softmax reads (soft-cap and
    position bias included), arXiv 2410.13835, section 2. Keys that a window hides do not count. NaN for queries 0 and
    1, which have no key in between, and for queries that do not see position 0. Differences of scores are differences
    of log-probabilities; a backend that shows probabilities only is read that way.
    """

    reads: ClassVar[Reads] = "attention"
    wants_scores: ClassVar[bool] = True

    def fields(self) -> Mapping[str, Field]:
        """One array, `gap_nats`."""
        words = "score on position 0 minus the mean score on the keys between it and the query; NaN where undefined"
        return {"gap_nats": Field(("head", "token"), "nats", words)}

    def measure(self, piece: AttentionBlock) -> Mapping[str, torch.Tensor]:
        """Gaps of a block of queries; axes text, head, query."""
        import torch

        scores = piece.scores if piece.scores is not None else piece.probs.clamp(min=_LEAST).log()
        n_queries, n_keys = scores.shape[2:]
        query = torch.arange(piece.start, piece.start + n_queries, device=scores.device)[:, None]
        key = torch.arange(n_keys, device=scores.device)[None]
        between = ((key > 0) & (key < query))[None]
        first = torch.ones(1, n_queries, dtype=torch.bool, device=scores.device)
        if piece.visible is not None:
            between = between & piece.visible
            first = piece.visible[:, :, 0]
        count = between.sum(-1)[:, None]  # text (or 1), 1, query
        total = scores.masked_fill(~between[:, None], 0.0).sum(-1)
        gap = scores[..., 0] - total / count.clamp(min=1)
        return {"gap_nats": gap.masked_fill(~((count > 0) & first[:, None]), float("nan"))}

"""The reducer that asks how much attention stays close."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Field, Reads, Reducer

if TYPE_CHECKING:
    import torch

    from .attention_blocks import AttentionBlock


@dataclass(frozen=True)
class LocalAttention(Reducer):
    """Attention of each query on the tokens just before it, itself left out (arXiv 2406.19384, section 4).

    Args:
        window: how many tokens before the query count.
    """

    window: int = 5
    reads: ClassVar[Reads] = "attention"

    def fields(self) -> Mapping[str, Field]:
        """One array, `local_share`."""
        words = f"attention on the {self.window} tokens before the query"
        return {"local_share": Field(("head", "token"), "share", words)}

    def measure(self, piece: AttentionBlock) -> Mapping[str, torch.Tensor]:
        """Sums over the sub-diagonals 1 to `window`."""
        before = piece.probs.tril(piece.start - 1).sum(-1)
        return {"local_share": (before - piece.probs.tril(piece.start - 1 - self.window).sum(-1)).clamp(0, 1)}

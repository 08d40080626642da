"""Reducers that read attention probabilities, one block of queries at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from probekit.core import InputError

from .base import Field, Reads, Reducer

if TYPE_CHECKING:
    import torch

    from .attention_blocks import AttentionBlock

_SEEN = "number of queries of this text that can see this key"


@dataclass(frozen=True)
class AttentionStats(Reducer):
    """Per layer, head and token: attention received, row entropy, row maximum, share on position 0.

    `received` of key k is the mean of A[q, k] over the queries q that can see k, the column mean of
    arXiv 2410.10781 section 3 (alpha_k). It lies between 0 and 1; A[0, 0] = 1 is included.
    """

    reads: ClassVar[Reads] = "attention"

    def fields(self) -> Mapping[str, Field]:
        """`received`, `entropy_nats`, `max`, `first_share` and `seen`."""
        dims = ("head", "token")
        return {
            "received": Field(dims, "share", "mean attention received from the queries that see this key", "key"),
            "entropy_nats": Field(dims, "nats", "entropy of this query's attention row"),
            "max": Field(dims, "share", "largest entry of this query's attention row"),
            "first_share": Field(dims, "share", "this query's attention on position 0"),
            "seen": Field(("token",), "queries", _SEEN, "key"),
        }

    def measure(self, piece: AttentionBlock) -> Mapping[str, torch.Tensor]:
        """Column sums for keys; entropy, maximum and share on position 0 for queries."""
        return {
            "received": piece.column_sums(),
            "entropy_nats": piece.entropy_nats,
            "max": piece.max,
            "first_share": piece.probs[..., 0],
            "seen": piece.seen(),
        }

    def settle(self, arrays: dict[str, torch.Tensor], lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Column sums become means over the queries that see the key."""
        arrays["received"] /= arrays["seen"].unsqueeze(2).clamp(min=1)
        return arrays


@dataclass(frozen=True)
class Maps(Reducer):
    """The attention probabilities themselves, query by key. Large: for one short text at a time."""

    reads: ClassVar[Reads] = "attention"

    def fields(self) -> Mapping[str, Field]:
        """One array, `value`."""
        return {"value": Field(("head", "query", "key"), "share", "attention of a query on a key")}

    def measure(self, piece: AttentionBlock) -> Mapping[str, torch.Tensor]:
        """The rows of a block.

        Raises:
            InputError: several texts run together.
        """
        if len(piece.lengths) != 1:
            raise InputError(f"Whole attention maps are kept of one text at a time; found {len(piece.lengths)} texts.")
        return {"value": piece.probs}

    def memory_bytes(self, n_tokens: int, n_heads: int, d_model: int) -> int:
        """Four bytes per pair and head."""
        return 4 * n_heads * n_tokens**2


@dataclass(frozen=True)
class ReceivedWithin(Reducer):
    """Attention received when the text is cut after its first `horizon` tokens.

    With causal attention the first rows of a long text are the rows of the short one, so the
    published sink metric at T = 64 comes out of a pass over texts of any length. NaN for keys past
    the horizon and for texts that are shorter than it.
    """

    horizon: int = 64
    reads: ClassVar[Reads] = "attention"

    def fields(self) -> Mapping[str, Field]:
        """`received` and `seen`, within the horizon."""
        return {
            "received": Field(("head", "token"), "share", "mean attention received within the horizon", "key"),
            "seen": Field(("token",), "queries", f"{_SEEN}, within the horizon", "key"),
        }

    def measure(self, piece: AttentionBlock) -> Mapping[str, torch.Tensor]:
        """Column sums over the queries inside the horizon."""
        return {"received": piece.column_sums(before=self.horizon), "seen": piece.seen(before=self.horizon)}

    def settle(self, arrays: dict[str, torch.Tensor], lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Sums become means; what the horizon does not cover becomes NaN."""
        received = arrays["received"]
        received /= arrays["seen"].unsqueeze(2).clamp(min=1)
        received[..., self.horizon :] = float("nan")
        for i, n in enumerate(lengths):
            if n < self.horizon:
                received[:, i] = float("nan")
        return arrays

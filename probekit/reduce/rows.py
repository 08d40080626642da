"""Reducers that read the activations of one layer, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Field, Reads, Reducer, Rows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Keep(Reducer):
    """The activations themselves, in float32. Large: for single layers or short texts."""

    reads: ClassVar[Reads] = "rows"

    def fields(self) -> Mapping[str, Field]:
        """One array, `value`."""
        return {"value": Field(("token", "d_model"), "activation", "the activation itself")}

    def measure(self, piece: Rows) -> Mapping[str, torch.Tensor]:
        """The activations."""
        return {"value": piece.values.float()}

    def memory_bytes(self, n_tokens: int, n_heads: int, d_model: int) -> int:
        """Four bytes per entry."""
        return 4 * n_tokens * d_model


@dataclass(frozen=True)
class Norm(Reducer):
    """Euclidean length of each token's activation, accumulated in float32."""

    reads: ClassVar[Reads] = "rows"

    def fields(self) -> Mapping[str, Field]:
        """One array, `norm`."""
        return {"norm": Field(("token",), "activation", "Euclidean norm of the activation")}

    def measure(self, piece: Rows) -> Mapping[str, torch.Tensor]:
        """Norms."""
        return {"norm": piece.values.float().norm(dim=-1)}


@dataclass(frozen=True)
class TopMagnitudes(Reducer):
    """The `k` entries of each token with the largest magnitude, signed, with their dimension."""

    k: int = 3
    reads: ClassVar[Reads] = "rows"

    def fields(self) -> Mapping[str, Field]:
        """`value` (signed) and `dim`, largest magnitude first."""
        dims = ("token", "rank")
        return {
            "value": Field(dims, "activation", "signed entry, largest magnitude first"),
            "dim": Field(dims, "1", "dimension of that entry"),
        }

    def measure(self, piece: Rows) -> Mapping[str, torch.Tensor]:
        """Signed values and their dimensions."""
        import torch

        values = piece.values.float()
        dim = values.abs().topk(min(self.k, values.shape[-1]), dim=-1).indices
        return {"value": values.gather(-1, dim), "dim": dim.to(torch.int32)}


@dataclass(frozen=True)
class MedianMagnitude(Reducer):
    """Median of |activation| over all tokens and dimensions of each text: the scale of a layer."""

    reads: ClassVar[Reads] = "rows"

    def fields(self) -> Mapping[str, Field]:
        """One array per text, `median`."""
        return {"median": Field(("text",), "activation", "median magnitude over all tokens and dimensions of the text")}

    def measure(self, piece: Rows) -> Mapping[str, torch.Tensor]:
        """Medians (the mean of the two middle entries for an even count, as numpy does)."""
        import torch

        medians = []
        for text in piece.values.abs().split(list(piece.lengths)):
            flat = text.flatten().float()
            middle = flat.numel() // 2
            low = flat.kthvalue(middle + flat.numel() % 2).values
            medians.append(low if flat.numel() % 2 else (low + flat.kthvalue(middle + 1).values) / 2)
        return {"median": torch.stack(medians)}

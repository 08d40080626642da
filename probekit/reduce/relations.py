"""Reducers that compare what different tokens, or the parts of one block, put into the same place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Field, Reads, Reducer, Rows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BlockRows:
    """What one block read and wrote at every token of a micro-batch; no padding.

    Args:
        before: residual stream entering the block; axes token, d_model.
        after: residual stream leaving it; axes token, d_model.
        mlp: what the MLP added to the stream, after a post-norm or a factor where the family has one; axes token,
            d_model. What attention added is the rest of `after` - `before`.
        lengths: tokens per text.
    """

    before: torch.Tensor
    after: torch.Tensor
    mlp: torch.Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class CosineTo(Reducer):
    """Cosine of each token's activation with the one at a given position of the same text, in float32.

    Args:
        position: counted from the start of each text, or negative from its end. Every text needs it.
    """

    position: int = 0
    reads: ClassVar[Reads] = "rows"

    def fields(self) -> Mapping[str, Field]:
        """One array, `cosine`; 1 at the position itself, 0 where an activation is zero."""
        words = f"cosine with the activation at position {self.position} of the text"
        return {"cosine": Field(("token",), "cosine", words)}

    def measure(self, piece: Rows) -> Mapping[str, torch.Tensor]:
        """Cosines.

        Raises:
            InputError: a text has no such position.
        """
        return {"cosine": _cosine(piece.values, _spread(piece.at(self.position), piece.lengths))}


@dataclass(frozen=True)
class BlockNorms(Reducer):
    """Euclidean norms of what attention and the MLP of each block add to the residual stream, in float32."""

    reads: ClassVar[Reads] = "block"

    def fields(self) -> Mapping[str, Field]:
        """`attn_norm` and `mlp_norm`."""
        return {
            "attn_norm": Field(("token",), "activation", "norm of what attention adds to the stream"),
            "mlp_norm": Field(("token",), "activation", "norm of what the MLP adds to the stream"),
        }

    def measure(self, piece: BlockRows) -> Mapping[str, torch.Tensor]:
        """Norms."""
        mlp = piece.mlp.float()
        attention = piece.after.float() - piece.before.float() - mlp
        return {"attn_norm": attention.norm(dim=-1), "mlp_norm": mlp.norm(dim=-1)}


@dataclass(frozen=True)
class MlpAlignment(Reducer):
    """How far the MLP of each block writes, at each token, along what one position of the text carries.

    Args:
        position: the position whose direction counts, such as that of the primary sink.
    """

    position: int = 0
    reads: ClassVar[Reads] = "block"

    def fields(self) -> Mapping[str, Field]:
        """`mlp_to_stream` and `mlp_to_mlp`, cosines."""
        p = self.position
        return {
            "mlp_to_stream": Field(
                ("token",), "cosine", f"cosine of the MLP's output with the stream leaving the block at position {p}"
            ),
            "mlp_to_mlp": Field(("token",), "cosine", f"cosine of the MLP's output with its output at position {p}"),
        }

    def measure(self, piece: BlockRows) -> Mapping[str, torch.Tensor]:
        """Cosines, in float32.

        Raises:
            InputError: a text has no such position.
        """
        stream, mlp = (
            _spread(Rows(rows, piece.lengths).at(self.position), piece.lengths) for rows in (piece.after, piece.mlp)
        )
        return {"mlp_to_stream": _cosine(piece.mlp, stream), "mlp_to_mlp": _cosine(piece.mlp, mlp)}


@dataclass(frozen=True)
class ValueRows:
    """Values of one layer, with the way from a head's value to what it would add to the residual stream.

    Args:
        values: axes token, key-value head, d_head.
        gram: W_O^h (W_O^h)^T of each query head, W_O^h the rows of the output projection that read head h; axes head,
            d_head, d_head. Head h reads the values of key-value head h // (n_heads / n_kv_heads).
        lengths: tokens per text.
    """

    values: torch.Tensor
    gram: torch.Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class OutputNorm(Reducer):
    """Norm of W_O^h v_j^h: what token j would add to the stream if head h put all of its attention there.

    The value-drain metric of arXiv 2410.13835 for language models. Before a norm that a family may apply to the
    output of attention, and without the projection's bias.
    """

    reads: ClassVar[Reads] = "values"

    def fields(self) -> Mapping[str, Field]:
        """One array, `output_norm`."""
        return {
            "output_norm": Field(("head", "token"), "activation", "norm of the value through the output projection")
        }

    def measure(self, piece: ValueRows) -> Mapping[str, torch.Tensor]:
        """Norms from the quadratic form v^T (W_O W_O^T) v, in float32; axes head, token."""
        group = len(piece.gram) // piece.values.shape[1]
        values = piece.values.float().repeat_interleave(group, dim=1).transpose(0, 1)  # head, token, d_head
        squares = ((values @ piece.gram.to(values)) * values).sum(-1)
        return {"output_norm": squares.clamp(min=0).sqrt()}


def _spread(rows: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """One row per text, repeated for each of its tokens."""
    import torch

    return rows.repeat_interleave(torch.tensor(lengths, device=rows.device), dim=0)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)

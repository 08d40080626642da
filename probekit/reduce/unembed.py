"""What the lens asks of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Unembed(Protocol):
    """The way from a residual row to logits: final norm, unembedding, and whatever the model does after it."""

    weight: Tensor  # vocab, d_model
    bias: Tensor | None

    def norm(self, rows: Tensor) -> Tensor:
        """The final norm."""
        ...

    def finish(self, logits: Tensor) -> Tensor:
        """Scaling and soft-capping after the unembedding, in place where that is possible."""
        ...

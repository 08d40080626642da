"""Logits of residual rows as parts of a sum: the final norm frozen at the scale of given rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .frozen_norm import FrozenNorm
from .sizes import VOCAB_TILE
from .unembed import Unembed

_SMALL = 1e-4  # of a logit: far below any soft-cap, where what follows the unembedding is a plain factor
_LARGE = 1e4


class FrozenReader:
    """What residual rows add to the logits, up to a soft-cap. Needs no model call; keeps the unembedding alive.

    With the scale of the final norm given, logits before a soft-cap are linear in the rows: parts that sum to a row
    have logits that sum to its logits, but for `offset`, which is there once.

    Args:
        unembed: the way from a residual row to logits.
        streams: rows whose scale is frozen; axes token, d_model, one array for each layer.

    Raises:
        SelfCheckError: the final norm is no LayerNorm or RMSNorm.
    """

    def __init__(self, unembed: Unembed, streams: Sequence[np.ndarray]) -> None:
        self._weight, self._finish, self._bias = unembed.weight, unembed.finish, unembed.bias
        with torch.no_grad():
            rows = [torch.as_tensor(s).to(self._weight.device, self._weight.dtype) for s in streams]
            self._norm = FrozenNorm.of(unembed.norm, rows[0])
            self._scale = torch.stack([self._norm.scale(r, unembed.norm(r)) for r in rows])
        ends = torch.tensor([[_SMALL, _LARGE]], dtype=torch.float64, device=self._weight.device)
        with torch.no_grad():
            small, large = self._finish(ends.clone())[0].tolist()
        self.factor = small / _SMALL
        self.capped = abs(large / _LARGE - self.factor) > 1e-3 * abs(self.factor)

    @property
    def scale(self) -> np.ndarray:
        """What the norm divides each row by; axes layer, token."""
        return np.asarray(self._scale.cpu().numpy())

    def logits(self, rows: np.ndarray, layers: Sequence[int], token: int) -> np.ndarray:
        """What rows add to the logits under the scale of one token, before a soft-cap; axes row, vocab.

        Args:
            rows: axes row, d_model.
            layers: for each row, the place in `streams` of the layer whose scale is taken.
            token: row of it.
        """
        with torch.no_grad():
            given = torch.as_tensor(np.ascontiguousarray(rows)).to(self._scale.device)
            read = self._norm.part(given, self._scale[list(layers), token]).float()
            return np.asarray(self._product(read).mul_(self.factor).cpu().numpy())

    def offset(self) -> np.ndarray:
        """What the biases of final norm and unembedding add, before a soft-cap; axis vocab."""
        with torch.no_grad():
            added = self._product(self._norm.bias[None].float())[0]
            if self._bias is not None:
                added += self._bias.float()
            return np.asarray(added.mul_(self.factor).cpu().numpy())

    def capped_logits(self, logits: np.ndarray) -> np.ndarray:
        """Logits after the model's soft-cap, if it has one; axes as given."""
        if not self.capped:
            return logits
        with torch.no_grad():
            raw = torch.as_tensor(logits).to(self._weight.device, torch.float32) / self.factor
            return np.asarray(self._finish(raw.clone()).cpu().numpy())

    def _product(self, rows: Tensor) -> Tensor:
        """Rows times unembedding; float32, also where the weights are half precision. Axes row, vocab."""
        out = rows.new_empty(len(rows), len(self._weight))
        for a in range(0, out.shape[-1], VOCAB_TILE):
            torch.matmul(rows, self._weight[a : a + VOCAB_TILE].float().T, out=out[:, a : a + VOCAB_TILE])
        return out

"""The final norm as the linear map that it is once its scale is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from probekit.core import SelfCheckError

_SIZE = 64.0  # of the probes: large against any epsilon, exact in every float type
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}


@dataclass(frozen=True)
class FrozenNorm:
    """norm(x) = gain · (x - mean of x, if it centres) / scale(x) + bias: LayerNorm, RMSNorm, or none. float64.

    Args:
        gain: axis d_model.
        bias: axis d_model.
        centres: whether the mean over d_model is subtracted.
    """

    gain: Tensor
    bias: Tensor
    centres: bool

    @classmethod
    def of(cls, norm: Callable[[Tensor], Tensor], like: Tensor) -> Self:
        """What a norm does, found out from what it makes of three rows.

        Args:
            norm: the norm; axes row, d_model.
            like: rows of the type and on the device that it takes.
        """
        d_model = like.shape[-1]
        signs = torch.tensor([1.0, -1.0], device=like.device).repeat(d_model // 2 + 1)[:d_model]
        if d_model % 2:
            signs[-3:] = torch.tensor([1.0, 1.0, -2.0], device=like.device)  # zero mean, and no entry is zero
        probe = _SIZE * signs.double()
        rows = torch.stack([torch.zeros_like(probe), probe, probe + _SIZE])
        bias, plain, moved = norm(rows.to(like.dtype)).double()
        gain = (plain - bias) * probe.square().mean().sqrt() / probe
        centres = bool((moved - plain).abs().max() <= 1e-2 * plain.abs().max())
        return cls(gain, bias, centres)

    def scale(self, rows: Tensor, normed: Tensor) -> Tensor:
        """What each row was divided by; axis row.

        Args:
            rows: before the norm; axes row, d_model.
            normed: after it.

        Raises:
            SelfCheckError: the norm is not of this form.
        """
        x = self.gain * self._centred(rows.double())
        y = normed.double() - self.bias
        along = (x * y).sum(-1)
        scale = torch.where(along != 0, x.square().sum(-1) / along, torch.ones_like(along))
        off = float((y - x / scale[:, None]).abs().max() / normed.double().abs().max().clamp(min=1e-30))
        if not off <= _TOLERANCE.get(normed.dtype, 5e-2):
            raise SelfCheckError(
                f"The final norm is no LayerNorm or RMSNorm: with its scale frozen it is off by {off:.1e} of its "
                "largest output. Direct attribution needs a norm that is linear once its scale is known."
            )
        return scale

    def part(self, rows: Tensor, scale: Tensor) -> Tensor:
        """What rows are after the norm as parts of a sum, whose bias is `bias`; axes row, d_model.

        Args:
            rows: before the norm; axes row, d_model.
            scale: of the whole sum, from `scale`; axis row.
        """
        return self.gain * self._centred(rows.double()) / scale[:, None]

    def direction(self, readers: Tensor, scale: Tensor) -> Tensor:
        """The direction before the norm that a direction after it reads; axes row, d_model.

        Args:
            readers: directions after the norm; axes row, d_model.
            scale: from `scale`, axis row.
        """
        return self._centred(readers.double() * self.gain) / scale[:, None]

    def offset(self, readers: Tensor) -> Tensor:
        """What the bias adds along directions after the norm; axis row."""
        return readers.double() @ self.bias

    def _centred(self, rows: Tensor) -> Tensor:
        return rows - rows.mean(-1, keepdim=True) if self.centres else rows

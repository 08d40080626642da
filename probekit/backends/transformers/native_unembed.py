"""Final norm and unembedding of a transformers model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .weights import unembedding

if TYPE_CHECKING:
    from .model import TransformersModel


class NativeUnembed:
    """Final norm and unembedding of a transformers model, past other people's hooks."""

    def __init__(self, model: TransformersModel) -> None:
        self.weight, self.bias = unembedding(model.module.get_output_embeddings())
        self._norm = model.part(model.architecture.final_norm)
        row, config = model.architecture, model._config
        self._divisor, self._multiplier, self._softcap = (
            None if name is None else getattr(config, name)
            for name in (row.logit_divisor, row.logit_multiplier, row.logit_softcap)
        )

    def norm(self, rows: Tensor) -> Tensor:
        """The final norm; on the unembedding's device, also where the norm lives on another one."""
        return self._norm.forward(rows).to(self.weight.device)

    def finish(self, logits: Tensor) -> Tensor:
        """What the family does after the unembedding: scaling and soft-capping, entry by entry.

        In place where no gradient is wanted.
        """
        if torch.is_grad_enabled():
            logits = logits.clone()
        if self._divisor is not None:
            logits = logits.div_(self._divisor)
        if self._multiplier is not None:
            logits = logits.mul_(self._multiplier)
        if self._softcap is not None:
            logits = logits.div_(self._softcap).tanh_()
            # tanh remembers its result for the gradient, so that must not be overwritten.
            logits = logits * self._softcap if torch.is_grad_enabled() else logits.mul_(self._softcap)
        return logits

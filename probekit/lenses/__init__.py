"""Lenses that are trained: opened, saved, exported, and tuned on any text.

lens = pk.train_lens("smollm2-135m-instruct", "corpus.txt", "lenses/smollm2")
pk.run("logit-lens", "smollm2-135m-instruct", "One two three", lens="lenses/smollm2")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probekit.reduce import LensRef, open_lens

from .data import LensTraining
from .train import TrainedLens, train_lens

if TYPE_CHECKING:
    from .folder import export_lens, save_lens

__all__ = ["LensRef", "LensTraining", "TrainedLens", "export_lens", "open_lens", "save_lens", "train_lens"]


def __getattr__(name: str) -> Any:
    if name in ("export_lens", "save_lens"):  # these need torch
        from . import folder

        return getattr(folder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

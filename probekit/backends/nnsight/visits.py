"""Where a pass stops in an nnsight trace, and what it does there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from probekit.backends.block_taps import Tap
from probekit.backends.capture_pass import CapturePass, through
from probekit.core import CapabilityError
from probekit.reduce.attention_blocks import AttentionBlock
from probekit.reduce.sizes import BLOCK

# Sites at a module's edge, in the order in which a block reaches them; the numbers leave room for those inside attention.
ORDER = {
    "embed": 0,
    "resid_pre": 1,
    "v": 3,
    "z": 4,
    "attn_out": 5,
    "pattern": 6,
    "resid_mid": 7,
    "mlp_act": 8,
    "mlp_out": 9,
    "resid_post": 10,
    "final_norm": 11,
}
ATTENTION_INPUT = 2


@dataclass
class Visit:
    """One stop at a module's edge: where, when, and what to call with (args, kwargs) or the output.

    Args:
        path: of the module, from the causal model.
        side: "input" or "output".
        when: sorts visits in the order of the forward pass.
        sees: are called in turn, and answer with what takes the value's place, or None.
    """

    path: str
    side: str
    when: tuple[int, int]
    sees: list[Callable[[Any], Any]] = field(default_factory=list)

    def see(self, value: Any) -> Any:
        """What all make of the value; None if they leave it alone."""
        changed = None
        for see in self.sees:
            answer = see(value if changed is None else changed)
            changed = changed if answer is None else answer
        return changed


def make_visits(model: Any, visits: list[Visit]) -> None:
    """Runs inside a trace: reading `.inputs` or `.output` waits until the model gets there."""
    for visit in visits:
        part = model.get(visit.path)
        changed = visit.see(part.inputs if visit.side == "input" else part.output)
        if changed is not None and visit.side == "input":
            part.inputs = changed
        elif changed is not None:
            part.output = changed


def tapped(taps: list[Tap], side: str, heads: int | None, n_texts: int) -> Callable[[Any], Any]:
    """From taps on an activation to a function on (args, kwargs) or on a module's output.

    Args:
        taps: take and answer axes text, position, then the site's own.
        side: "input" or "output".
        heads: how many heads the last axis is cut into for the taps; None for none.
        n_texts: texts that run together.
    """

    def see(value: Any) -> Any:
        if side == "input":
            args, kwargs = value
            found = args[0] if args else kwargs["hidden_states"]
        else:
            found = value[0] if isinstance(value, tuple) else value
        shape = found.shape
        shown = found.unflatten(0, (n_texts, -1)) if found.ndim == 2 else found  # OPT's MLP lays texts end to end
        changed = through(taps, shown if heads is None else shown.unflatten(-1, (heads, -1)))
        if changed is None:
            return None
        changed = changed.reshape(shape)
        if side == "output":
            return (changed, *value[1:]) if isinstance(value, tuple) else changed
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

    return see


class MapWatch:
    """Shows one layer's attention map, block by block, with the mask its module was given."""

    def __init__(self, attention: nn.Module, layer: int, want: CapturePass) -> None:
        self._attention, self._layer, self._want = attention, layer, want
        self._visible: Tensor | None = None

    def mask(self, value: Any) -> None:
        """At the input of attention: which pairs are allowed."""
        args, kwargs = value
        given = inspect.signature(type(self._attention).forward).bind(self._attention, *args, **kwargs).arguments
        mask = given.get("attention_mask", given.get("kwargs", {}).get("attention_mask"))
        if mask is not None:
            allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            self._visible = allowed[:, 0]

    def map(self, value: Any) -> None:
        """At the output of attention: probabilities, axes text, head, query, key."""
        probs = value[1] if isinstance(value, tuple) and len(value) > 1 else None
        if probs is None:
            raise CapabilityError(
                f"Attention of layer {self._layer} returned no probabilities although it ran with eager attention; "
                "use backend='transformers' for attention statistics."
            )
        lengths = self._want.batch.lengths
        for start in range(0, probs.shape[2], BLOCK):
            part = probs[:, :, start : start + BLOCK, : start + BLOCK].to(torch.float32, copy=True)
            for i, n in enumerate(lengths):
                part[i, :, max(0, n - start) :] = 0
            entropy = torch.special.entr(part).sum(-1)
            if getattr(self._attention, "sinks", None) is not None:
                entropy += torch.special.entr((1 - part.sum(-1)).clamp(0, 1))
            visible = None if self._visible is None else self._visible[:, start : start + BLOCK, : part.shape[3]]
            self._want.on_block(self._layer, AttentionBlock(part, entropy, part.amax(-1), start, lengths, visible))

"""What every query of a text pays to one of its tokens, from the attention probabilities of a text embedder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from probekit.core import AttentionColumns, CapabilityError

from .transformers.implementation import attention_by

_ENTRIES = 2**26  # of all attention maps of one batch
_TEXTS = 64
_MARK = "_output_capturing_hooks_installed"  # where transformers notes that it has hooked itself in


@contextmanager
def showing_attention(module: nn.Module) -> Iterator[None]:
    """Let a model compute its attention probabilities and return them; afterwards it is as it was found.

    It runs eager attention, without dropout. The first time that transformers is asked for attention it hooks itself
    into the modules, for good; these hooks are taken out again.

    Args:
        module: the model.
    """
    parts = list(module.modules())
    before = [(set(part._forward_hooks), _MARK in vars(part), part.training) for part in parts]
    try:
        for part in parts:
            part.training = False
        with attention_by(module, "eager"):
            yield
    finally:
        for part, (hooks, marked, training) in zip(parts, before, strict=True):
            part.training = training
            for key in set(part._forward_hooks) - hooks:
                if getattr(part._forward_hooks[key], "__module__", "").startswith("transformers."):
                    del part._forward_hooks[key]
            if not marked:
                vars(part).pop(_MARK, None)


def columns_of(
    module: Any,
    ids: Sequence[Sequence[int]],
    at: Sequence[int],
    *,
    n_layers: int,
    pad: int = 0,
    progress: Callable[[int], None] | None = None,
) -> AttentionColumns:
    """The attention columns of texts, run in batches of about one length. Holds the maps of one batch at a time.

    Args:
        module: a transformers model that takes `input_ids` and `attention_mask`.
        ids: of each text.
        at: for each text, the position of its column.
        n_layers: maps that the model has to return.
        pad: id that fills shorter texts up.
        progress: is told how many texts are done since it was last told.

    Raises:
        CapabilityError: the model does not return one map per layer whose rows sum to one.
    """
    lengths = np.array([len(one) for one in ids])
    starts = np.cumsum(lengths) - lengths
    order, done, values = np.argsort(-lengths, kind="stable"), 0, np.empty((0, 0, 0), np.float32)
    with showing_attention(module), torch.inference_mode():
        while done < len(order):
            longest = int(lengths[order[done]])
            heads = max(1, getattr(module.config, "num_attention_heads", 1))
            n = max(1, min(_TEXTS, _ENTRIES // (n_layers * heads * longest**2)))
            part = order[done : done + n]
            rows = torch.tensor([[*ids[i], *[pad] * (longest - len(ids[i]))] for i in part])
            mask = torch.tensor([[1] * len(ids[i]) + [0] * (longest - len(ids[i])) for i in part])
            maps = _maps(module, rows, mask, n_layers)
            if not values.size:
                values = np.empty((n_layers, maps[0].shape[1], int(lengths.sum())), np.float32)
            for layer, found in enumerate(maps):
                for row, text in enumerate(part):
                    column = found[row, :, : lengths[text], at[text]]
                    values[layer, :, starts[text] : starts[text] + lengths[text]] = column.float().cpu().numpy()
            done += len(part)
            if progress is not None:
                progress(len(part))
    return AttentionColumns(values, lengths)


def _maps(module: Any, rows: torch.Tensor, mask: torch.Tensor, n_layers: int) -> tuple[torch.Tensor, ...]:
    """Attention probabilities of each layer; axes text, head, query, key."""
    device = next(module.parameters()).device
    rows, mask = rows.to(device), mask.to(device)
    try:
        found = module(input_ids=rows, attention_mask=mask, output_attentions=True, return_dict=True)
    except (TypeError, NotImplementedError) as error:
        raise _no_attention(module, n_layers, f"an error ({error})") from error
    maps = tuple(m for m in getattr(found, "attentions", None) or () if m is not None)
    shape = (len(rows), rows.shape[1], rows.shape[1])
    if len(maps) != n_layers or not all(m.ndim == 4 and (m.shape[0], *m.shape[2:]) == shape for m in maps):
        raise _no_attention(module, n_layers, f"{len(maps)} of shapes {[tuple(m.shape) for m in maps[:3]]}")
    used = mask.bool()
    loose = 1e-3 if maps[0].dtype == torch.float32 else 0.05
    for layer, one in enumerate(maps):
        totals = one.float().sum(-1).transpose(1, 2)[used]
        if not bool(((totals - 1).abs() < loose).all()):
            low, high = float(totals.min()), float(totals.max())
            raise _no_attention(module, n_layers, f"rows of layer {layer} that sum to {low:.3g} to {high:.3g}")
    return maps


def _no_attention(module: Any, n_layers: int, found: str) -> CapabilityError:
    return CapabilityError(
        f"{type(module).__name__} shows no attention probabilities: expected {n_layers} maps (text, head, query, key) "
        f"whose rows sum to one, found {found}. Ask a model whose attention transformers can compute eagerly, such as "
        "BERT, MPNet, XLM-RoBERTa or T5."
    )

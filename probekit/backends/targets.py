"""The numbers that gradients are taken of: each is a sum, over texts, of something of their next-token logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probekit.core import InputError, LogitDifference, ModelInfo, NextTokenEntropy
from probekit.reduce.unembed import Unembed

Target = LogitDifference | NextTokenEntropy


def check_target(target: Target, places: Sequence[int], lengths: Sequence[int], info: ModelInfo) -> None:
    """Refuse a number that these texts do not have.

    Args:
        target: the number.
        places: of each text, its place among the texts of the request.
        lengths: of each text, its tokens.
        info: the model.

    Raises:
        InputError: a text is too short, or lacks ids, or they are outside the vocabulary.
    """
    name = "logit difference" if isinstance(target, LogitDifference) else "next-token entropy"
    if isinstance(target, LogitDifference) and len(target.plus) <= max(places):
        raise InputError(f"The {name} names ids for {len(target.plus)} texts; text {max(places)} has none.")
    for i, n in zip(places, lengths, strict=True):
        if not -n <= target.position < n:
            raise InputError(f"The {name} is read at position {target.position}; text {i} has {n} tokens.")
        if isinstance(target, LogitDifference):
            for sign, token in (("plus", target.plus[i]), ("minus", target.minus[i])):
                if not -1 <= token < info.d_vocab:
                    raise InputError(
                        f"The {name} has {sign}={token} for text {i}; the vocabulary has {info.d_vocab} entries "
                        "(-1 for none)."
                    )


def value_of(target: Target, places: Sequence[int], normed: Tensor, unembed: Unembed) -> Tensor:
    """The number, summed over texts: differentiable, in float32 or wider.

    Args:
        target: the number.
        places: of each text, its place among the texts of the request.
        normed: what the final norm made of each text's row at the position; axes text, d_model.
        unembed: the way from there to logits.
    """
    if isinstance(target, LogitDifference):
        return _difference(target, places, normed, unembed)
    exact = torch.promote_types(normed.dtype, torch.float32)
    logits = (normed @ unembed.weight.T).to(exact)
    if unembed.bias is not None:
        logits = logits + unembed.bias.to(exact)
    logprob = unembed.finish(logits).log_softmax(-1)
    return -(logprob.exp() * logprob).sum()


def _difference(target: LogitDifference, places: Sequence[int], normed: Tensor, unembed: Unembed) -> Tensor:
    exact = torch.promote_types(normed.dtype, torch.float32)
    total = normed.new_zeros((), dtype=exact)
    for sign, ids in ((1.0, target.plus), (-1.0, target.minus)):
        wanted = torch.tensor([ids[i] for i in places], device=normed.device)
        logits = (normed * unembed.weight[wanted.clamp(min=0)]).sum(-1).to(exact)
        if unembed.bias is not None:
            logits = logits + unembed.bias[wanted.clamp(min=0)].to(exact)
        total = total + sign * (unembed.finish(logits) * (wanted >= 0)).sum()
    return total

"""Carrying out edits on activations; `probekit.core.check_patch` refuses those that do not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from probekit.core import Add, Batch, InputError, KnockOut, Patch, ProjectOut, Replace, Scale
from probekit.reduce.attention_blocks import MASKED

Cut = Callable[[Tensor, slice, int], None]  # scores (text, head, query, key), heads, first query; in place


def apply_edit(patch: Patch, values: Tensor, batch: Batch) -> Tensor:
    """What the patch makes of an activation; the activation itself stays as it is.

    Args:
        patch: the patch; not a knock-out.
        values: axes text, position, (head,) dimension; padded on the right.
        batch: the texts.
    """
    edit = patch.edit
    everywhere = patch.positions is patch.heads is patch.dims is patch.texts is None
    if isinstance(edit, Scale) and everywhere:
        return values * edit.factor
    changed = values.clone()
    for i, n in _texts(patch, batch):
        places = [torch.tensor(_positions(patch.positions, n), device=values.device)]
        if values.ndim == 4:
            places.append(_places(patch.heads, values.shape[2], values.device))
        places.append(_places(patch.dims, values.shape[-1], values.device))
        grid = torch.meshgrid(*places, indexing="ij")
        changed[i][grid] = _edited(edit, values[i][grid])
    return changed


def _edited(edit: object, part: Tensor) -> Tensor:
    if isinstance(edit, Scale):
        return part * edit.factor
    if isinstance(edit, Replace):
        return torch.as_tensor(edit.values.array.copy()).to(part).expand_as(part)
    assert isinstance(edit, (Add, ProjectOut)), edit
    exact = part if part.dtype == torch.float64 else part.float()
    direction = torch.as_tensor(edit.direction.array.copy()).to(exact)
    if isinstance(edit, Add):
        return (exact + edit.scale * direction).to(part.dtype)
    unit = direction / direction.norm()
    return (exact - (exact @ unit)[..., None] * unit).to(part.dtype)


def cut_of(patches: Sequence[Patch], batch: Batch) -> Cut | None:
    """What knocks the edges of these patches out of a block of scores; None if there are none.

    Args:
        patches: knock-outs of one layer.
        batch: the texts.

    Raises:
        InputError: when called, if the patches together, or with a sliding window, leave a query without any key.
    """
    if not patches:
        return None

    def cut(scores: Tensor, heads: slice, start: int) -> None:
        n_heads, n_queries, n_keys = scores.shape[1:]
        query = torch.arange(start, start + n_queries, device=scores.device)
        key = torch.arange(n_keys, device=scores.device)
        for patch in patches:
            assert isinstance(patch.edit, KnockOut)
            chosen = range(heads.start, heads.start + n_heads) if patch.heads is None else patch.heads
            inside = [h - heads.start for h in chosen if heads.start <= h < heads.start + n_heads]
            for i, n in _texts(patch, batch):
                looks = torch.isin(query, torch.tensor(_positions(patch.edit.queries, n), device=scores.device))
                if patch.edit.keys is None:
                    edges = looks[:, None] & (key < query[:, None])
                else:
                    keys = torch.tensor(_positions(patch.edit.keys, n), device=scores.device)
                    edges = looks[:, None] & torch.isin(key, keys)
                for head in inside:
                    scores[i, head].masked_fill_(edges, MASKED)
                    blind = looks & (scores[i, head] <= MASKED / 2).all(-1)
                    if blind.any():
                        raise InputError(
                            f"The knock-out at {patch.point} leaves query {int(query[blind][0])} of text "
                            f"{batch.index[i]} no key to look at in head {heads.start + head}: what it does not cut is "
                            "cut by another one, or lies outside the layer's sliding window."
                        )

    return cut


def _texts(patch: Patch, batch: Batch) -> list[tuple[int, int]]:
    """Row in the batch and number of tokens of each text that the patch applies to."""
    chosen = None if patch.texts is None else set(patch.texts)
    return [(i, n) for i, n in enumerate(batch.lengths) if chosen is None or batch.index[i] in chosen]


def _positions(positions: Sequence[int] | None, n: int) -> list[int]:
    return list(range(n)) if positions is None else [p % n for p in positions]


def _places(chosen: Sequence[int] | None, size: int, device: torch.device) -> Tensor:
    return torch.arange(size, device=device) if chosen is None else torch.tensor(chosen, device=device) % size

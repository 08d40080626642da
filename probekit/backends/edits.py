"""Carrying out edits on activations, and refusing those that do not fit before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from probekit.core import (
    SITES,
    Add,
    Batch,
    InputError,
    KnockOut,
    ModelInfo,
    Patch,
    ProjectOut,
    Replace,
    Scale,
)
from probekit.reduce.attention_blocks import MASKED

Cut = Callable[[Tensor, slice, int], None]  # scores (text, head, query, key), heads, first query; in place


def check_patch(patch: Patch, info: ModelInfo, batch: Batch) -> None:
    """Refuse a patch that does not fit the model or the texts.

    Args:
        patch: the patch.
        info: the model's sizes.
        batch: the texts that run.

    Raises:
        InputError: a head, dimension, position or text that does not exist, values of another shape, or a knock-out
            that leaves a query without any key.
    """
    site = patch.point.site
    dims = SITES[site].dims
    n_heads = info.n_kv_heads if site in ("k", "v") else info.n_heads
    if patch.heads is not None and not all(0 <= h < n_heads for h in patch.heads):
        what = "key-value heads" if n_heads != info.n_heads else "heads"
        hint = f"; its queries have {info.n_heads}, several of which share one" if n_heads != info.n_heads else ""
        raise InputError(f"Heads {list(patch.heads)} at {patch.point}: {info.name!r} has {n_heads} {what} there{hint}.")
    width = {"d_model": info.d_model, "d_head": info.d_head, "d_mlp": info.d_mlp, "vocab": info.d_vocab}.get(dims[-1])
    if patch.dims is not None and width is not None and not all(-width <= d < width for d in patch.dims):
        raise InputError(f"Dimensions {list(patch.dims)} at {patch.point}: it has {width}, 0 to {width - 1}.")
    for i, n in _texts(patch, batch):
        _check_positions(patch, batch.index[i], n)
        if isinstance(patch.edit, KnockOut):
            continue
        shape = [len(_positions(patch.positions, n))]
        if "head" in dims:
            shape.append(n_heads if patch.heads is None else len(patch.heads))
        if width is not None:
            shape.append(width if patch.dims is None else len(patch.dims))
            _check_values(patch, tuple(shape), batch.index[i])


def _check_positions(patch: Patch, text: int, n: int) -> None:
    edit = patch.edit
    chosen = [*(patch.positions or ())]
    if isinstance(edit, KnockOut):
        chosen += [*(edit.keys or ()), *(edit.queries or ())]
        cut = set(_positions(edit.keys, n)) if edit.keys is not None else set()
        blind = [q for q in _positions(edit.queries, n) if edit.keys is not None and cut.issuperset(range(q + 1))]
        if blind:
            raise InputError(
                f"The knock-out at {patch.point} leaves query {blind[0]} of text {text} no key to look at. "
                "Name queries that see something else, or leave out keys."
            )
    outside = [p for p in chosen if not -n <= p < n]
    if outside:
        raise InputError(f"Position {outside[0]} at {patch.point}: text {text} has {n} tokens, 0 to {n - 1}.")


def _check_values(patch: Patch, shape: tuple[int, ...], text: int) -> None:
    edit = patch.edit
    values = edit.values if isinstance(edit, Replace) else getattr(edit, "direction", None)
    if values is None:
        return
    try:
        fits = torch.broadcast_shapes(values.array.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise InputError(
            f"Values of shape {values.array.shape} at {patch.point} do not fit text {text}: the patch selects "
            f"{' × '.join(map(str, shape))} (position, then head where there are heads, then dimension)."
        )


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
    direction = torch.as_tensor(edit.direction.array.copy(), device=part.device)
    exact = part.float()
    if isinstance(edit, Add):
        return (exact + edit.scale * direction).to(part.dtype)
    unit = direction / direction.norm()
    return (exact - (exact @ unit)[..., None] * unit).to(part.dtype)


def cut_of(patches: Sequence[Patch], batch: Batch) -> Cut | None:
    """What knocks the edges of these patches out of a block of scores; None if there are none.

    Args:
        patches: knock-outs of one layer.
        batch: the texts.
    """
    if not patches:
        return None

    def cut(scores: Tensor, heads: slice, start: int) -> None:
        n_queries, n_keys = scores.shape[2:]
        query = torch.arange(start, start + n_queries, device=scores.device)
        key = torch.arange(n_keys, device=scores.device)
        for patch in patches:
            assert isinstance(patch.edit, KnockOut)
            chosen = range(heads.start, heads.start + scores.shape[1]) if patch.heads is None else patch.heads
            inside = [h - heads.start for h in chosen if heads.start <= h < heads.start + scores.shape[1]]
            for i, n in _texts(patch, batch):
                queries = torch.tensor(_positions(patch.edit.queries, n), device=scores.device)
                edges = torch.isin(query, queries)[:, None] & (key < query[:, None])
                if patch.edit.keys is not None:
                    keys = torch.tensor(_positions(patch.edit.keys, n), device=scores.device)
                    edges = torch.isin(query, queries)[:, None] & torch.isin(key, keys)
                for head in inside:
                    scores[i, head].masked_fill_(edges, MASKED)

    return cut


def _texts(patch: Patch, batch: Batch) -> list[tuple[int, int]]:
    """Row in the batch and number of tokens of each text that the patch applies to."""
    chosen = None if patch.texts is None else set(patch.texts)
    return [(i, n) for i, n in enumerate(batch.lengths) if chosen is None or batch.index[i] in chosen]


def _positions(positions: Sequence[int] | None, n: int) -> list[int]:
    return list(range(n)) if positions is None else [p % n for p in positions]


def _places(chosen: Sequence[int] | None, size: int, device: torch.device) -> Tensor:
    return torch.arange(size, device=device) if chosen is None else torch.tensor(chosen, device=device) % size

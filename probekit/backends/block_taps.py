"""Taps of reducers that read more than one activation of a block at once, or an activation with weights beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from probekit.core import ModelInfo, Point
from probekit.reduce import BlockRows, Recorder, ValueRows

Tap = Callable[[Tensor], Tensor | None]  # axes text, position, then the site's own
Place = tuple[str, int]  # site, layer


class _Model(Protocol):
    @property
    def info(self) -> ModelInfo: ...

    def output_gram(self, layer: int) -> Tensor: ...


def whole_block_taps(
    recorders: Sequence[Recorder], model: _Model, pack: Callable[[Tensor], Tensor], lengths: tuple[int, ...]
) -> Iterator[tuple[Place, Tap]]:
    """Where to tap, and with what, for reducers that read "block" or "values".

    Args:
        recorders: of all captures; others than these are passed over.
        model: its sizes and sites, and the output projection of its heads.
        pack: takes the padding out.
        lengths: tokens per text.

    Raises:
        CapabilityError: the model does not show what enters a block, or its middle.
    """
    for recorder in recorders:
        for layer in recorder.layers if recorder.reducer.reads == "values" else ():
            yield (recorder.point.site, layer), _values(recorder, layer, model, pack, lengths)
    wanted: dict[int, list[Recorder]] = {}
    for recorder in recorders:
        for layer in recorder.layers if recorder.reducer.reads == "block" else ():
            wanted.setdefault(layer, []).append(recorder)
    # Where attention and MLP run side by side there is no stream between them, and no norm after the MLP.
    middle = "resid_mid" if "resid_mid" in model.info.sites else "mlp_out"
    for layer, some in wanted.items():
        held: dict[str, Tensor] = {}
        for site in ("resid_pre", middle):
            model.info.require(Point(site))
            yield (site, layer), _hold(held, site, pack)
        yield ("resid_post", layer), _block(some, layer, held, pack, lengths)


def _values(
    recorder: Recorder, layer: int, model: _Model, pack: Callable[[Tensor], Tensor], lengths: tuple[int, ...]
) -> Tap:
    def show(values: Tensor) -> None:
        rows = pack(values)
        recorder.rows(layer, ValueRows(rows, model.output_gram(layer).to(rows.device), lengths))

    return show


def _hold(held: dict[str, Tensor], site: str, pack: Callable[[Tensor], Tensor]) -> Tap:
    def hold(values: Tensor) -> None:
        held[site] = pack(values)

    return hold


def _block(
    recorders: Sequence[Recorder],
    layer: int,
    held: dict[str, Tensor],
    pack: Callable[[Tensor], Tensor],
    lengths: tuple[int, ...],
) -> Tap:
    def show(values: Tensor) -> None:
        after = pack(values)
        before = held.pop("resid_pre").to(after.device)
        site, middle = held.popitem()
        # In float32, since the stream may be large and what the MLP adds to it small.
        mlp = after.float() - middle.to(after.device).float() if site == "resid_mid" else middle.to(after.device)
        for recorder in recorders:
            recorder.rows(layer, BlockRows(before, after, mlp, lengths))

    return show

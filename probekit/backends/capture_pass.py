"""What a request wants of one micro-batch, whoever runs the model.

A `CapturePass` turns captures, patches and gradients into taps: functions that a backend calls with
the activation at a (site, layer) while its model runs, padded on the right. A tap may answer with
another tensor, which then takes the activation's place. After the run, the pass reads the lens from
the residual streams it held and hands out one `Partial` per capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from probekit.core import (
    SITES,
    Batch,
    CapabilityError,
    Forward,
    InputError,
    ModelInfo,
    Patch,
    Point,
    Progress,
    Request,
    check_patch,
)
from probekit.reduce import AtPosition, NextToken, Partial, Recorder, Reducer, Rows
from probekit.reduce.attention_blocks import AttentionBlock
from probekit.reduce.base import rows_at
from probekit.reduce.lens_files import by_lens, translation
from probekit.reduce.unembed import Unembed
from probekit.reduce.vocab_rows import project, stream_readout
from probekit.reduce.vocab_tiles import stream_readout_tiles

from .block_taps import Tap, whole_block_taps
from .direct import show_directions
from .edits import Cut, apply_edit, cut_of
from .targets import check_target, value_of

# The readout has a final norm of its own and the middle norm may read a copy: changes there would be lost.
_READ_ONLY = frozenset({"resid_mid", "final_norm", "logits", "router"})


class Tapped(Protocol):
    """What a pass asks of a model."""

    @property
    def info(self) -> ModelInfo:
        """Sizes and capabilities."""
        ...

    @property
    def unembed(self) -> Unembed:
        """The way from a residual row to logits."""
        ...

    def output_gram(self, layer: int) -> Tensor:
        """W_O^h (W_O^h)^T of each query head of a block; axes head, d_head, d_head."""
        ...


class CapturePass:
    """One micro-batch: recorders to be filled, patches to be made, residual streams to be held.

    Args:
        model: whose activations will be shown.
        request: captures, patches and gradient.
        batch: the texts.
        progress: is told the work done, in GFLOP.
        device: where the model reads its ids.
        reorders: whether the backend runs blocks in the order that `order` gives.

    Raises:
        CapabilityError: a point that this model lacks, a change where none is possible, or attention
            statistics of a gradient.
        InputError: a layer, head, position or shape that does not exist.
    """

    def __init__(
        self,
        model: Tapped,
        request: Forward,
        batch: Batch,
        progress: Progress | None,
        device: torch.device,
        *,
        reorders: bool = False,
    ) -> None:
        self.model, self.request, self.batch, self.progress = model, request, batch, progress
        self.info = model.info
        self.recorders = [
            Recorder(_reducer(c.reducer), c.point, self.info.require(c.point), batch.lengths) for c in request.captures
        ]
        self.attention = [r for r in self.recorders if r.reducer.reads == "attention"]
        self.direct = [r for r in self.recorders if r.reducer.reads == "direct"]
        self._check_order(reorders)
        self.cuts: dict[int, Cut] = {}
        self._edits: dict[tuple[str, int], list[Patch]] = {}
        for patch in request.patches:
            self._place(patch)
        for layer in {layer for site, layer in self._edits if site == "pattern"}:
            cut = cut_of(self._edits.pop(("pattern", layer)), batch)
            assert cut is not None
            self.cuts[layer] = cut
        self._check_gradient()
        self.residuals: dict[int, Tensor] = {}
        self._held: dict[tuple[str, int], Tensor] = {}
        self._tracked: list[tuple[Recorder, int, Tensor]] = []
        self._pad(device)

    def _place(self, patch: Patch) -> None:
        site = patch.point.site
        if site in _READ_ONLY:
            change = ", ".join(s for s in SITES if s in self.info.sites and s not in _READ_ONLY)
            raise CapabilityError(f"The point {site!r} can be read but not changed; change one of {change}.")
        layers = self.info.require(patch.point)
        check_patch(patch, self.info, self.batch)
        for layer in layers:
            self._edits.setdefault((site, layer), []).append(patch)

    def _check_order(self, reorders: bool) -> None:
        order, n = self.request.order, self.info.n_layers
        if order is None:
            return
        if not reorders:
            raise CapabilityError(
                "This backend runs blocks in their own order only; open the model with the transformers backend to "
                "swap blocks."
            )
        if len(order) != n or not all(0 <= block < n for block in order):
            raise InputError(f"An order names a block, 0 to {n - 1}, for each of {n} places; found {list(order)}.")

    def _check_gradient(self) -> None:
        metric = self.request.gradient_of
        if metric is None:
            return
        logits = any(r.point.site == "logits" for r in self.recorders)
        if (
            self.attention
            or self.cuts
            or logits
            or any(r.reducer.reads not in ("rows", "attention") for r in self.recorders)
        ):
            raise CapabilityError(
                "Gradients are seen at points with rows of numbers (residual streams, outputs, q, k, v, z); "
                "ask for attention statistics, lenses, logits and knock-outs in a request without gradient_of."
            )
        check_target(metric, self._places_in_request(), self.batch.lengths, self.info)

    def _pad(self, device: torch.device) -> None:
        longest = max(self.batch.lengths)
        ids = torch.zeros((len(self.batch), longest), dtype=torch.long)
        for row, text in zip(ids, self.batch, strict=True):
            row[: len(text)] = torch.tensor(text.ids)
        self.ids = ids.to(device)  # text, position; texts are padded on the right, where causal attention never looks
        keep = [i * longest + t for i, n in enumerate(self.batch.lengths) for t in range(n)]
        self._keep = None if len(keep) == ids.numel() else torch.tensor(keep, device=device)

    @property
    def watched(self) -> frozenset[int]:
        """Layers whose attention probabilities are wanted."""
        return frozenset(layer for r in self.attention for layer in r.layers)

    @property
    def wants_scores(self) -> bool:
        """Whether attention scores are wanted beside the probabilities."""
        return any(r.reducer.wants_scores for r in self.attention)

    def on_block(self, layer: int, block: AttentionBlock) -> None:
        """Show a block of a layer's attention probabilities to whoever wants them."""
        for recorder in self.attention:
            if recorder.wants(layer):
                recorder.attention(layer, block)

    def taps(self) -> dict[tuple[str, int], list[Tap]]:
        """What to call with each activation, by site and layer, in order.

        Changes come first, so that what is captured is what the rest of the model sees.
        """
        taps: dict[tuple[str, int], list[Tap]] = {}
        for place, patches in self._edits.items():
            taps.setdefault(place, []).extend(self._edit(p) for p in patches)
        for recorder in self.recorders:
            if recorder.reducer.reads == "rows" and recorder.point.site != "logits":
                for layer in recorder.layers:
                    taps.setdefault((recorder.point.site, layer), []).append(self._show(recorder, layer))
        for place, tap in whole_block_taps(self.recorders, self.model, self.pack, self.batch.lengths):
            taps.setdefault(place, []).append(tap)
        for site, layer in dict.fromkeys((r.point.site, layer) for r in self.direct for layer in r.layers):
            if site != "logits":
                taps.setdefault((site, layer), []).append(self._hold_for_direct(site, layer))
        for layer in self._held_layers():
            taps.setdefault(("resid_post", layer), []).append(self._hold(layer))
        if self.progress is not None:
            work = 2e-9 * self.batch.n_tokens * self.info.n_params / self.info.n_layers
            for layer in range(self.info.n_layers):
                taps.setdefault(("resid_post", layer), []).append(self._tell(work))
        return taps

    def pack(self, values: Tensor) -> Tensor:
        """Without padding: axes text, position, others become token, others."""
        flat = values.flatten(0, 1)
        return flat if self._keep is None else flat[self._keep.to(flat.device)]

    def _edit(self, patch: Patch) -> Tap:
        return lambda values: apply_edit(patch, values, self.batch)

    def _show(self, recorder: Recorder, layer: int) -> Tap:
        def show(values: Tensor) -> None:
            recorder.rows(layer, Rows(self.pack(values), self.batch.lengths))

        def track(values: Tensor) -> Tensor:
            self._tracked.append((recorder, layer, values))
            return values  # the rest of the model has to read this very tensor

        return show if self.request.gradient_of is None else track

    def _hold(self, layer: int) -> Tap:
        def hold(values: Tensor) -> None:
            self.residuals[layer] = self.pack(values)

        return hold

    def _hold_for_direct(self, site: str, layer: int) -> Tap:
        def hold(values: Tensor) -> None:
            self._held[site, layer] = self.pack(values)

        return hold

    def _tell(self, work: float) -> Tap:
        def tell(_: Tensor) -> None:
            if self.progress is not None:
                self.progress(work)

        return tell

    def _held_layers(self) -> list[int]:
        """Blocks whose output is needed after the run."""
        vocab = [r for r in self.recorders if r.reducer.reads == "vocab"]
        layers = {layer for r in vocab if r.point.site == "resid_post" for layer in r.layers}
        if vocab or self.direct or self.request.gradient_of or any(r.point.site == "logits" for r in self.recorders):
            layers.add(self.info.n_layers - 1)
        return sorted(layers)

    def finish(self) -> list[Partial]:
        """After the run: the lens, the gradient, and one partial per capture, in order."""
        if self.request.gradient_of is not None:
            self._differentiate()
        with torch.no_grad():
            self._gather()
            self._readout()
        for recorder in self.recorders:
            recorder.leave()
        return [r.close(self.batch.index) for r in self.recorders]

    @cached_property
    def _unembed(self) -> Unembed:
        return self.model.unembed

    def _gather(self) -> None:
        """Bring what the lens reads to the unembedding, where blocks are spread over devices."""
        if self.residuals:
            home = self._unembed.weight.device
            self.residuals = {layer: rows.to(home) for layer, rows in self.residuals.items()}
            self._held = {place: rows.to(home) for place, rows in self._held.items()}

    def _differentiate(self) -> None:
        metric, unembed = self.request.gradient_of, self._unembed
        assert metric is not None
        last = self.residuals[self.info.n_layers - 1]
        starts = [sum(self.batch.lengths[:i]) for i in range(len(self.batch))]
        at = [s + metric.position % n for s, n in zip(starts, self.batch.lengths, strict=True)]
        # Where the final norm is watched itself, what follows has to read the very tensor that was shown.
        shown = [values for recorder, _, values in self._tracked if recorder.point.site == "final_norm"]
        normed = (self.pack(shown[-1])[at] if shown else unembed.norm(last[at])).to(unembed.weight)
        total = value_of(metric, self._places_in_request(), normed, unembed)
        tensors = [values for _, _, values in self._tracked]
        gradients = torch.autograd.grad(total, tensors, allow_unused=True)
        for (recorder, layer, _), gradient in zip(self._tracked, gradients, strict=True):
            if gradient is None:
                raise CapabilityError(
                    f"The model shows {recorder.point} in layer {layer} but does not read it again, so there is no "
                    "gradient with respect to it. Ask for another point."
                )
            recorder.rows(layer, Rows(self.pack(gradient.detach()), self.batch.lengths))

    def _places_in_request(self) -> list[int]:
        """For each text of this micro-batch, its place among the texts of the request."""
        if self.request.texts is None:
            return list(self.batch.index)
        place = {text: i for i, text in enumerate(self.request.texts)}
        return [place[i] for i in self.batch.index]

    def _readout(self) -> None:
        last, unembed = self.info.n_layers - 1, self._unembed
        for recorder in self.recorders:
            if recorder.point.site == "logits" and recorder.reducer.reads == "rows":
                rows, only = self.residuals[last], None
                if isinstance(recorder.reducer, AtPosition):
                    only = recorder.reducer.position
                    rows = rows[rows_at(only, self.batch.lengths)]
                logits = rows.new_empty((len(rows), self.info.d_vocab), dtype=torch.float32)
                recorder.rows(0, Rows(project(rows, unembed, logits), self.batch.lengths, only))
        lens = [r for r in self.recorders if r.reducer.reads == "vocab" and r.point.site == "resid_post"]
        own = [r for r in self.recorders if r.reducer.reads == "vocab" and r.point.site == "logits"]
        likeliest = Recorder(NextToken(2), Point("logits"), (0,), self.batch.lengths) if self.direct else None
        own += [likeliest] if likeliest else []
        against = self.request.against
        if against is None:
            self._stream(self.residuals, last, lens, own)
        else:
            # The other run's final rows stand in the place of an own last layer, and the own one is like any other.
            rows = torch.as_tensor(against.of(self.batch)).to(self.residuals[last]) if lens else self.residuals[last]
            self._stream(self.residuals | {-1: rows}, -1, lens, [])
            self._stream(self.residuals, last, [], own)
        if likeliest:
            ids = likeliest.recorded("top_id")[0].cpu().numpy()
            show_directions(self.direct, self._held, self.residuals[last], ids, unembed, self.batch)

    def _stream(
        self, residuals: dict[int, Tensor], last: int, lens: Sequence[Recorder], own: Sequence[Recorder]
    ) -> None:
        if not (lens or own):
            return
        device, tell = residuals[last].device, self.progress
        row_work = 2e-9 * self.info.d_model * self.info.d_vocab
        for which, some in (by_lens(lens) or {None: []}).items():
            (stream_readout if device.type == "cpu" else stream_readout_tiles)(
                residuals,
                last,
                torch.as_tensor(self.batch.next_ids, device=device),
                self._unembed,
                some,
                own,
                None if tell is None else (lambda n_rows: tell(row_work * n_rows)),
                translate=translation(which, device),
            )
            own = []


def require_forward(request: Request, name: str) -> Forward:
    """The request, if a decoder can serve it.

    Raises:
        CapabilityError: it is no `Forward`.
    """
    if not isinstance(request, Forward):
        raise CapabilityError(
            f"{name!r} is a decoder and cannot serve {type(request).__name__}; "
            "open a text-embedding model such as 'all-minilm-l6-v2' for that."
        )
    return request


def through(taps: Sequence[Tap], values: Tensor) -> Tensor | None:
    """What the taps make of an activation, one after the other; None if they leave it alone."""
    current: Tensor | None = None
    for tap in taps:
        answer = tap(values if current is None else current)
        if answer is not None:
            current = answer
    return current


def _reducer(spec: Any) -> Reducer:
    assert isinstance(spec, Reducer), spec
    return spec

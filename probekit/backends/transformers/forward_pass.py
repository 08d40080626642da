"""One forward pass: hooks in, model run, readout, hooks out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from probekit.core import Batch, CapabilityError, Forward, Patch, Progress
from probekit.reduce import Partial, Recorder, Reducer, Rows
from probekit.reduce.attention_blocks import AttentionBlock
from probekit.reduce.vocab_rows import project, stream_readout
from probekit.reduce.vocab_tiles import stream_readout_tiles

from .attention_switch import watching

if TYPE_CHECKING:
    from .model import TransformersModel

# Where a site is tapped: which module, relative to the architecture's parts, and on which side.
_TAPS: dict[str, tuple[str, str]] = {
    "resid_pre": ("block", "input"),
    "resid_mid": ("mid_norm", "input"),
    "resid_post": ("block", "output"),
    "attn_out": ("attention", "output"),
    "mlp_out": ("mlp", "output"),
    "embed": ("embedding", "output"),
    "final_norm": ("final_norm", "output"),
}
SITES_SERVED = frozenset({*_TAPS, "logits", "pattern"})
# The middle norm reads a copy of the stream and the readout has a final norm of its own: changes there would be lost.
_CHANGEABLE = tuple(site for site in _TAPS if site not in ("resid_mid", "final_norm"))
See = Callable[[Tensor], Tensor | None]


class ForwardPass:
    """One micro-batch through a transformers model, with everything that a request wants of it."""

    def __init__(self, model: TransformersModel, request: Forward, batch: Batch, progress: Progress | None) -> None:
        self.model, self.request, self.batch, self.progress = model, request, batch, progress
        self.info = model.info
        self.recorders = [
            Recorder(_reducer(c.reducer), c.point, self.info.require(c.point), batch.lengths) for c in request.captures
        ]
        for patch in request.patches:
            if (site := patch.point.site) not in _CHANGEABLE:
                change = ", ".join(_CHANGEABLE)
                raise CapabilityError(f"The point {site!r} can be read but not changed; change one of {change}.")
        self.residuals: dict[int, Tensor] = {}
        self._pad(batch, model.module.get_input_embeddings().weight.device)

    def _pad(self, batch: Batch, device: torch.device) -> None:
        longest = max(batch.lengths)
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        for row, text in zip(ids, batch, strict=True):
            row[: len(text)] = torch.tensor(text.ids)
        self.ids = ids.to(device)
        keep = [i * longest + t for i, n in enumerate(batch.lengths) for t in range(n)]
        self.keep = None if len(keep) == ids.numel() else torch.tensor(keep, device=device)

    def run(self) -> list[Partial]:
        """Run the model once and return one partial per capture."""
        attention = [r for r in self.recorders if r.reducer.reads == "attention"]
        watched = frozenset(layer for r in attention for layer in r.layers)

        def on_block(layer: int, block: AttentionBlock) -> None:
            for recorder in attention:
                if recorder.wants(layer):
                    recorder.attention(layer, block)

        module = self.model.module
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluating(module))
            stack.enter_context(watching(module, watched, self.batch.lengths, on_block))
            stack.enter_context(self._hooks())
            # Texts are padded on the right, where causal attention never looks: no mask is needed.
            module.base_model(input_ids=self.ids, use_cache=False)
        with torch.no_grad():
            self._readout()
        for recorder in self.recorders:
            recorder.leave()
        return [r.close(self.batch.index) for r in self.recorders]

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles: list[Any] = []
        try:
            # Patches come first, so that what is captured is what the rest of the model sees.
            for patch in self.request.patches:
                for layer in self.info.require(patch.point):
                    handles.append(self._tap(patch.point.site, layer, self._edit(patch)))
            for recorder in self.recorders:
                if recorder.reducer.reads == "rows" and recorder.point.site != "logits":
                    for layer in recorder.layers:
                        handles.append(self._tap(recorder.point.site, layer, self._show(recorder, layer)))
            for layer in self._held_layers():
                handles.append(self._tap("resid_post", layer, self._hold(layer)))
            if self.progress is not None:
                work = 2e-9 * self.batch.n_tokens * self.info.n_params / self.info.n_layers
                for layer in range(self.info.n_layers):
                    handles.append(self._tap("resid_post", layer, self._tell(work)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _tap(self, site: str, layer: int, see: See) -> Any:
        part, side = _TAPS[site]
        module = self._module(part, layer)
        if side == "output":
            return module.register_forward_hook(_output_hook(see))
        return module.register_forward_pre_hook(_input_hook(see), with_kwargs=True)

    def _module(self, part: str, layer: int) -> nn.Module:
        if part == "embedding":
            return self.model.module.get_input_embeddings()
        if part == "block":
            return self.model.part("", layer)
        path = getattr(self.model.architecture, part)
        return self.model.part(path) if part == "final_norm" else self.model.part(path, layer)

    def _pack(self, values: Tensor) -> Tensor:
        flat = values.flatten(0, 1)
        return flat if self.keep is None else flat[self.keep.to(flat.device)]

    def _show(self, recorder: Recorder, layer: int) -> See:
        return lambda values: recorder.rows(layer, Rows(self._pack(values), self.batch.lengths))

    def _hold(self, layer: int) -> See:
        def hold(values: Tensor) -> None:
            self.residuals[layer] = self._pack(values)

        return hold

    def _tell(self, work: float) -> See:
        def tell(_: Tensor) -> None:
            if self.progress is not None:
                self.progress(work)

        return tell

    def _edit(self, patch: Patch) -> See:
        def edit(values: Tensor) -> Tensor:
            if patch.positions is None:
                return values * patch.scale
            changed = values.clone()
            for i, n in enumerate(self.batch.lengths):
                at = [p % n for p in patch.positions]
                changed[i, at] = changed[i, at] * patch.scale
            return changed

        return edit

    def _held_layers(self) -> list[int]:
        """Blocks whose output the readout needs after the run."""
        vocab = [r for r in self.recorders if r.reducer.reads == "vocab"]
        layers = {layer for r in vocab if r.point.site == "resid_post" for layer in r.layers}
        if vocab or any(r.point.site == "logits" for r in self.recorders):
            layers.add(self.info.n_layers - 1)
        return sorted(layers)

    def _readout(self) -> None:
        last, unembed = self.info.n_layers - 1, self.model.unembed
        for recorder in self.recorders:
            if recorder.point.site == "logits" and recorder.reducer.reads == "rows":
                rows = self.residuals[last]
                logits = rows.new_empty((len(rows), self.info.d_vocab), dtype=torch.float32)
                recorder.rows(0, Rows(project(rows, unembed, logits), self.batch.lengths))
        vocab = [r for r in self.recorders if r.reducer.reads == "vocab"]
        if not vocab:
            return
        row_work, tell = 2e-9 * self.info.d_model * self.info.d_vocab, self.progress
        on_cpu = self.residuals[last].device.type == "cpu"
        (stream_readout if on_cpu else stream_readout_tiles)(
            self.residuals,
            last,
            torch.as_tensor(self.batch.next_ids, device=self.residuals[last].device),
            unembed,
            [r for r in vocab if r.point.site == "resid_post"],
            [r for r in vocab if r.point.site == "logits"],
            None if tell is None else (lambda rows: tell(row_work * rows)),
        )


def _reducer(spec: Any) -> Reducer:
    assert isinstance(spec, Reducer), spec
    return spec


def _output_hook(see: See) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        values = output[0] if isinstance(output, tuple) else output
        changed = see(values)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def _input_hook(see: See) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = see(args[0] if args else kwargs["hidden_states"])
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

    return hook


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every sub-module is in the mode it was in."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True

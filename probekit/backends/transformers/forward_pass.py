"""One forward pass: hooks in, model run, readout, hooks out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from probekit.backends.capture_pass import CapturePass, Tap, through
from probekit.core import Batch, Forward, Progress
from probekit.reduce import Partial

from .attention_switch import Watch, watching

if TYPE_CHECKING:
    from .model import TransformersModel

HEAD_SITES = frozenset({"q", "k", "v", "z"})  # inside the attention function, not at a module's edge


def run_pass(model: TransformersModel, request: Forward, batch: Batch, progress: Progress | None) -> list[Partial]:
    """Run the model once and return one partial per capture.

    Args:
        model: the model.
        request: captures and patches.
        batch: the texts.
        progress: is told the work done, in GFLOP.
    """
    module = model.module
    want = CapturePass(model, request, batch, progress, module.get_input_embeddings().weight.device)
    taps = want.taps()
    inside = {place: some for place, some in taps.items() if place[0] in HEAD_SITES}
    gradient = request.gradient_of is not None
    watch = Watch(want.watched, batch.lengths, want.on_block, taps=inside, cuts=want.cuts)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad() if gradient else torch.no_grad())
        stack.enter_context(evaluating(module))
        stack.enter_context(watching(module, watch))
        stack.enter_context(_hooks(model, {p: some for p, some in taps.items() if p not in inside}, gradient))
        module.base_model(input_ids=want.ids, use_cache=False)
        return want.finish()


@contextmanager
def _hooks(model: TransformersModel, taps: dict[tuple[str, int], list[Tap]], gradient: bool) -> Iterator[None]:
    handles: list[Any] = []
    try:
        if gradient:
            handles.append(model.module.get_input_embeddings().register_forward_hook(_output_hook(_differentiable)))
        for (site, layer), some in taps.items():
            handles.append(_hook(model, site, layer, some))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(model: TransformersModel, site: str, layer: int, taps: list[Tap]) -> Any:
    path, side = model.architecture.taps[site]
    module = model.module.get_input_embeddings() if site == "embed" else model.part(path, _layer(site, layer))
    if side == "output":
        return module.register_forward_hook(_output_hook(lambda values: through(taps, values)))
    return module.register_forward_pre_hook(_input_hook(lambda values: through(taps, values)), with_kwargs=True)


def _layer(site: str, layer: int) -> int | None:
    return None if site == "final_norm" else layer


def _differentiable(values: Tensor) -> Tensor:
    # The weights may be frozen; the activations are differentiable all the same.
    return values if values.requires_grad else values.detach().requires_grad_()


def _output_hook(see: Tap) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        values = output[0] if isinstance(output, tuple) else output
        changed = see(values)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def _input_hook(see: Tap) -> Callable[..., Any]:
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

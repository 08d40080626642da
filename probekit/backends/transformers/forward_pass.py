"""One forward pass: hooks in, model run, readout, hooks out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from probekit.backends.block_taps import Tap
from probekit.backends.capture_pass import CapturePass, through
from probekit.core import Batch, CapabilityError, Forward, Progress
from probekit.reduce import Partial

from .attention_routes import routed
from .attention_switch import Watch, watching
from .weights import input_device

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
    want = CapturePass(model, request, batch, progress, input_device(module), reorders=True)
    taps = want.taps()
    inside = {place: some for place, some in taps.items() if place[0] in HEAD_SITES}
    gradient = request.gradient_of is not None
    watch = Watch(want.watched, batch.lengths, want.on_block, taps=inside, cuts=want.cuts, scores=want.wants_scores)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad() if gradient else torch.no_grad())
        stack.enter_context(evaluating(module))
        stack.enter_context(looking(model, watch))
        outside = {p: some for p, some in taps.items() if p not in inside}
        stack.enter_context(hooked(model, outside, gradient, len(batch)))
        stack.enter_context(reordered(module.get_submodule(model.architecture.layers), request.order))
        module.base_model(input_ids=want.ids, use_cache=False)
        return want.finish()


@contextmanager
def reordered(blocks: Any, order: tuple[int, ...] | None) -> Iterator[None]:
    """Let another block run in some places, on what the place receives; afterwards each runs in its own.

    What a place hands to its block (mask, rotary angles) stays with the place, as if the blocks' weights had been
    exchanged.

    Args:
        blocks: the list of blocks.
        order: the block that runs in each place; None for their own order.
    """
    own = {i: vars(block).get("forward") for i, block in enumerate(blocks)}
    runs = [block.forward for block in blocks]
    moved = [] if order is None else [(place, block) for place, block in enumerate(order) if place != block]
    try:
        for place, block in moved:
            blocks[place].forward = runs[block]
        yield
    finally:
        for place, _ in moved:
            if own[place] is None:
                del blocks[place].forward
            else:
                blocks[place].forward = own[place]


def looking(model: TransformersModel, watch: Watch) -> AbstractContextManager[None]:
    """Let `watch` see into the model's attention while the block runs, whichever way this family's goes."""
    route = model.architecture.route
    if route is None:
        return watching(model.module, watch)
    return routed(model.module.get_submodule(model.architecture.layers), route, watch)


@contextmanager
def hooked(
    model: TransformersModel, taps: dict[tuple[str, int], list[Tap]], gradient: bool, n_texts: int
) -> Iterator[None]:
    """Call the taps while the block runs; afterwards no hook of theirs is left.

    Args:
        model: the model.
        taps: by site and layer, for sites at a module's edge.
        gradient: whether activations have to be differentiable, frozen weights or not.
        n_texts: texts that run together.
    """
    handles: list[Any] = []
    try:
        if gradient:
            handles.append(model.module.get_input_embeddings().register_forward_hook(_output_hook(_differentiable)))
        for (site, layer), some in taps.items():
            handles.append(_hook(model, site, layer, some, n_texts))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(model: TransformersModel, site: str, layer: int, taps: list[Tap], n_texts: int) -> Any:
    path, side = model.architecture.taps[site]
    if site == "router":
        return _router(model, path, layer).register_forward_hook(_router_hook(taps, n_texts))
    module = model.module.get_input_embeddings() if site == "embed" else model.part(path, _layer(site, layer))
    if side == "output":
        return module.register_forward_hook(_output_hook(lambda values: _by_text(taps, values, n_texts)))
    see = _input_hook(lambda values: _by_text(taps, values, n_texts))
    return module.register_forward_pre_hook(see, with_kwargs=True)


def _by_text(taps: list[Tap], values: Tensor, n_texts: int) -> Tensor | None:
    """What the taps make of an activation, also where a family lays its texts end to end (OPT's MLP)."""
    if values.ndim != 2:
        return through(taps, values)
    changed = through(taps, values.unflatten(0, (n_texts, -1)))
    return None if changed is None else changed.flatten(0, 1)


def _router(model: TransformersModel, path: str, layer: int) -> nn.Module:
    blocks = model.module.get_submodule(model.architecture.layers)
    have = [i for i, block in enumerate(blocks) if any(name == path for name, _ in block.named_modules())]
    if layer not in have:
        raise CapabilityError(
            f"Layer {layer} of {model.info.name!r} has a plain MLP and no router; layers with one: "
            f"{', '.join(map(str, have)) or 'none'}. Name such a layer, as in 'router.{(have or [0])[0]}'."
        )
    return model.part(path, layer)


def _router_hook(taps: list[Tap], n_texts: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
        _by_text(taps, output[0].float().softmax(-1), n_texts)

    return hook


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

"""The hook points of a bridge: which of them show probekit's sites, and how a pass looks through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probekit.backends.block_taps import Tap
from probekit.backends.capture_pass import CapturePass, through
from probekit.backends.edits import Cut
from probekit.backends.self_check import N_TOKENS
from probekit.backends.transformers.forward_pass import evaluating
from probekit.core import SITES, ModelInfo
from probekit.reduce.attention_blocks import AttentionBlock
from probekit.reduce.sizes import BLOCK

SCORES = "scores"  # not a site: attention scores before the softmax, where edges are knocked out
# By site: the hook points that may show it; the first that the bridge has in every layer is tried.
HOOKS: dict[str, tuple[str, ...]] = {
    "embed": ("embed.hook_out",),
    "resid_pre": ("blocks.{L}.hook_in",),
    "resid_mid": ("blocks.{L}.hook_resid_mid",),
    "resid_post": ("blocks.{L}.hook_out",),
    "attn_out": ("blocks.{L}.attn.hook_out",),
    "mlp_out": ("blocks.{L}.mlp.hook_out",),
    "mlp_act": ("blocks.{L}.mlp.out.hook_in",),
    "q": ("blocks.{L}.attn.hook_rot_q", "blocks.{L}.attn.hook_q"),
    "k": ("blocks.{L}.attn.hook_rot_k", "blocks.{L}.attn.hook_k"),
    "v": ("blocks.{L}.attn.hook_v",),
    "z": ("blocks.{L}.attn.hook_z",),
    "pattern": ("blocks.{L}.attn.hook_pattern",),
    SCORES: ("blocks.{L}.attn.hook_attn_scores",),
    "final_norm": ("ln_final.hook_out",),
}
# Components whose output, as their parent reads it, has to be what the hook point shows.
_OUTPUTS = {"embed": "embed", "attn_out": "blocks.{L}.attn", "mlp_out": "blocks.{L}.mlp", "final_norm": "ln_final"}
# What a pass leaves behind in a bridge's components.
_KEPT = ("_pattern", "_attn_scores", "_fired_hook_out", "_suppress_next_hook_in", "_current_batch_size")
_SAME = {"float32": 1e-3, "float64": 1e-6}  # relative to the largest entry; 5e-2 in half precision


def add_hook(stack: ExitStack, bridge: Any, name: str, see: Tap) -> None:
    """Let `see` look through a hook point, and change what it shows, until the stack closes."""
    point = bridge.hook_dict[name]
    handle = point.add_hook(lambda values, hook: see(values))

    def remove() -> None:
        handle.hook.remove()
        point.fwd_hooks[:] = [h for h in point.fwd_hooks if h is not handle]

    stack.callback(remove)


def add_hooks(stack: ExitStack, bridge: Any, names: dict[str, str], want: CapturePass) -> None:
    """Hook everything that a pass wants into a bridge, until the stack closes.

    Args:
        stack: removes the hooks when it closes.
        bridge: the bridge.
        names: by site, the hook point that shows it.
        want: the pass.
    """
    if want.request.gradient_of is not None:
        add_hook(stack, bridge, names["embed"], _differentiable)
    for (site, layer), taps in want.taps().items():
        add_hook(stack, bridge, names[site].format(L=layer), _seeing(taps))
    for layer, cut in want.cuts.items():
        add_hook(stack, bridge, names[SCORES].format(L=layer), _cutting(cut))
    for layer in sorted(want.watched):
        attention = bridge.blocks[layer].attn
        masks: list[Tensor | None] = []
        handle = attention.register_forward_pre_hook(_mask_to(masks), with_kwargs=True)
        stack.callback(handle.remove)
        add_hook(stack, bridge, names["pattern"].format(L=layer), _showing(want, layer, masks, attention))


def _differentiable(values: Tensor) -> Tensor:
    # The weights may be frozen; the activations are differentiable all the same.
    return values if values.requires_grad else values.detach().requires_grad_()


def _seeing(taps: Sequence[Tap]) -> Tap:
    return lambda values: through(taps, values)


def _cutting(cut: Cut) -> Tap:
    def knock_out(scores: Tensor) -> Tensor:
        changed = scores.to(torch.float32, copy=True)
        cut(changed, slice(0, changed.shape[1]), 0)
        return changed.to(scores.dtype)

    return knock_out


def _mask_to(masks: list[Tensor | None]) -> Callable[..., None]:
    def see(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        masks[:] = [kwargs.get("attention_mask")]

    return see


def _showing(want: CapturePass, layer: int, masks: list[Tensor | None], attention: Any) -> Tap:
    has_sink = getattr(attention.original_component, "sinks", None) is not None

    def show(pattern: Tensor) -> None:
        visible = _visible(masks[0], pattern)
        for start in range(0, pattern.shape[2], BLOCK):
            stop = min(start + BLOCK, pattern.shape[2])
            probs = pattern[:, :, start:stop, :stop].to(torch.float32, copy=True)
            entropy = torch.special.entr(probs).sum(-1)
            if has_sink:  # what is left of a row goes to the learned sink, one more outcome
                entropy += torch.special.entr((1 - probs.sum(-1)).clamp(0, 1))
            largest = probs.amax(-1)
            for i, n in enumerate(want.batch.lengths):
                probs[i, :, max(0, n - start) :] = 0
            seen = None if visible is None else visible[:, start:stop, :stop]
            want.on_block(layer, AttentionBlock(probs, entropy, largest, start, want.batch.lengths, seen))

    return show


def _visible(mask: Tensor | None, pattern: Tensor) -> Tensor | None:
    """Axes text (or 1), query, key: which pairs the mask allows; None for plain causal attention."""
    if mask is None or mask.ndim != 4:
        return None
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    allowed = allowed[:, 0, :, : pattern.shape[-1]]
    causal = torch.ones(pattern.shape[2:], dtype=torch.bool, device=allowed.device).tril()
    return None if bool((allowed == causal).all()) else allowed


@contextmanager
def as_found(bridge: Any) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards modes and what components keep of a pass are as they were."""
    with evaluating(bridge), evaluating(bridge.original_model):
        before = [(part, {k: part.__dict__[k] for k in _KEPT if k in part.__dict__}) for part in bridge.modules()]
        # A block hooks its norms when it first runs.
        unwired = [part for part, _ in before if getattr(part, "_capture_hooks_wired", None) is False]
        try:
            yield
        finally:
            for part in unwired:
                part._teardown_capture_hooks()
            for part, kept in before:
                for name in _KEPT:
                    part.__dict__.pop(name, None)
                part.__dict__.update(kept)


def served(bridge: Any, info: ModelInfo) -> dict[str, str]:
    """Hook points by site, for those sites that this bridge shows as probekit means them; and for the scores.

    A short text runs, and a hook point is left out unless it fires once per layer with the site's shape and
    - embed, attn_out, mlp_out, final_norm: shows what the component hands to its parent (some families show
      what arrives in the residual stream instead);
    - scores: the softmax over them is the pattern (in some families they are something else);
    - v, z: the pattern times the values is z;
    - q, k: their products, times one factor and through a soft-cap if there is one, are the scores (no rotation,
      norm or bias is missing).

    Args:
        bridge: the bridge.
        info: its sizes.
    """
    names = {site: _name(bridge, site, info.n_layers) for site in HOOKS}
    shown: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}
    device = bridge.original_model.get_input_embeddings().weight.device
    ids = torch.tensor(np.linspace(0, min(info.d_vocab, 20_000) - 1, N_TOKENS).astype(int), device=device)[None]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(as_found(bridge))
        for site, name in names.items():
            for layer in _layers(site, info) if name else ():
                add_hook(stack, bridge, str(name).format(L=layer), _into(shown.setdefault(site, [])))
        for site, path in _OUTPUTS.items():
            for layer in _layers(site, info) if names[site] else ():
                part = bridge.get_submodule(path.format(L=layer))
                handle = part.register_forward_hook(_output_into(outputs, site))
                stack.callback(handle.remove)
        bridge.original_model.base_model(input_ids=ids, use_cache=False)
    kept = {site for site, values in shown.items() if _fits(site, values, info)}
    same = _Same(_SAME.get(info.dtype, 5e-2))
    for site in kept & outputs.keys():  # a component that only groups others never runs, and has no output
        pairs = list(zip(shown[site], outputs[site], strict=False))
        if len(pairs) < len(shown[site]) or not all(same(a, b) for a, b in pairs):
            kept.discard(site)
    kept -= _contradicted(bridge, shown, kept, same)
    return {site: str(names[site]) for site in HOOKS if site in kept}


def _layers(site: str, info: ModelInfo) -> range:
    return range(info.n_layers if site == SCORES or SITES[site].layered else 1)


def _name(bridge: Any, site: str, n_layers: int) -> str | None:
    known = bridge.hook_dict
    return next((n for n in HOOKS[site] if all(n.format(L=i) in known for i in range(n_layers))), None)


def _into(values: list[Tensor]) -> Tap:
    return lambda x: values.append(x.detach().clone())


def _output_into(outputs: dict[str, list[Tensor]], site: str) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.setdefault(site, []).append((output[0] if isinstance(output, tuple) else output).detach().clone())

    return keep


def _fits(site: str, values: list[Tensor], info: ModelInfo) -> bool:
    n_heads = info.n_kv_heads if site in ("k", "v") else info.n_heads
    sizes = {"token": N_TOKENS, "d_model": info.d_model, "d_mlp": info.d_mlp, "d_head": info.d_head}
    sizes |= {"head": n_heads, "query": N_TOKENS, "key": N_TOKENS}
    shape = (1, *(sizes[d] for d in SITES["pattern" if site == SCORES else site].dims))
    return len(values) == len(_layers(site, info)) and all(tuple(v.shape) == shape for v in values)


def _contradicted(bridge: Any, shown: dict[str, list[Tensor]], kept: set[str], same: _Same) -> set[str]:
    """Sites inside attention whose tensors are not what the layer's pattern is made of, or makes."""
    wrong: set[str] = set() if "pattern" in kept else {"q", "k", "v", "z", SCORES}
    for layer, block in enumerate(bridge.blocks):
        found = {s: shown[s][layer][0].double() for s in kept & {"q", "k", "v", "z", "pattern", SCORES} - wrong}
        heads_first = {s: x.transpose(0, 1) for s, x in found.items() if s in ("q", "k", "v", "z")}
        if "pattern" in found and not {"v", "z"} <= heads_first.keys():
            wrong |= {"v", "z"}
        elif "pattern" in found:
            group = len(found["pattern"]) // len(heads_first["v"])
            mixed = found["pattern"] @ heads_first["v"].repeat_interleave(group, 0)
            wrong |= set() if same(mixed, heads_first["z"]) else {"v", "z"}
        if SCORES in found:
            pattern = found["pattern"] / found["pattern"].sum(-1, keepdim=True)  # a learned sink takes a share
            wrong |= set() if same(found[SCORES].softmax(-1), pattern) else {SCORES, "q", "k"}
        if not {SCORES, "q", "k"} <= found.keys() - wrong:
            wrong |= {"q", "k"}
            continue
        group = len(heads_first["q"]) // len(heads_first["k"])
        products = heads_first["q"] @ heads_first["k"].repeat_interleave(group, 0).transpose(1, 2)
        visible = shown[SCORES][layer][0] > torch.finfo(shown[SCORES][layer].dtype).min / 2
        x, y = products[visible], found[SCORES][visible]
        cap = getattr(block.attn.original_component, "attn_logit_softcapping", None)
        if cap is None:
            expected = x * (x @ y) / (x @ x)
        else:
            expected = cap * torch.tanh(x * block.attn.original_component.scaling / cap)
        wrong |= set() if same(expected, y) else {"q", "k"}
    return wrong


class _Same:
    """Whether two tensors are equal within a share of the largest entry."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance

    def __call__(self, a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and bool((a - b).abs().max() <= self.tolerance * b.abs().max())

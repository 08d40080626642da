"""Named places in the forward pass, in every spelling the field uses.

A `Point` is a site (`resid_post`) and a layer. The canonical spelling is `resid_post.3`; without
a layer (`resid_post`) a layered site means every layer. TransformerLens spellings
(`blocks.3.hook_resid_post`, `("resid_post", 3)`) and nnterp spellings (`layers_output[3]`) resolve
to the same points. `attn_out` and `mlp_out` are the raw outputs of the sub-layers, before a
post-norm where a model has one (nnterp's convention; TransformerLens' block-level
`hook_attn_out` is the contribution after it, and the two differ on sandwich-norm models).

`router` is the softmax, in float32, over the logits of all experts, before the top-k cut; the experts
that run are its top-k in every family. The weights they run with differ: Mixtral, gpt-oss (a softmax
over the chosen logits, which comes to the same), and Qwen-MoE and OLMoE with `norm_topk_prob`, divide
the chosen probabilities by their sum; Qwen-MoE and OLMoE without it take them as they are. A bias of the router, as in gpt-oss, is part of its logits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import InputError, unknown


@dataclass(frozen=True)
class Site:
    """One kind of place: whether it repeats per layer, its axes and what it holds."""

    layered: bool
    dims: tuple[str, ...]
    help: str


SITES: dict[str, Site] = {
    "embed": Site(False, ("token", "d_model"), "output of the token embedding"),
    "resid_pre": Site(True, ("token", "d_model"), "residual stream entering the block"),
    "resid_mid": Site(True, ("token", "d_model"), "residual stream between attention and MLP"),
    "resid_post": Site(True, ("token", "d_model"), "residual stream leaving the block, before any final norm"),
    "attn_out": Site(True, ("token", "d_model"), "output of the attention sub-layer"),
    "mlp_out": Site(True, ("token", "d_model"), "output of the MLP sub-layer"),
    "mlp_act": Site(
        True, ("token", "d_mlp"), "what the MLP's last projection reads: the gated or activated hidden units"
    ),
    "router": Site(True, ("token", "expert"), "routing probabilities of a mixture of experts, before the top-k cut"),
    "q": Site(True, ("token", "head", "d_head"), "queries as attention uses them, after rotary embedding and norms"),
    "k": Site(True, ("token", "head", "d_head"), "keys as attention uses them; key-value heads"),
    "v": Site(True, ("token", "head", "d_head"), "values; key-value heads"),
    "z": Site(True, ("token", "head", "d_head"), "per-head attention output before the output projection"),
    "pattern": Site(True, ("head", "query", "key"), "attention probabilities"),
    "final_norm": Site(False, ("token", "d_model"), "output of the final norm, gain included"),
    "logits": Site(False, ("token", "vocab"), "next-token logits as the model returns them"),
}

# Other tools' spellings. `{L}` stands for the layer.
_ALIASES: dict[str, str] = {
    "hook_embed": "embed",
    "embed.hook_out": "embed",
    "token_embeddings": "embed",
    "blocks.{L}.hook_resid_pre": "resid_pre",
    "blocks.{L}.hook_in": "resid_pre",
    "layers_input[{L}]": "resid_pre",
    "blocks.{L}.hook_resid_mid": "resid_mid",
    "blocks.{L}.ln2.hook_in": "resid_mid",
    "blocks.{L}.hook_resid_post": "resid_post",
    "blocks.{L}.hook_out": "resid_post",
    "layers_output[{L}]": "resid_post",
    "blocks.{L}.attn.hook_out": "attn_out",
    "attentions_output[{L}]": "attn_out",
    "blocks.{L}.mlp.hook_out": "mlp_out",
    "mlps_output[{L}]": "mlp_out",
    "blocks.{L}.mlp.hook_post": "mlp_act",
    "blocks.{L}.attn.hook_q": "q",
    "blocks.{L}.attn.hook_k": "k",
    "blocks.{L}.attn.hook_v": "v",
    "blocks.{L}.attn.hook_z": "z",
    "blocks.{L}.attn.hook_pattern": "pattern",
    "attention_probabilities[{L}]": "pattern",
    "ln_final.hook_out": "final_norm",
    "ln_final.output": "final_norm",
    "unembed.hook_out": "logits",
}
_TRAPS: dict[str, str] = {
    "ln_final.hook_normalized": (
        "In TransformerLens it is the normalised stream before the gain; probekit's `final_norm` includes the gain "
        "(TransformerLens: `ln_final.hook_out`)."
    ),
    "blocks.{L}.hook_attn_out": (
        "In TransformerLens it is the contribution after a post-norm; probekit's `attn_out` is the sub-layer's raw "
        "output (TransformerLens: `blocks.L.attn.hook_out`)."
    ),
    "blocks.{L}.hook_mlp_out": (
        "In TransformerLens it is the contribution after a post-norm; probekit's `mlp_out` is the sub-layer's raw "
        "output (TransformerLens: `blocks.L.mlp.hook_out`)."
    ),
}


@dataclass(frozen=True, order=True)
class Point:
    """A place in the forward pass.

    Args:
        site: a name from `SITES`.
        layer: the block, counted from 0 (negative from the end), or None for every layer of a layered site.
    """

    site: str
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise unknown("point", self.site, SITES)
        if self.layer is not None and not SITES[self.site].layered:
            raise InputError(f"The point {self.site!r} exists once, not per layer; found layer {self.layer}.")

    def __str__(self) -> str:
        return self.site if self.layer is None else f"{self.site}.{self.layer}"

    @classmethod
    def of(cls, spelling: str | tuple[str, int] | Point) -> Point:
        """The point that a spelling names.

        Raises:
            UnknownName: no tool that probekit knows spells a point like this.
            InputError: the spelling means something else in its own tool.
        """
        if isinstance(spelling, Point):
            return spelling
        if isinstance(spelling, tuple) and len(spelling) == 2:
            site, layer = spelling
            return cls(cls.of(site).site, int(layer))
        if not isinstance(spelling, str):
            raise InputError(
                f"Found {spelling!r} where a point is needed; expected 'resid_post.3', ('resid_post', 3), or the way "
                "TransformerLens or nnterp spell it."
            )
        if spelling in SITES:
            return cls(spelling)
        site, _, number = spelling.rpartition(".")
        if site in SITES and re.fullmatch(r"-?\d+", number):
            return cls(site, int(number))
        layers = re.findall(r"(?<=[.\[])-?\d+(?=[.\]])", spelling)
        pattern = re.sub(r"(?<=[.\[])-?\d+(?=[.\]])", "{L}", spelling)
        if pattern in _TRAPS:
            raise InputError(f"{spelling!r} has no exact twin among probekit's points. {_TRAPS[pattern]}")
        if pattern in _ALIASES:
            return cls(_ALIASES[pattern], int(layers[0]) if layers else None)
        raise unknown("point", spelling, [*SITES, *_ALIASES])

    def layers(self, n_layers: int) -> tuple[int, ...]:
        """The layers this point stands for in a model of `n_layers`; (0,) for a site that exists once.

        Raises:
            InputError: the layer is outside the model.
        """
        if not SITES[self.site].layered:
            return (0,)
        if self.layer is None:
            return tuple(range(n_layers))
        if not -n_layers <= self.layer < n_layers:
            raise InputError(
                f"Layer {self.layer} of {self.site!r} is outside this model: it has {n_layers} layers, "
                f"0 to {n_layers - 1} (or {-n_layers} to -1 from the end)."
            )
        return (self.layer % n_layers,)

"""Building a TransformerLens bridge without changing the model it shares its weights with, and checking one."""

from __future__ import annotations

import copy
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probekit.core import ModelError

_INSIDE = "holds a decoder inside a larger model; expected the decoder by itself."
_TORCH_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)


def build_bridge(module: Any, tokenizer: Any, name: str) -> Any:
    """A `TransformerBridge` around the weights of a transformers model, which stays as it is.

    TransformerLens puts its components in the place of the modules it wraps and switches them to eager
    attention, so the bridge gets modules of its own; their weights are the very same tensors, and take no
    memory twice. Works offline.

    Args:
        module: a loaded causal model.
        tokenizer: its tokenizer; the bridge gets a copy, which TransformerLens adapts.
        name: what the bridge calls its model.

    Raises:
        ModelError: TransformerLens is not installed, or does not know this architecture.
    """
    build = _library().build_bridge_from_module
    architecture = type(module).__name__
    if module.config.get_text_config() is not module.config:
        raise ModelError(f"{name!r} ({architecture}) {_INSIDE}")
    with tempfile.TemporaryDirectory() as folder:
        # TransformerLens reads a tokenizer anew from where it came from; one that was made in memory came from nowhere.
        tokenizer.save_pretrained(folder)
        own = type(tokenizer).from_pretrained(folder, local_files_only=True)
        copied = _sharing_copy(module)
        copied.set_attn_implementation("eager")  # the only one whose probabilities a bridge shows
        # Not `boot_transformers`: that also looks for processors of images and sound, and installs packages for them.
        try:
            return build(copied, architecture, hf_config=copied.config, tokenizer=own, model_name=name)
        except (ValueError, AttributeError, RuntimeError, KeyError) as error:
            why = str(error).partition(" Available architectures")[0]
            raise ModelError(
                f"TransformerLens cannot build a bridge around {name!r} ({architecture}): {why} "
                "Open it with probekit's own backend instead."
            ) from error


def _library() -> Any:
    try:
        import transformer_lens.model_bridge.sources
    except ImportError as error:
        raise ModelError(
            f"The TransformerLens backend needs transformer-lens 4.3 or newer, which cannot be imported ({error}). "
            "Install it with: pip install 'probekit[compare]'"
        ) from error
    return transformer_lens.model_bridge.sources


def _sharing_copy(module: Any) -> Any:
    """Modules and a configuration of its own on the very same parameters and buffers, without anybody's hooks."""
    memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    for part in module.modules():
        for hooks in _TORCH_HOOKS:
            if isinstance(found := part.__dict__.get(hooks), dict):
                memo[id(found)] = OrderedDict()
    return copy.deepcopy(module, memo)


def check_bridge(bridge: Any) -> None:
    """Refuse a bridge that probekit cannot read.

    Raises:
        ModelError: it holds no decoder of transformers, or it is in compatibility mode, with processed weights.
    """
    module = bridge.original_model
    parts = [p for p in ("embed", "blocks", "ln_final", "unembed", "tokenizer") if getattr(bridge, p, None) is None]
    if parts or not hasattr(module, "base_model") or getattr(module.config, "is_encoder_decoder", False):
        lack = f", without {', '.join(parts)}" if parts else ""
        raise ModelError(
            f"The bridge wraps a {type(module).__name__}{lack}; expected a decoder of transformers with its tokenizer, "
            "as TransformerBridge.boot_transformers(name) wraps it."
        )
    if module.config.get_text_config() is not module.config:
        raise ModelError(f"The bridge wraps a {type(module).__name__}, which {_INSIDE}")
    if getattr(bridge, "compatibility_mode", False):
        raise ModelError(
            "The bridge is in compatibility mode, where TransformerLens folds and centres weights; probekit reads raw "
            "ones. Hand over a bridge on which enable_compatibility_mode() was not called."
        )


def own_weights(bridge: Any) -> Mapping[str, Tensor]:
    """The state dict of the model inside a bridge, under the names that transformers gives its tensors."""
    module = bridge.original_model
    found = {k.replace("._original_component", ""): t for k, t in module.state_dict(keep_vars=True).items()}
    # A bridge adds the same tensors under names of its own, and biases of zeros; a bare model says which are which.
    with torch.device("meta"):
        names = type(module)(copy.deepcopy(module.config)).state_dict()
    return {name: found[name] for name in names}


def added(bridge: Any, site: str, values: np.ndarray) -> np.ndarray:
    """What a sub-layer's raw output adds to the residual stream: after a post-norm and a multiplier, if there are any.

    Args:
        bridge: the bridge.
        site: "attn_out" or "mlp_out".
        values: axes layer, token, d_model.

    Returns:
        Axes layer, token, d_model.
    """
    config = bridge.original_model.config.get_text_config()
    weight = bridge.unembed.original_component.weight
    done = []
    for block, rows in zip(bridge.blocks, torch.as_tensor(values).to(weight), strict=True):
        norm = getattr(block, {"attn_out": "ln1_post", "mlp_out": "ln2_post"}[site], None)
        with torch.no_grad():
            done.append(rows if norm is None else norm.original_component.forward(rows))
    whole: np.ndarray = torch.stack(done).float().cpu().numpy()
    return whole * (getattr(config, "residual_multiplier", None) or 1.0)


class BridgeUnembed:
    """Final norm and unembedding that a bridge wraps, past its hooks."""

    def __init__(self, bridge: Any) -> None:
        head, config = bridge.unembed.original_component, bridge.original_model.config.get_text_config()
        self.weight: Tensor = head.weight
        # A bridge gives an unembedding without bias one of zeros.
        self.bias: Tensor | None = head.bias if head.bias is not None and bool(head.bias.any()) else None
        self._norm = bridge.ln_final.original_component
        self._factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)

    def norm(self, rows: Tensor) -> Tensor:
        """The final norm."""
        return self._norm.forward(rows)

    def finish(self, logits: Tensor) -> Tensor:
        """The model's factor on its logits, and its soft-cap, entry by entry."""
        if self._factor != 1.0:
            logits = logits * self._factor
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

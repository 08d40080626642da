"""Where a model's weights are, and what fixes them: on one device or several, offloaded, or quantised."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probekit.core import ModelError

_FULL_HASH_LIMIT = 4 << 30  # bytes of weights up to which the hash reads every one of them
_SAMPLE = 1 << 16  # entries that the hash reads of each tensor beyond that


def input_device(module: Any) -> torch.device:
    """Where a model reads its token ids; an offloaded embedding's execution device."""
    embedding = module.get_input_embeddings()
    device: torch.device = embedding.weight.device
    if device.type != "meta":
        return device
    hook = next((h for h in _hooks(embedding) if h.execution_device is not None), None)
    return torch.device(getattr(hook, "execution_device", None) or "cpu")


def devices_of(module: nn.Module) -> str:
    """The devices that a model runs on, the first layer's first, such as "cuda:0, cuda:1"; offloaded parts named."""
    placed = getattr(module, "hf_device_map", None) or {}
    if len(set(placed.values())) < 2 and not any(p.device.type == "meta" for p in module.parameters()):
        return str(next(module.parameters()).device)
    found = [f"{p.device}" for p in module.parameters() if p.device.type != "meta"]
    away = [f"offloaded to {d}" for d in placed.values() if str(d) in ("cpu", "disk") and f"{d}" not in found]
    return ", ".join(dict.fromkeys([*found, *away])) or "offloaded"


def resident(module: nn.Module, name: str) -> Tensor:
    """A parameter of a module itself, fetched from where accelerate keeps it if the module is offloaded.

    Args:
        module: the module that holds the parameter.
        name: its name there, such as "weight".

    Raises:
        ModelError: the weights are not there.
    """
    tensor: Tensor = getattr(module, name)
    if tensor.device.type != "meta":
        return tensor
    for hook in _hooks(module):
        if getattr(hook, "weights_map", None) is not None:
            stored: Tensor = hook.weights_map[name]
            device = torch.device(hook.execution_device if hook.execution_device is not None else "cpu")
            return stored.to(device=device, dtype=tensor.dtype)
    raise ModelError(
        f"The weights of {type(module).__name__} are on the device 'meta' and nobody says where they are kept; "
        "load the model with weights, or with a device_map."
    )


def unembedding(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (vocab, d_model) and bias (vocab) of the output embedding, as numbers that the lens can read.

    Raises:
        ModelError: it is quantised: the lens does not read packed numbers.
    """
    weight: Any = getattr(head, "weight", None)
    if _packed(weight) or not weight.is_floating_point() or weight.ndim != 2:
        raise ModelError(
            f"The unembedding ({type(head).__name__}) is quantised, and the lens reads its rows. Quantise the model "
            "without it, which is what transformers does unless told otherwise (modules_to_not_convert=['lm_head'])."
        )
    return resident(head, "weight"), None if getattr(head, "bias", None) is None else resident(head, "bias")


OUTPUT_PROJECTIONS = ("o_proj", "c_proj", "out_proj", "dense")  # what families call it; its input is z


def output_gram(attention: nn.Module, n_heads: int, d_head: int) -> Tensor:
    """W_O^h (W_O^h)^T of each query head, in float32; axes head, d_head, d_head.

    Read off the projection's own answers to unit vectors, so that packed and transposed weights count as they are.

    Args:
        attention: the attention sub-layer, or its output projection itself.
        n_heads: query heads.
        d_head: width of one head.

    Raises:
        ModelError: the sub-layer has no output projection under a known name.
    """
    named = dict(attention.named_children())
    projection = next((named[n] for n in OUTPUT_PROJECTIONS if n in named), None if named else attention)
    if projection is None:
        raise ModelError(
            f"{type(attention).__name__} has no output projection called {', '.join(OUTPUT_PROJECTIONS)}; found "
            f"{', '.join(named)}."
        )
    parameter = next(p for p in attention.parameters() if p.is_floating_point())
    device = "cpu" if parameter.device.type == "meta" else parameter.device
    units = torch.eye(n_heads * d_head, device=device, dtype=parameter.dtype)
    with torch.no_grad():
        rows = projection.forward(units).float() - projection.forward(torch.zeros_like(units[:1])).float()
    by_head = rows.unflatten(0, (n_heads, d_head))
    return by_head @ by_head.transpose(1, 2)


def is_quantised(module: Any) -> bool:
    """Whether weights are packed, so that counting their entries does not count parameters."""
    if getattr(module.config, "quantization_config", None) is not None:
        return True
    return any(_packed(t) for t in module.state_dict(keep_vars=True).values())


def _packed(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.is_quantized or bool(_inner(value))


def state_of(module: nn.Module) -> dict[str, Any]:
    """The state dict, with what stands for an offloaded tensor in place of its empty shell.

    An offloaded tensor is a function that fetches it, so that a model larger than memory is read piece by piece.
    """
    state: dict[str, Any] = dict(module.state_dict(keep_vars=True))
    for name, value in state.items():
        if isinstance(value, Tensor) and value.device.type == "meta":
            path, _, own = name.rpartition(".")
            state[name] = _fetcher(module.get_submodule(path), own)
    return state


def _fetcher(module: nn.Module, name: str) -> Callable[[], Tensor]:
    return lambda: resident(module, name)


def hash_of(weights: Mapping[str, Any]) -> str:
    """sha256 over the names, types, shapes and values of a state dict; over an even sample of each beyond 4 GiB.

    Quantised weights are hashed as they are packed, with their scales; they are never de-quantised.

    Args:
        weights: tensors by name, or functions that fetch them; packed weights in any form torch knows.

    Raises:
        ModelError: something is no tensor and nothing that holds tensors.
    """
    state = dict(sorted(weights.items()))
    sampled = sum(_size(value) for value in state.values()) > _FULL_HASH_LIMIT
    digest = hashlib.sha256()
    for name, value in state.items():
        _add(digest, name, value() if callable(value) and not isinstance(value, Tensor) else value, sampled)
    return f"sha256{'-sample' if sampled else ''}:{digest.hexdigest()}"


def _size(value: Any) -> int:
    if callable(value) and not isinstance(value, Tensor):
        value = value()
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _add(digest: Any, name: str, value: Any, sampled: bool) -> None:
    if isinstance(value, Tensor):
        parts = _parts(value)
        if parts is None:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(_bytes(value, sampled))
            return
        # A packed tensor: what it is made of, and how it is packed.
        digest.update(f"{name} {type(value).__name__} {value.dtype} {tuple(value.shape)}".encode())
        for part, inner in parts:
            _add(digest, f"{name}.{part}", inner, sampled)
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            _add(digest, f"{name}.{i}", item, sampled)
    elif value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.Size, torch.qscheme)):
        digest.update(f"{name} {value!r}".encode())
    else:
        raise ModelError(f"The weight {name!r} is a {type(value).__name__}; expected a tensor, plain or quantised.")


def _parts(tensor: Tensor) -> list[tuple[str, Any]] | None:
    """What a packed tensor is made of; None for a plain one."""
    if tensor.is_quantized:
        per_channel = tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
        scales = (
            [("scale", tensor.q_per_channel_scales()), ("zero", tensor.q_per_channel_zero_points())]
            if per_channel
            else [("scale", tensor.q_scale()), ("zero", tensor.q_zero_point())]
        )
        return [("ints", tensor.int_repr()), ("scheme", tensor.qscheme()), *scales]
    return [(n, getattr(tensor, n)) for n in _inner(tensor)] or None


def _inner(tensor: Tensor) -> list[str]:
    """Names of the tensors that a packed tensor (of torchao, quanto, …) is made of; empty for a plain one."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return [] if flatten is None else list(flatten()[0])


def _bytes(tensor: Tensor, sampled: bool) -> np.ndarray:
    flat = tensor.detach().flatten()
    if sampled and flat.numel() > _SAMPLE:
        flat = flat[:: flat.numel() // _SAMPLE]
    return flat.contiguous().cpu().view(torch.uint8).numpy()


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks that accelerate put on a module to place its weights."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))

"""The weights of a lens: read once per process, moved to where the rows are."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from probekit.core import InputError

from .base import Recorder
from .lens import LensRef, file_hash
from .vocab_rows import Translate


@dataclass(frozen=True)
class LensWeights:
    """The matrices of a lens in float32, by the block whose output they read.

    Args:
        matrices: axes d_model out, d_model in; A of h + A h + b, or J of J h.
        biases: axis d_model; empty for a lens without.
        residual: whether the row itself is added, as a tuned lens does.
    """

    matrices: Mapping[int, Tensor]
    biases: Mapping[int, Tensor]
    residual: bool

    def translate(self, layer: int, rows: Tensor) -> Tensor:
        """Rows as the final norm reads them, in their own type; unchanged where the lens has no matrix.

        Args:
            layer: the block that they leave.
            rows: axes …, d_model.
        """
        if layer not in self.matrices:
            return rows
        exact = rows.float()
        # A product is not exactly zero by a matrix of zeros where a row is not finite; rows are.
        made = exact @ self.matrices[layer].T
        if self.residual:
            made += exact
        if layer in self.biases:
            made += self.biases[layer]
        return made.to(rows.dtype)

    def to(self, device: torch.device) -> LensWeights:
        """The same on another device."""
        matrices = {i: t.to(device) for i, t in self.matrices.items()}
        return LensWeights(matrices, {i: t.to(device) for i, t in self.biases.items()}, self.residual)


def weights_of(lens: LensRef, device: torch.device) -> LensWeights:
    """The weights of a lens, on a device; read once per process.

    Raises:
        InputError: the file is missing, damaged or another one than the reference names.
    """
    return _on_device(lens, device.type, device.index)


@functools.lru_cache(maxsize=4)
def _on_device(lens: LensRef, kind: str, index: int | None) -> LensWeights:
    device = torch.device(kind) if index is None else torch.device(kind, index)
    return _read(lens) if kind == "cpu" else _read(lens).to(device)


@functools.lru_cache(maxsize=4)
def _read(lens: LensRef) -> LensWeights:
    if file_hash(Path(lens.path)) != lens.digest:
        raise InputError(f"{lens.path} has changed since it was named: its hash is not {lens.digest[:12]}….")
    last = max(1, lens.n_layers) - 1
    tuned, biases, matrices = lens.kind == "tuned", {}, {}
    if lens.layout == "jacobian-lens":
        matrices = {int(i): t for i, t in _load(Path(lens.path))["J"].items()}
    elif lens.layout == "tuned-lens":
        # Translator i reads what enters block i; what enters the first one is not read here.
        state = _load(Path(lens.path))
        matrices = {i: _taken(lens, state, f"{i + 1}.weight") for i in range(last)}
        biases = {i: state[f"{i + 1}.bias"] for i in range(last) if f"{i + 1}.bias" in state}
    else:
        try:
            state = load_file(lens.path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{lens.path} cannot be read: {error}.") from error
        matrices = {i: _taken(lens, state, f"{'weight' if tuned else 'jacobian'}.{i}") for i in range(last)}
        biases = {i: state[f"bias.{i}"] for i in range(last) if f"bias.{i}" in state}
    for i, matrix in matrices.items():
        shapes = [tuple(matrix.shape), tuple(biases[i].shape) if i in biases else (lens.d_model,)]
        if shapes != [(lens.d_model, lens.d_model), (lens.d_model,)]:
            raise InputError(
                f"{lens.path}: block {i} has tensors of the shapes {shapes}; expected a width of {lens.d_model}."
            )
        if not (torch.isfinite(matrix).all() and (i not in biases or torch.isfinite(biases[i]).all())):
            raise InputError(f"{lens.path}: block {i} has numbers that are not finite.")
    return LensWeights({i: t.float() for i, t in matrices.items()}, {i: t.float() for i, t in biases.items()}, tuned)


def _taken(lens: LensRef, state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        known = ", ".join(sorted(state)[:6])
        raise InputError(
            f"{lens.path} has no tensor {name!r}; a lens has one for every block but the last. Found {known}, …."
        )
    return state[name]


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"{path} cannot be read as plain tensors ({type(error).__name__}: {line[:200]}).") from error


def jacobian_head(path: Path) -> dict[str, Any]:
    """What a published file of Jacobian matrices says of itself: `d_model`, `layers`, `metadata`.

    Raises:
        InputError: it is no such file.
    """
    return _head(str(path), file_hash(path))


@functools.lru_cache(maxsize=8)
def _head(path: str, digest: str) -> dict[str, Any]:
    found = _load(Path(path))
    if not isinstance(found, dict) or not isinstance(found.get("J"), dict) or "d_model" not in found:
        keys = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise InputError(f"{path} is no file of Jacobian matrices: found {keys[:200]}; expected 'J' and 'd_model'.")
    metadata = found.get("metadata")
    return {
        "d_model": int(found["d_model"]),
        "layers": tuple(int(i) for i in found["J"]),
        "metadata": metadata if isinstance(metadata, dict) else {},
    }


def by_lens(recorders: Sequence[Recorder]) -> dict[LensRef | None, list[Recorder]]:
    """Recorders by the lens that reads for them; None for the logit lens."""
    found: dict[LensRef | None, list[Recorder]] = {}
    for recorder in recorders:
        found.setdefault(getattr(recorder.reducer, "lens", None), []).append(recorder)
    return found


def translation(lens: LensRef | None, device: torch.device) -> Translate | None:
    """What a lens makes of rows; None for the logit lens, which leaves them as they are."""
    return None if lens is None else weights_of(lens, device).translate

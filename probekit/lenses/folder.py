"""Lenses on disk: saved, exported as published, and checkpoints of unfinished training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from probekit.core import InputError, ModelInfo, StoreError
from probekit.reduce.lens import (
    CONFIG,
    FILE_KIND,
    MANIFEST,
    PARAMS,
    TITLES,
    VERSION,
    WEIGHTS,
    Kind,
    LensRef,
    file_hash,
    open_lens,
)
from probekit.reduce.lens_files import weights_of

STATE = "state.pt"


def save_lens(
    folder: str | Path,
    kind: Kind,
    matrices: Mapping[int, Any],
    biases: Mapping[int, Any] | None = None,
    *,
    model: Any,
    training: Mapping[str, Any] | None = None,
) -> LensRef:
    """Write a lens as lens.safetensors and lens.json; a lens that is there already is replaced.

    Args:
        folder: where.
        kind: "tuned" (h + A h + b is read) or "jacobian" (J h is).
        matrices: A or J by block, of every block but the last; axes d_model out, d_model in.
        biases: b by block, of a tuned lens.
        model: the model that it reads, opened by `open_model`; its name and hash become part of the lens.
        training: how it was made, as plain data.

    Raises:
        InputError: matrices are missing or of the wrong size.
        StoreError: the folder holds something else, or cannot be written.
    """
    info: ModelInfo = model.info
    if sorted(matrices) != list(range(info.n_layers - 1)) or kind not in TITLES:
        raise InputError(
            f"A {TITLES.get(kind, kind)} of {info.name!r} has a matrix for each of the blocks 0 to {info.n_layers - 2}; "
            f"found {sorted(matrices)}."
        )
    named = {f"{'weight' if kind == 'tuned' else 'jacobian'}.{i}": m for i, m in matrices.items()}
    named |= {f"bias.{i}": b for i, b in (biases or {}).items()}
    tensors = {name: torch.as_tensor(np.asarray(t), dtype=torch.float32).contiguous() for name, t in named.items()}
    for name, tensor in tensors.items():
        expected = (info.d_model,) if name.startswith("bias") else (info.d_model, info.d_model)
        if tuple(tensor.shape) != expected or not torch.isfinite(tensor).all():
            raise InputError(f"{name} has the shape {tuple(tensor.shape)}; expected {expected}, all numbers finite.")
    folder = Path(folder).expanduser()
    _require_free(folder)
    provenance = model.provenance()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / f".{WEIGHTS}.partial")
        (folder / MANIFEST).unlink(missing_ok=True)  # never a manifest beside another one's weights
        (folder / f".{WEIGHTS}.partial").replace(folder / WEIGHTS)
        manifest = {
            "file": FILE_KIND,
            "version": VERSION,
            "kind": kind,
            "weights": f"sha256:{file_hash(folder / WEIGHTS)}",
            "model": {
                "name": info.name,
                "revision": info.revision,
                "weights_hash": str(provenance.get("weights_hash", "")),
                "tokenizer_hash": str(provenance.get("tokenizer_hash", "")),
                **{k: getattr(info, k) for k in ("architecture", "d_model", "n_layers", "d_vocab", "dtype")},
            },
            "training": dict(training or {}),
        }
        part = folder / f".{MANIFEST}.partial"
        part.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(folder / MANIFEST)
    except OSError as error:
        raise StoreError(f"Cannot write to {folder}: {error.strerror or error}. Choose another path.") from error
    return open_lens(folder)


def _require_free(folder: Path) -> None:
    own = {MANIFEST, WEIGHTS}
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir() if p.name[0] != "."} - own):
        raise StoreError(f"{folder} exists and is no lens that probekit made; choose another folder or remove it.")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What lens.json says.

    Raises:
        InputError: there is none.
    """
    path = Path(folder).expanduser() / MANIFEST
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    return found


def export_lens(lens: LensRef | str | Path, target: str | Path) -> Path:
    """Write a lens as others publish theirs.

    A tuned lens becomes a folder with config.json and params.pt, as AlignmentResearch/tuned-lens reads it. Its
    translator 0, of the stream that enters the first block, is zero (the logit lens): it is not trained here. A Jacobian
    lens becomes one .pt file, as anthropics/jacobian-lens reads it, in float16.

    Args:
        lens: a lens, or what `open_lens` takes.
        target: the folder, or the .pt file; must not exist.

    Returns:
        The target.

    Raises:
        StoreError: the target exists, or cannot be written.
    """
    found = lens if isinstance(lens, LensRef) else open_lens(lens)
    weights, target = weights_of(found, torch.device("cpu")), Path(target).expanduser()
    if target.exists():
        raise StoreError(f"{target} exists; choose another path or remove it.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if found.kind == "jacobian":
            layers = sorted(weights.matrices)
            head = {"n_prompts": 0, "source_layers": layers, "d_model": found.d_model}
            extra = {"metadata": {"model_name": found.model}} if found.model else {}
            torch.save({"J": {i: weights.matrices[i].half() for i in layers}, **head, **extra}, target)
            return target
        target.mkdir()
        zero, none = torch.zeros(found.d_model, found.d_model), torch.zeros(found.d_model)
        state = {"0.weight": zero, "0.bias": none}
        for i, matrix in weights.matrices.items():
            state |= {f"{i + 1}.weight": matrix, f"{i + 1}.bias": weights.biases.get(i, none)}
        torch.save(state, target / PARAMS)
        config = {
            "base_model_name_or_path": found.model,
            "d_model": found.d_model,
            "num_hidden_layers": found.n_layers,
            "bias": True,
            "base_model_revision": found.revision or None,
            "unembed_hash": None,
            "lens_type": "linear_tuned_lens",
        }
        (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise StoreError(f"Cannot write to {target}: {error.strerror or error}. Choose another path.") from error
    return target


class Checkpoint:
    """An unfinished training run, beside the folder that it will fill.

    Args:
        folder: the lens' folder.
        about: everything that the run depends on, as plain data.

    Raises:
        StoreError: `folder` holds something else.
        InputError: an unfinished run of other settings lies there.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any]) -> None:
        self.folder = Path(folder).expanduser().absolute()
        _require_free(self.folder)
        self.part = self.folder.with_name(f".{self.folder.name}.partial")
        self.about = json.loads(json.dumps(dict(about)))
        kept = self._read(self.part / "about.json")
        if kept is not None and kept != self.about:
            differs = sorted(k for k in {*kept, *self.about} if kept.get(k) != self.about.get(k))
            raise InputError(
                f"{self.part} holds an unfinished lens that differs in {', '.join(differs)}. Finish it with the same "
                "settings, or remove this folder, or choose another one for the new lens."
            )

    @staticmethod
    def _read(path: Path) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def read(self) -> dict[str, Any] | None:
        """The state that was kept last; None if there is none."""
        if not (self.part / STATE).is_file():
            return None
        found: dict[str, Any] = torch.load(self.part / STATE, weights_only=True)
        return found

    def write(self, state: Mapping[str, Any]) -> None:
        """Keep a state, in place of the last one.

        Raises:
            StoreError: it cannot be written.
        """
        try:
            self.part.mkdir(parents=True, exist_ok=True)
            (self.part / "about.json").write_text(json.dumps(self.about), encoding="utf-8")
            torch.save(dict(state), self.part / f"{STATE}.new")
            (self.part / f"{STATE}.new").replace(self.part / STATE)
        except OSError as error:
            raise StoreError(f"Cannot write to {self.part}: {error.strerror or error}. Choose another path.") from error

    def remove(self) -> None:
        """The run is finished."""
        shutil.rmtree(self.part, ignore_errors=True)

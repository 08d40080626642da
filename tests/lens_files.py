"""Lenses that tests read with, written to disk in each layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from probekit.core import ModelInfo
from probekit.lenses import LensRef, save_lens

INFO: dict[str, Any] = {
    "kind": "decoder", "architecture": "tiny", "n_heads": 1, "n_kv_heads": 1, "d_head": 1, "d_mlp": 1, "n_params": 1,
    "context_length": None, "dtype": "float32", "device": "cpu",
}  # fmt: skip


def named(n_layers: int, d_model: int, *, name: str = "owner/Tiny", weights_hash: str = "", revision: str = "") -> Any:
    """As much of a model as a lens asks for."""
    info = ModelInfo(name=name, n_layers=n_layers, d_model=d_model, d_vocab=8, revision=revision, **INFO)
    return SimpleNamespace(info=info, provenance=lambda: {"weights_hash": weights_hash})


def random_lens(folder: Path, n_layers: int, d_model: int, *, kind: Any = "tuned", scale: float = 0.3) -> LensRef:
    """A lens of random matrices; with `scale` 0, one of zeros (tuned) or of identities (Jacobian)."""
    rng = np.random.default_rng(0)
    matrices = {i: scale * rng.normal(size=(d_model, d_model)) for i in range(n_layers - 1)}
    if kind == "jacobian":
        matrices = {i: np.eye(d_model) + m for i, m in matrices.items()}
        return save_lens(folder, kind, matrices, model=named(n_layers, d_model))
    biases = {i: scale * rng.normal(size=d_model) for i in matrices}
    return save_lens(folder, kind, matrices, biases, model=named(n_layers, d_model))


def published_tuned(
    folder: Path, n_layers: int, d_model: int, claims: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, torch.Tensor]:
    """config.json and params.pt as AlignmentResearch/tuned-lens saves them; the state dict that was saved."""
    torch.manual_seed(1)
    translators = torch.nn.ModuleList([torch.nn.Linear(d_model, d_model) for _ in range(n_layers)])
    folder.mkdir(parents=True)
    torch.save(translators.state_dict(), folder / "params.pt")
    about = {
        "base_model_name_or_path": "owner/Tiny",
        "d_model": d_model,
        "num_hidden_layers": n_layers,
        "bias": True,
        "base_model_revision": None,
        "unembed_hash": "0" * 64,
        "lens_type": "linear_tuned_lens",
    }
    (folder / "config.json").write_text(json.dumps(about | dict(claims)))
    return {k: v.detach() for k, v in translators.state_dict().items()}


def published_jacobian(path: Path, n_layers: int, d_model: int, **extra: Any) -> dict[int, torch.Tensor]:
    """One .pt file as anthropics/jacobian-lens saves it; the matrices that were saved."""
    torch.manual_seed(2)
    matrices = {i: torch.randn(d_model, d_model).half() for i in range(n_layers - 1)}
    head = {"J": matrices, "n_prompts": 7, "source_layers": list(matrices), "d_model": d_model}
    torch.save(head | extra, path)
    return matrices

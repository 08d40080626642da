"""Trained lenses read what was planted for them, and the logit lens where they change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close, assert_same, run, scripted, see, texts_of, tiny_model
from lens_files import random_lens
from reference import readout

import probekit as pk
from probekit.backends.scripted import Script, random_play
from probekit.core import Batch, Capture, TokenText
from probekit.reduce import Keep, LensRef, Readout

N_LAYERS, D, V = 4, 16, 40
LENGTHS = (30, 41, 25, 36)
QUICK: dict[str, Any] = {"window": 16, "windows_per_step": 4, "tokens_per_step": 32, "progress": False}


def through(lens: LensRef | None, source: Any = None, lengths: tuple[int, ...] = LENGTHS) -> Any:
    model = scripted(n_layers=N_LAYERS, d_model=D, d_vocab=V) if source is None else source
    return see(model, [Capture("resid_post", Readout(5, lens))], texts_of(lengths, model.info.d_vocab))[0]


@pytest.mark.parametrize("kind", ["tuned", "jacobian"])
@pytest.mark.parametrize("source", ["scripted", "llama-grouped", "gpt2"])
def test_a_lens_that_changes_nothing_is_the_logit_lens(kind: str, source: str, tmp_path: Path) -> None:
    """A tuned lens of zeros to the last bit; the identity as Jacobian, too."""
    model = None if source == "scripted" else tiny_model(source).model
    sizes = (N_LAYERS, D) if model is None else (model.info.n_layers, model.info.d_model)
    lens = random_lens(tmp_path / "lens", *sizes, kind=kind, scale=0.0)
    assert_same(through(lens, model), through(None, model))


@pytest.mark.parametrize("kind", ["tuned", "jacobian"])
def test_every_number_equals_the_naive_one(kind: str, tmp_path: Path) -> None:
    """h + A h + b, or J h, by hand in float64; the last row is the model itself."""
    lens = random_lens(tmp_path / "lens", N_LAYERS, D, kind=kind)
    from safetensors.numpy import load_file

    state = load_file(lens.path)
    model, batch = scripted(n_layers=N_LAYERS, d_model=D, d_vocab=V), texts_of(LENGTHS, V)
    rows = see(model, [Capture("resid_post", Keep())], batch)[0]["value"].values.astype(np.float64)
    unembedding = model.weight.numpy().astype(np.float64)
    found = through(lens)
    for layer in range(N_LAYERS):
        h = rows[layer]
        if layer < N_LAYERS - 1 and kind == "tuned":
            h = h + h @ state[f"weight.{layer}"].T + state[f"bias.{layer}"]
        elif layer < N_LAYERS - 1:
            h = h @ state[f"jacobian.{layer}"].T
        expected = readout(h @ unembedding.T, batch.next_ids, 5, rows[-1] @ unembedding.T)
        for name in ("entropy_nats", "logprob_nats", "kl_nats", "top_logprob", "target_rank"):
            assert_close(found[name].values[layer], expected[name], atol=2e-5, what=f"{name} of layer {layer}")
    assert_same(found.isel(layer=[-1]), through(None).isel(layer=[-1]))


def test_a_case_worked_out_by_hand(tmp_path: Path) -> None:
    """Two dimensions, two tokens, the identity as unembedding: (0, 2) is turned to (2, 0) and shifted by (0, 1)."""
    from lens_files import named

    turn, shift = np.array([[-1.0, 1.0], [0.0, -1.0]]), np.array([0.0, 1.0])  # h + A h + b: (0, 2) -> (2, 0) + (0, 1)
    lens = pk.lenses.save_lens(tmp_path / "lens", "tuned", {0: turn}, {0: shift}, model=named(2, 2))

    def play(text: TokenText) -> Script:
        n = len(text)
        return Script(np.tile([[[0.0, 2.0]], [[3.0, 0.0]]], (1, n, 1)), np.zeros((2, 1, n, n)))

    model = scripted(play=play, n_layers=2, n_heads=1, d_model=2, d_vocab=2, unembedding=np.eye(2))
    batch = Batch((TokenText((0, 0), ("a", "a")),))
    found = see(model, [Capture("resid_post", Readout(1, lens))], batch)[0]
    p = np.array([1.0, 0.0])  # of the logits (2, 1): e / (e + 1) and 1 / (e + 1)
    p = np.exp(1 + p - 1) / np.exp(1 + p - 1).sum()
    q = np.array([np.e**3, 1.0]) / (np.e**3 + 1)
    assert_close(found["logprob_nats"].values[0, 0], np.log(p[0]), atol=1e-6)
    assert_close(found["kl_nats"].values[0, 0], (q * np.log(q / p)).sum(), atol=1e-6)
    assert found["top_id"].values[0].ravel().tolist() == [0, 0]


def rotated(text: TokenText) -> Script:
    """All blocks hold the final row of their token, which its id decides; all but the last in a turned basis."""
    rng = np.random.default_rng(3)
    table, noise = 2.0 * rng.normal(size=(V, D)), np.random.default_rng(text.ids)
    turns = [np.linalg.qr(rng.normal(size=(D, D)))[0] for _ in range(N_LAYERS - 1)]
    final = table[list(text.ids)]
    rows = [5 * final @ turn + 1 + 0.01 * noise.normal(size=final.shape) for turn in turns]
    return Script(np.stack([*rows, final]), np.zeros((N_LAYERS, 1, len(text), len(text))))


def unrelated(text: TokenText) -> Script:
    """The null: what blocks hold has nothing to do with the final row."""
    return random_play(N_LAYERS, 1, D, seed=5)(text)


def trained(play: Any, folder: Path, **params: Any) -> tuple[Any, pk.TrainedLens]:
    model = scripted(play=play, n_layers=N_LAYERS, n_heads=1, d_model=D, d_vocab=V)
    texts = texts_of([64] * 25, V, seed=1)
    return model, pk.train_lens(model, texts, folder, **{"steps": 20} | QUICK | params)


@pytest.mark.parametrize(
    "recipe", [{}, {"recipe": "adam", "steps": 300, "learning_rate": 0.05}, {"recipe": "sgd", "steps": 600}], ids=str
)
def test_what_is_written_in_another_basis_is_read_by_the_trained_lens_only(recipe: Any, tmp_path: Path) -> None:
    """On texts it never saw: KL near 0 and the final prediction at every block, where the logit lens is at chance."""
    model, lens = trained(rotated, tmp_path / "lens", **recipe)
    fresh = texts_of((50, 60, 40), V, seed=9)
    tuned = run("logit-lens", model, fresh, lens=str(lens.folder))["logit-lens"]
    logit = run("logit-lens", model, fresh)["logit-lens"]
    limit = 0.02 if not recipe else 1.0
    assert (
        tuned["kl_nats"].mean("token").values[:-1].max() < limit < 3 < logit["kl_nats"].mean("token").values[:-1].min()
    )
    assert (
        tuned["agreement"].values.min() > (0.98 if not recipe else 0.7) and logit["agreement"].values[:-1].max() < 0.2
    )
    assert (tuned["kl_nats"].values[-1] == 0).all()
    assert_close(tuned["entropy_nats"].values[-1], logit["entropy_nats"].values[-1])
    kl = lens.kl_nats
    assert all(a < b for a, b in zip(kl["tuned"][:-1], kl["logit"][:-1], strict=True)) and kl["tuned"][-1] == 0


def test_nothing_is_read_where_nothing_is_written(tmp_path: Path) -> None:
    """The matched null: no lens finds the final prediction of unrelated blocks; agreement stays at chance."""
    model, lens = trained(unrelated, tmp_path / "lens")
    found = run("logit-lens", model, texts_of([200] * 6, V, seed=9), lens=str(lens.folder))["logit-lens"]
    agree, chance = found["agreement"].values[:-1], found["agreement_null"].values[:-1]
    assert np.abs(agree - chance).max() < 4 * np.sqrt(0.05 / 1200)
    assert min(lens.kl_nats["tuned"][:-1]) > 1.0


def test_the_mean_jacobian_of_a_model_is_read(tmp_path: Path) -> None:
    """J of the last block but one by autograd, at one position each: its readout is the first-order one."""
    tiny = tiny_model("llama-grouped")
    module, info = tiny.reference, tiny.model.info
    block = module.model.layers[-1]
    text = texts_of((12,), info.d_vocab)
    rows = torch.as_tensor(see(tiny.model, [Capture("resid_post", Keep())], text)[0]["value"].values[-2])
    places = torch.arange(len(rows))[None]
    turn = module.model.rotary_emb(rows[None], places)

    def last(h: torch.Tensor) -> torch.Tensor:  # effects on all later positions, summed
        mask = torch.full((len(rows), len(rows)), -torch.inf).triu(1)[None, None]
        out = block(h[None], attention_mask=mask, position_ids=places, position_embeddings=turn)
        return (out[0] if isinstance(out, tuple) else out)[0].sum(0)

    jacobian = torch.autograd.functional.jacobian(last, rows).mean(1).numpy()  # d_model out, token, d_model in
    matrices = {i: np.eye(info.d_model) for i in range(info.n_layers - 2)} | {info.n_layers - 2: jacobian}
    lens = pk.lenses.save_lens(tmp_path / "lens", "jacobian", matrices, model=tiny.model)
    found = see(tiny.model, [Capture("resid_post", Readout(5, lens))], text)[0]
    with torch.no_grad():
        logits = module.lm_head(module.model.norm(rows @ torch.as_tensor(jacobian).T)).numpy()
    expected = readout(logits.astype(np.float64), text.next_ids, 5)
    assert_close(found["entropy_nats"].values[-2], expected["entropy_nats"], atol=1e-4)
    assert_close(found["top_logprob"].values[-2], expected["top_logprob"], atol=1e-4)

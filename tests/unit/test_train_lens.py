"""Training a tuned lens: broken off and gone on with, split, refused, told of, and from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import copy_of, texts_of, tiny_model, words_tokenizer

import probekit as pk
from probekit.backends.transformers import TransformersModel
from probekit.cli import cli
from probekit.core import Batch, Cancelled, CapabilityError, InputError, PlanError, StoreError
from probekit.lenses import fitting, train
from probekit.lenses.data import LensTraining, split, windows_of
from probekit.lenses.fitting import Coordinates, LeastSquares, Reading, Translators, zero_coordinates
from probekit.reduce.lens_files import weights_of

CPU = torch.device("cpu")
WORDS = " ".join(f"w{3 + i * i % 101}" for i in range(600))
HOW: dict[str, Any] = {"window": 16, "steps": 6, "tokens_per_step": 8, "fit_tokens": 400, "held_tokens": 32}


def model() -> Any:
    return tiny_model("llama-grouped").model


def train_here(folder: Path, texts: Any = WORDS, **how: Any) -> pk.TrainedLens:
    return pk.train_lens(model(), texts, folder, **{"progress": False} | HOW | how)


class Stop:
    """Ends a call at its n-th step."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, list[pk.Step]()

    def __call__(self, step: pk.Step) -> None:
        self.seen.append(step)
        if len(self.seen) == self.at:
            raise Cancelled("enough")


@pytest.mark.parametrize("recipe", ["regression", "sgd", "adam"])
def test_a_call_that_broke_off_ends_with_the_same_lens(recipe: str, tmp_path: Path) -> None:
    """Ended at every kind of step and gone on with, bit for bit; without the folder until the end."""
    whole = train_here(tmp_path / "whole", recipe=recipe)
    listener = Stop(0)
    train_here(tmp_path / "told", recipe=recipe, progress=listener)
    what = [s.what for s in listener.seen]
    for at in sorted({what.index(w) + 1 for w in what} | {what.index("training") + 4}):
        broken = tmp_path / f"broken-{at}"
        with pytest.raises(Cancelled):
            train_here(broken, recipe=recipe, progress=Stop(at))
        assert not broken.exists()
        again = Stop(0)
        found = train_here(broken, recipe=recipe, progress=again)
        assert found.ref == whole.ref and found.kl_nats == whole.kl_nats
        assert found.manifest["training"]["loss_nats"] == whole.manifest["training"]["loss_nats"]
        n_training = sum(s.what == "training" for s in again.seen)
        assert n_training == 6 - sum(w == "training" for w in what[:at]), "work was done again"
        assert not broken.with_name(f".{broken.name}.partial").exists()


def test_a_checkpoint_of_the_clock_is_gone_on_with_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill asks nobody: what was kept at the last checkpoint is where the next call begins."""
    whole = train_here(tmp_path / "whole")
    monkeypatch.setattr(train, "KEPT_EVERY", 0.0)
    step, left = Translators.step, [3]

    def killed(self: Any, *args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise SystemExit
        return step(self, *args)

    monkeypatch.setattr(Translators, "step", killed)
    with pytest.raises(SystemExit):
        train_here(tmp_path / "lens")
    left[0] = 3  # exactly the steps that are missing
    assert train_here(tmp_path / "lens").ref == whole.ref


def test_other_settings_do_not_go_on_from_it(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        train_here(tmp_path / "lens", progress=Stop(8))
    with pytest.raises(InputError, match="differs in seed"):
        train_here(tmp_path / "lens", seed=1)
    with pytest.raises(InputError, match="differs in texts"):
        train_here(tmp_path / "lens", WORDS.replace("w3 ", "w4 "))
    assert train_here(tmp_path / "lens").folder == tmp_path / "lens"


def test_the_manifest_says_how_it_was_made(tmp_path: Path) -> None:
    lens = train_here(tmp_path / "lens", seed=3)
    data = json.loads((tmp_path / "lens" / "lens.json").read_text())
    assert data == lens.manifest and data["kind"] == "tuned"
    info = model().info
    assert (data["model"]["name"], data["model"]["d_model"], data["model"]["n_layers"]) == (info.name, 32, 3)
    assert data["model"]["weights_hash"] == model().provenance()["weights_hash"]
    training = data["training"]
    assert training["parameters"]["seed"] == 3 and training["parameters"]["learning_rate"] == 1e-4
    assert len(training["loss_nats"]) == 6 and training["held_out"]["n_tokens"] == 32
    assert training["texts"]["split_by"] == "stretch" and len(training["chosen"]) == 2
    assert len(lens.kl_nats["tuned"]) == len(lens.kl_nats["logit"]) == 3
    assert lens.kl_nats["tuned"][-1] == 0.0 == lens.kl_nats["logit"][-1]
    assert train_here(tmp_path / "other", seed=4).ref != lens.ref


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    module = copy_of("gpt2")
    before = {k: v.clone() for k, v in module.state_dict().items()}
    opened = TransformersModel.from_loaded(module, words_tokenizer(), name="mine")
    pk.train_lens(opened, WORDS, tmp_path / "lens", progress=False, **HOW)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in module.parameters()) and not module.training


def test_texts_are_held_out_whole() -> None:
    """Of many texts whole ones, of one long text stretches; no window is in two parts."""
    settings = LensTraining.parse({"window": 8, "held_out": 0.2}, "x")
    assert isinstance(settings, LensTraining)
    many = split(windows_of(model(), texts_of([33] * 30, 120), "never", settings), settings)
    assert many.by == "text" and (len(many.held), len(many.apart), len(many.train)) == (24, 4, 92)
    one = split(windows_of(model(), texts_of([801], 120), "never", settings), settings)
    assert one.by == "stretch" and (len(one.held), len(one.apart), len(one.train)) == (20, 5, 75)
    for parts in (many, one):
        sets = [{w.ids for w in some} for some in (parts.train, parts.apart, parts.held)]
        assert sum(map(len, sets)) == len(set.union(*sets))
    text = texts_of([801], 120).texts[0].ids
    starts = sorted(text.index(w.ids[0]) for w in one.held) if len(set(text)) == len(text) else None
    assert starts is None or np.diff(starts).min() == 8


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Too little text: it fills 2 windows"):
        train_here(tmp_path / "a", " ".join(WORDS.split()[:40]))
    with pytest.raises(InputError, match="reads at most 256 tokens"):
        train_here(tmp_path / "a", window=300)
    with pytest.raises(InputError, match="must be one of regression, sgd, adam"):
        train_here(tmp_path / "a", recipe="lbfgs")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "essay.txt").write_text("x")
    with pytest.raises(StoreError, match="is no lens that probekit made"):
        train_here(tmp_path / "taken")
    with pytest.raises(CapabilityError, match="cannot have a tuned lens"):
        pk.train_lens(_Encoder(), WORDS, tmp_path / "a")
    with pytest.raises(PlanError, match="by the recipe 'regression' needs about 80 KiB"):
        train_here(tmp_path / "a", memory_limit=10_000)
    with pytest.raises(InputError, match="Training diverged at step"):
        _diverge()


def _diverge() -> None:
    reading = Reading(model().unembed)
    translators = Translators("adam", [zero_coordinates(32, CPU)] * 2, 4, 1e-3, 0.0)
    translators.step(torch.full((3, 4, 32), torch.inf), reading)


class _Encoder:
    """A model without next token."""

    def __init__(self) -> None:
        from dataclasses import replace

        self.info = replace(model().info, kind="encoder")

    def __getattr__(self, name: str) -> Any:
        return getattr(model(), name)

    tokenize = decode = provenance = execute = None


def test_least_squares_is_weighted_ridge_regression() -> None:
    """Against the normal equations of float64 rows; sums may come in pieces."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3, 500, 5)) * [1, 4, 0.2, 1, 30] + [0, 1, 0, -3, 2]
    sums = LeastSquares(3, 5, CPU)
    for part in np.array_split(np.arange(500), 7):
        sums.add(torch.as_tensor(rows[:, part], dtype=torch.float32))
    for layer in range(2):
        matrix, bias = sums.solve(layer, 1e-12)
        h, final = rows[layer], rows[-1]
        root = np.sqrt(1 / (final**2).mean(1))[:, None]
        design = np.concatenate([h, np.ones((500, 1))], 1)
        expected = np.linalg.lstsq(design * root, (final - h) * root, rcond=None)[0]
        np.testing.assert_allclose(matrix.numpy(), expected[:-1].T, atol=2e-3)
        np.testing.assert_allclose(bias.numpy(), expected[-1], atol=2e-3)
        mean, whitening = sums.whitening(layer)
        white = (torch.as_tensor(h, dtype=torch.float32) - mean) @ whitening * torch.as_tensor(root).float()
        weight = torch.as_tensor(root).float().square().mean()
        np.testing.assert_allclose((white.T @ white / 500 / weight).numpy(), np.eye(5), atol=0.02)


def test_what_is_trained_in_white_coordinates_is_written_in_plain_ones() -> None:
    torch.manual_seed(0)
    where = Coordinates(torch.randn(4, 4), torch.randn(4), torch.randn(4), torch.randn(4, 4), 3.0)
    rows, weight, bias = torch.randn(7, 4), torch.randn(4, 4), torch.randn(4)
    matrix, added = where.plain(weight, bias)
    torch.testing.assert_close(
        rows + rows @ matrix.T + added, where.translated(rows, weight, bias), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["llama-grouped", "gpt2"])
def test_the_quiet_direction_is_read_least(kind: str) -> None:
    """Shorter readings, hardly other ones: of all directions of the same length it moves the distribution least."""
    reading, rows = (
        Reading(tiny_model(kind).model.unembed),
        3 * torch.randn(50, 32, generator=torch.Generator().manual_seed(0)),
    )
    quiet = reading.quiet_direction()
    others = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))[0]
    if kind == "gpt2":
        others = others - others.mean(0)  # LayerNorm takes the mean away
        assert abs(float(quiet.sum())) < 1e-3
    fixed = 1000.0  # long enough that only the direction is left
    with torch.no_grad():
        final = reading.final(rows)
        spread = [float(reading.logprobs(rows * 0 + fixed * u / u.norm()).exp().var()) for u in others.T]
        assert float(reading.logprobs(rows * 0 + fixed * quiet).exp().var()) < min(spread)
    assert reading.divergence(rows, final) == pytest.approx(0.0, abs=1e-6)


def test_the_schedule_of_the_released_code() -> None:
    """SGD: from 0.1 linearly to 0, momentum 0.9, Nesterov, decay 1e-3; Adam warms up over a fifth of the steps."""
    zero = [zero_coordinates(4, CPU)]
    sgd = Translators("sgd", zero, 10, 0.1, 1e-3)
    group = sgd.optimiser.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"], sgd.clip) == (0.9, True, 1e-3, True)
    rates = []
    for done in range(10):
        sgd.done = done
        rates.append(sgd.rate * sgd._share())
    np.testing.assert_allclose(rates, 0.1 * (1 - np.arange(10) / 10))
    adam = Translators("adam", zero, 10, 1e-3, 1e-3)
    assert adam.optimiser.param_groups[0]["amsgrad"] and adam.optimiser.param_groups[0]["betas"] == (0.9, 0.999)
    shares = []
    for done in range(10):
        adam.done = done
        shares.append(adam._share())
    np.testing.assert_allclose(shares[:3], [0.5, 1.0, 1.0])


def test_no_layer_is_worse_than_the_logit_lens_where_choices_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that spoils everything is not kept."""

    def spoil(self: Translators, rows: Any, reading: Any) -> list[float]:
        self.done += 1
        with torch.no_grad():
            for weight in self.weights:
                weight += 5.0
        return [0.0, 0.0]

    monkeypatch.setattr(Translators, "step", spoil)
    lens = train_here(tmp_path / "lens")
    assert set(lens.manifest["training"]["chosen"]) <= {"regression", "zero"}
    monkeypatch.setattr(fitting, "RIDGES", (1e-9,))
    assert weights_of(lens.ref, CPU).matrices.keys() == {0, 1}


def test_the_command_line_trains_and_reads(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(WORDS)
    lens, flags = tmp_path / "lens", [f"--{k.replace('_', '-')}={v}" for k, v in HOW.items()]
    words = ["train-lens", str(tiny_folder), "--text", str(tmp_path / "corpus.txt"), "--out", str(lens), *flags]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert "block   tuned lens   logit lens" in done.output and f"Lens: {lens}" in done.output
    run = ["run", "logit-lens", "--model", str(tiny_folder), "--text", WORDS[:200], "--lens", str(lens)]
    done = CliRunner().invoke(cli, [*run, "--out", str(tmp_path / "report")])
    assert done.exit_code == 0, done.output
    assert "Tuned lens lens" in (tmp_path / "report" / "report.html").read_text()
    done = CliRunner().invoke(cli, ["train-lens", str(tiny_folder), "--text", str(tmp_path / "no.txt"), "--out", "x"])
    assert done.exit_code == 2
    assert "--tokens-per-step" in CliRunner().invoke(cli, ["train-lens", "--help"]).output


def test_bars_are_quiet_off_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_here(tmp_path / "lens", progress=True)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_a_batch_is_trained_on_as_it_is(tmp_path: Path) -> None:
    batch = texts_of([40] * 24, 120)
    assert isinstance(batch, Batch)
    lens = train_here(tmp_path / "lens", batch)
    assert lens.manifest["training"]["texts"]["split_by"] == "text"

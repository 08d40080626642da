"""Lenses on disk: what is read, what is refused and in which words, and what is written for others to read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import run, scripted, texts_of
from lens_files import named, published_jacobian, published_tuned, random_lens

import probekit as pk
from probekit.core import InputError, StoreError
from probekit.lenses import export_lens, open_lens, save_lens
from probekit.reduce.lens_files import weights_of

CPU = torch.device("cpu")
N_LAYERS, D = 4, 6


def test_a_published_tuned_lens_is_read_as_its_authors_read_it(tmp_path: Path) -> None:
    """Translator i reads what enters block i, so block L's output has translator L + 1; the first one is not needed."""
    state = published_tuned(tmp_path / "gpt2", N_LAYERS, D, claims={"base_model_revision": "main"})
    lens = open_lens(tmp_path / "gpt2")
    assert (lens.kind, lens.d_model, lens.n_layers) == ("tuned", D, N_LAYERS)
    assert (lens.model, lens.revision, lens.title) == ("owner/Tiny", "main", "tuned lens gpt2")
    weights, h = weights_of(lens, CPU), torch.randn(5, D)
    for block in range(N_LAYERS - 1):
        expected = h + torch.nn.functional.linear(h, state[f"{block + 1}.weight"], state[f"{block + 1}.bias"])
        torch.testing.assert_close(weights.translate(block, h), expected)
    assert weights.translate(N_LAYERS - 1, h) is h


def test_a_published_jacobian_lens_is_read_as_its_authors_read_it(tmp_path: Path) -> None:
    """Matrix L reads what leaves block L: J h, in float32; a folder that holds the file will do."""
    folder = tmp_path / "jlens"
    folder.mkdir()
    matrices = published_jacobian(folder / "tiny_jacobian_lens.pt", N_LAYERS, D)
    for spec in (folder, folder / "tiny_jacobian_lens.pt"):
        lens = open_lens(spec)
        assert (lens.kind, lens.d_model, lens.n_layers, lens.model) == ("jacobian", D, N_LAYERS, "")
        assert lens.title == "Jacobian lens tiny_jacobian_lens"
    weights, h = weights_of(lens, CPU), torch.randn(5, D)
    for block, matrix in matrices.items():
        torch.testing.assert_close(weights.translate(block, h), h @ matrix.float().T)


@pytest.mark.parametrize("kind", ["tuned", "jacobian"])
def test_what_is_exported_is_read_again(kind: str, tmp_path: Path) -> None:
    """In the published layout, with the keys that the released code reads."""
    lens = random_lens(tmp_path / "own", N_LAYERS, D, kind=kind)
    target = export_lens(lens, tmp_path / ("theirs" if kind == "tuned" else "theirs.pt"))
    again = open_lens(target)
    assert (again.kind, again.d_model, again.n_layers, again.model) == (kind, D, N_LAYERS, "owner/Tiny")
    one, two = weights_of(lens, CPU), weights_of(again, CPU)
    for i in range(N_LAYERS - 1):
        torch.testing.assert_close(two.matrices[i], one.matrices[i], atol=2e-3 if kind == "jacobian" else 0, rtol=0)
    if kind == "tuned":
        state = torch.load(target / "params.pt", weights_only=True)
        released = torch.nn.ModuleList([torch.nn.Linear(D, D) for _ in range(N_LAYERS)])
        released.load_state_dict(state)  # refuses keys and shapes that are not those of the released code
        assert not state["0.weight"].any() and set(json.loads((target / "config.json").read_text())) == {
            "base_model_name_or_path", "d_model", "num_hidden_layers", "bias", "base_model_revision", "unembed_hash",
            "lens_type",
        }  # fmt: skip
    else:
        found = torch.load(target, weights_only=True)
        assert set(found) >= {"J", "n_prompts", "source_layers", "d_model"}
        assert found["J"][0].dtype == torch.float16 and found["source_layers"] == [0, 1, 2]
    with pytest.raises(StoreError, match="exists"):
        export_lens(lens, target)


def test_a_saved_lens_is_read_again(tmp_path: Path) -> None:
    model = named(3, 4, name="owner/Other", weights_hash="sha256:1", revision="abc")
    lens = save_lens(tmp_path / "a", "tuned", {0: np.eye(4), 1: np.ones((4, 4))}, {0: np.ones(4)}, model=model)
    assert (lens.model, lens.revision, lens.weights_hash) == ("owner/Other", "abc", "sha256:1")
    weights = weights_of(lens, CPU)
    assert weights.matrices[1].eq(1).all() and weights.biases[0].eq(1).all() and 1 not in weights.biases
    assert open_lens(str(tmp_path / "a")) == lens
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("x")
    with pytest.raises(StoreError, match="is no lens that probekit made"):
        save_lens(tmp_path / "b", "tuned", {0: np.eye(4), 1: np.eye(4)}, model=model)
    with pytest.raises(InputError, match=re.escape("each of the blocks 0 to 1; found [0]")):
        save_lens(tmp_path / "c", "tuned", {0: np.eye(4)}, model=model)
    with pytest.raises(InputError, match=r"weight\.1 has the shape \(3, 3\)"):
        save_lens(tmp_path / "c", "tuned", {0: np.eye(4), 1: np.eye(3)}, model=model)


def damage(folder: Path, how: str) -> None:
    """Make one of the faults that a reader meets."""
    if how == "weights":
        path = folder / "lens.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    elif how == "manifest":
        (folder / "lens.json").write_text("{")
    elif how == "newer":
        data = json.loads((folder / "lens.json").read_text())
        (folder / "lens.json").write_text(json.dumps(data | {"version": 99}))
    elif how == "another":
        (folder / "lens.json").write_text(json.dumps({"file": "something else"}))
    elif how == "missing":
        (folder / "lens.safetensors").unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("weights", "its hash differs"),
        ("manifest", "cannot be read"),
        ("newer", "version 99"),
        ("another", "is no lens of probekit"),
        ("missing", "cannot be read"),
    ],
)
def test_a_damaged_lens_is_refused(how: str, message: str, tmp_path: Path) -> None:
    random_lens(tmp_path / "lens", N_LAYERS, D)
    damage(tmp_path / "lens", how)
    with pytest.raises(InputError, match=message):
        open_lens(tmp_path / "lens")


def test_what_is_no_lens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="found nothing; expected lens"):
        open_lens(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="expected a folder, or a"):
        open_lens(tmp_path / "notes.txt")
    with pytest.raises(InputError, match="There is no lens 'no such thing'"):
        open_lens("no such thing")
    with pytest.raises(InputError, match="empty name"):
        open_lens(" ")
    torch.save({"K": 1}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="no file of Jacobian matrices: found K"):
        open_lens(tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    with pytest.raises(InputError, match="cannot be read as plain tensors"):
        open_lens(tmp_path / "text.pt")
    published_tuned(tmp_path / "odd", N_LAYERS, D, claims={"lens_type": "mlp_lens"})
    with pytest.raises(InputError, match="type 'mlp_lens'"):
        open_lens(tmp_path / "odd")


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    """A file of weights is read as tensors only."""
    import pickle

    class Bad:
        def __reduce__(self) -> Any:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Bad(), protocol=2))
    with pytest.raises(InputError):
        open_lens(tmp_path / "bad.pt")
    torch.save({"J": Bad(), "d_model": 2}, tmp_path / "worse.pt")
    with pytest.raises(InputError):
        open_lens(tmp_path / "worse.pt")
    assert not (tmp_path / "ran").exists()


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    state = published_tuned(tmp_path / "short", N_LAYERS, D)
    torch.save({k: v for k, v in state.items() if not k.startswith("3")}, tmp_path / "short" / "params.pt")
    with pytest.raises(InputError, match=r"no tensor '3\.weight'"):
        weights_of(open_lens(tmp_path / "short"), CPU)
    published_tuned(tmp_path / "wide", N_LAYERS, D, claims={"d_model": D + 1})
    with pytest.raises(InputError, match=f"expected a width of {D + 1}"):
        weights_of(open_lens(tmp_path / "wide"), CPU)
    torch.save({k: v * torch.nan for k, v in state.items()}, tmp_path / "short" / "params.pt")
    with pytest.raises(InputError, match="not finite"):
        weights_of(open_lens(tmp_path / "short"), CPU)
    published_jacobian(tmp_path / "gap.pt", N_LAYERS, D, J={0: torch.eye(D), 2: torch.eye(D)})
    with pytest.raises(InputError, match=r"for the blocks \[0, 2\]"):
        open_lens(tmp_path / "gap.pt")


def fits(lens: Any, model: Any, **how: Any) -> None:
    lens.check_model(model.info, lambda: model.provenance()["weights_hash"], **how)


def test_a_lens_of_another_model_is_refused(tmp_path: Path) -> None:
    """Sizes always; names unless the weights hash alike or the user says so; a revision only warns."""
    made = named(N_LAYERS, D, name="owner/Tiny@main", weights_hash="sha256:a", revision="r1")
    matrices = {i: np.eye(D) for i in range(N_LAYERS - 1)}
    lens = save_lens(tmp_path / "lens", "tuned", matrices, model=made)
    fits(lens, made)
    fits(lens, named(N_LAYERS, D, name="some/folder", weights_hash="sha256:a"))  # the same weights elsewhere
    for n_layers, d_model in ((N_LAYERS + 1, D), (N_LAYERS, D + 2)):
        with pytest.raises(
            InputError, match=f"width {D} in {N_LAYERS} blocks.*has width {d_model} and {n_layers} blocks"
        ):
            fits(lens, named(n_layers, d_model, weights_hash="sha256:a"), transfer=True)
    other = named(N_LAYERS, D, name="owner/Larger", weights_hash="sha256:b")
    with pytest.raises(
        InputError, match="was made for 'owner/Tiny@main'; this model is 'owner/Larger', with other weights"
    ):
        fits(lens, other)
    fits(lens, other, transfer=True)
    with pytest.warns(UserWarning, match="revision 'r1', and this is 'r2'"):
        fits(lens, named(N_LAYERS, D, name="Mirror/tiny", weights_hash="sha256:b", revision="r2"))
    with pytest.warns(UserWarning, match="weights of another hash"):
        fits(lens, named(N_LAYERS, D, name="owner/tiny", weights_hash="sha256:b"))


def test_a_published_lens_is_held_against_name_and_sizes(tmp_path: Path) -> None:
    published_tuned(tmp_path / "tuned", N_LAYERS, D)
    fits(open_lens(tmp_path / "tuned"), named(N_LAYERS, D))
    with pytest.raises(InputError, match="was made for 'owner/Tiny'"):
        fits(open_lens(tmp_path / "tuned"), named(N_LAYERS, D, name="gpt2"))
    published_jacobian(tmp_path / "plain.pt", N_LAYERS, D)
    fits(open_lens(tmp_path / "plain.pt"), named(N_LAYERS, D, name="whatever"))  # the file names no model
    published_jacobian(tmp_path / "named.pt", N_LAYERS, D, metadata={"model_name": "gpt2"})
    with pytest.raises(InputError, match="was made for 'gpt2'"):
        fits(open_lens(tmp_path / "named.pt"), named(N_LAYERS, D))


def test_refused_before_anything_runs(tmp_path: Path) -> None:
    """By the plan where sizes differ, and by the run where the model does."""
    model = scripted(n_layers=N_LAYERS, d_model=16)
    model.execute = None  # type: ignore[assignment,method-assign]
    random_lens(tmp_path / "wide", N_LAYERS, 8)
    random_lens(tmp_path / "other", N_LAYERS, 16)
    with pytest.raises(InputError, match="width 8"):
        pk.plan("logit-lens", model, texts_of((9,)), lens=str(tmp_path / "wide"))
    for name, message in (("wide", "width 8"), ("other", "made for 'owner/Tiny'")):
        with pytest.raises(InputError, match=message):
            run("logit-lens", model, texts_of((9,)), lens=str(tmp_path / name))


def test_a_file_that_changes_after_it_was_named_is_refused(tmp_path: Path) -> None:
    lens = random_lens(tmp_path / "lens", N_LAYERS, D, scale=0.7)
    random_lens(tmp_path / "lens", N_LAYERS, D, scale=0.8)
    with pytest.raises(InputError, match="has changed since it was named"):
        weights_of(lens, CPU)

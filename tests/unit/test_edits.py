"""Edits as data: what they refuse, how they hash, and their arithmetic by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from helpers import texts_of

from probekit.backends.edits import apply_edit
from probekit.core import (
    Add,
    Batch,
    Forward,
    InputError,
    KnockOut,
    LogitDifference,
    ModelInfo,
    Patch,
    ProjectOut,
    Replace,
    Scale,
    UnknownName,
    Values,
    check_patch,
)

SITES = frozenset({"resid_pre", "resid_post", "q", "k", "v", "z", "mlp_act", "pattern", "embed"})
INFO = ModelInfo("tiny", "decoder", "llama", 3, 4, 2, 6, 2, 10, 50, 1000, 64, "float32", "cpu", SITES)
BATCH = texts_of((5, 3))
LENGTHS = (5, 3)


def check(patch: Patch, batch: Batch = BATCH) -> None:
    check_patch(patch, INFO, batch)


# --- arithmetic ---------------------------------------------------------------------------------------------------


def rows(n_dims: int = 3) -> torch.Tensor:
    """Axes text, position, d_model 4 (or head 2, d_head 2)."""
    values = torch.arange(2 * 5 * 4, dtype=torch.float32).view(2, 5, 4) - 7
    return values if n_dims == 3 else values.view(2, 5, 2, 2)


def changed(patch: Patch, n_dims: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Before and after; asserts that the activation itself and the padding stay as they are."""
    before = rows(n_dims)
    after = apply_edit(patch, before, BATCH)
    assert torch.equal(before, rows(n_dims))
    if patch.positions is not None:
        assert torch.equal(after[1, 3:], before[1, 3:])
    return before.numpy(), after.numpy()


def test_scale_by_hand() -> None:
    before, after = changed(Patch("resid_pre.0", Scale(-2.0)))
    assert np.array_equal(after, -2 * before)
    before, after = changed(Patch("resid_pre.0", 0.5, positions=(-1,), dims=(0, -1)))
    expected = before.copy()
    for text, pos in ((0, 4), (1, 2)):
        for dim in (0, 3):
            expected[text, pos, dim] *= 0.5
    assert np.array_equal(after, expected)


def test_add_by_hand() -> None:
    before, after = changed(Patch("resid_pre.0", Add([1.0, 0.0, -1.0, 2.0], scale=3.0), positions=(1,), texts=(1,)))
    expected = before.copy()
    expected[1, 1] += [3, 0, -3, 6]
    assert np.array_equal(after, expected)


def test_replace_by_hand() -> None:
    before, after = changed(Patch("z.0", Replace([[[8.0]], [[9.0]]]), positions=(0, -1), heads=(1,)), 4)
    expected = before.copy()
    expected[:, 0, 1] = 8
    expected[0, 4, 1] = expected[1, 2, 1] = 9
    assert np.array_equal(after, expected)


def test_project_out_by_hand() -> None:
    """(3, 4) on the first two dimensions has length 5; what is left is orthogonal to it, the rest untouched."""
    before, after = changed(Patch("resid_pre.0", ProjectOut([3.0, 4.0, 0.0, 0.0]), positions=(0,)))
    share = before[:, 0] @ [0.6, 0.8, 0, 0]
    np.testing.assert_allclose(after[:, 0], before[:, 0] - share[:, None] * [0.6, 0.8, 0, 0], atol=1e-5)
    np.testing.assert_allclose(after[:, 0] @ [3, 4, 0, 0], 0, atol=1e-5)
    assert np.array_equal(after[:, 1:], before[:, 1:])


def test_half_precision_is_edited_in_float32() -> None:
    """256 + 1 + 1 is 258 in bfloat16, but 256 + 1 rounds to 256: the sum is made before rounding."""
    values = torch.full((1, 1, 2), 256.0, dtype=torch.bfloat16)
    after = apply_edit(Patch("resid_pre.0", Add([1.0, 1.0], 2.0)), values, texts_of((1,)))
    assert after.dtype == torch.bfloat16 and after.tolist() == [[[258.0, 258.0]]]


# --- equal edits are equal requests -------------------------------------------------------------------------------


def test_equal_patches_are_one_request() -> None:
    direction = np.arange(3.0)
    first = Forward((), (Patch("resid_post.1", Add(direction), positions=[0]),))
    second = Forward((), (Patch(("resid_post", 1), Add(direction.tolist()), positions=(np.int64(0),)),))
    assert first == second and hash(first) == hash(second) and first.pass_key == second.pass_key
    others = [
        Patch("resid_post.1", Add(direction), positions=[1]),
        Patch("resid_post.1", Add(direction, 2.0), positions=[0]),
        Patch("resid_post.1", Add(direction + 1), positions=[0]),
        Patch("resid_post.1", Replace(direction), positions=[0]),
        Patch("resid_post.1", Add(direction), positions=[0], texts=[0]),
        Patch("resid_post.1", Add(direction), positions=[0], dims=[0, 1, 2]),
    ]
    keys = {p.key for p in (*first.patches, *others)}
    assert len(keys) == len({*first.patches, *others}) == 7


@pytest.mark.parametrize("kind", ["list", "array", "labelled", "tensor", "half", "with gradient"])
def test_values_come_from_anything_with_numbers(kind: str) -> None:
    plain = np.array([[1.0, 2.0], [3.0, 4.0]])
    given: Any = {
        "list": plain.tolist(),
        "array": plain,
        "labelled": xr.DataArray(plain, dims=("token", "d_model")),
        "tensor": torch.tensor(plain),
        "half": torch.tensor(plain).bfloat16(),
        "with gradient": torch.tensor(plain, requires_grad=True),
    }[kind]
    found = Values(given)
    assert found == Values(plain) and np.array_equal(found.array, plain) and found.array.dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        found.array[0] = 9


def test_values_are_a_copy() -> None:
    mine = np.ones(3, dtype=np.float32)
    held = Replace(mine)
    mine[0] = 7
    assert held.values.array.tolist() == [1, 1, 1]


# --- what is refused, and in which words --------------------------------------------------------------------------

BAD: dict[str, tuple[Any, str]] = {
    "unknown point": (lambda: Patch("resid_pots.1", 0.0), r"Unknown point 'resid_pots.1'. Did you mean 'resid_post'"),
    "layer of a site without": (lambda: Patch(("embed", 1), 0.0), "'embed' exists once, not per layer; found layer 1"),
    "no edit": (lambda: Patch("resid_post.1", None), "Found NoneType as the edit at resid_post.1; expected a number"),
    "an array": (lambda: Patch("resid_post.1", np.ones(3)), "Found ndarray as the edit"),
    "NaN": (lambda: Patch("resid_post.1", float("nan")), "factor=nan; expected a finite number"),
    "infinite scale": (lambda: Add([1.0], float("inf")), "scale=inf; expected a finite number"),
    "NaN values": (lambda: Replace([1.0, float("nan")]), r"shape \(2,\), empty or not finite"),
    "no values": (lambda: Replace([]), "empty or not finite"),
    "words": (lambda: Replace(["a"]), "Found list where an array of numbers is needed"),
    "no direction": (lambda: ProjectOut([0.0, 0.0]), "one axis and some length"),
    "direction of two axes": (lambda: ProjectOut([[1.0]]), r"found shape \(1, 1\)"),
    "empty positions": (lambda: Patch("resid_post.1", 0.0, positions=()), r"positions=\[\] .* expected some"),
    "empty heads": (lambda: Patch("z.1", 0.0, heads=[]), r"heads=\[\] .* expected some"),
    "position twice": (lambda: Patch("resid_post.1", 0.0, positions=(1, 1)), "each one once"),
    "a bare position": (lambda: Patch("resid_post.1", 0.0, positions=1), r"such as positions=\(0, 3\)"),
    "half a position": (lambda: Patch("resid_post.1", 0.0, positions=(0.5,)), "expected a list of whole numbers"),
    "heads elsewhere": (lambda: Patch("resid_post.1", 0.0, heads=(0,)), "'resid_post' has no heads; points that do: q"),
    "knock-out elsewhere": (lambda: Patch("z.1", KnockOut((0,), (1,))), "KnockOut is the edit of 'pattern'"),
    "scaled pattern": (lambda: Patch("pattern.1", 0.0), "Scale does not fit the point 'pattern'"),
    "positions of a knock-out": (
        lambda: Patch("pattern.1", KnockOut((0,), (1,)), positions=(1,)),
        "names queries and keys itself",
    ),
    "nothing knocked out": (lambda: KnockOut(keys=()), "empty keys cuts nothing"),
    "nobody knocked out": (lambda: KnockOut(queries=[]), "empty queries cuts nothing"),
    "uneven difference": (lambda: LogitDifference((1, 2), (1,)), "one id per text; found 2 for and 1 against"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_model_could_do_is_refused_when_it_is_written(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(InputError, match=message):
        make()


def test_unknown_point_is_a_lookup_error() -> None:
    with pytest.raises(UnknownName):
        Patch("residual.1", 0.0)


MISFITS: dict[str, tuple[Patch, str]] = {
    "head": (Patch("z.1", 0.0, heads=(4,)), r"Heads \[4\] at z.1: 'tiny' has 4 heads there\."),
    "grouped head": (
        Patch("k.1", 0.0, heads=(3,)),
        r"'tiny' has 2 key-value heads there; its queries have 4, several of which share one",
    ),
    "dimension": (Patch("resid_post.1", 0.0, dims=(6,)), r"Dimensions \[6\] at resid_post.1: it has 6, 0 to 5"),
    "dimension twice": (Patch("resid_post.1", 0.0, dims=(5, -1)), r"dims=\[5, -1\] .* two of them are the same"),
    "hidden unit": (Patch("mlp_act.1", 0.0, dims=(10,)), "it has 10, 0 to 9"),
    "position": (Patch("resid_post.1", 0.0, positions=(4,)), "text 1 has 3 tokens, 0 to 2"),
    "position from the end": (Patch("resid_post.1", 0.0, positions=(-4,)), "text 1 has 3 tokens"),
    "position twice": (Patch("resid_post.1", 0.0, positions=(2, -1)), r"positions=\[2, -1\] .* the same one of 3"),
    "width": (Patch("resid_post.1", Add(np.ones(5))), r"shape \(5,\) at resid_post.1 do not fit text 0: .* 5 × 6"),
    "rows": (Patch("resid_post.1", Replace(np.ones((5, 6)))), "do not fit text 1: the patch selects 3 × 6"),
    "too many axes": (Patch("resid_post.1", Replace(np.ones((1, 1, 6)))), r"shape \(1, 1, 6\)"),
    "heads of values": (Patch("k.1", Replace(np.ones((4, 2)))), "the patch selects 5 × 2 × 2"),
    "direction": (Patch("q.1", ProjectOut(np.ones(8))), "the patch selects 5 × 4 × 2"),
    "blind query": (Patch("pattern.1", KnockOut((0,))), "leaves query 0 of text 0 no key to look at"),
    "blind query, named": (Patch("pattern.1", KnockOut((0, 1, -1), (1,)), texts=(1,)), "leaves query 1 of text 1"),
    "key": (Patch("pattern.1", KnockOut((3,), (4,))), "Position 3 at pattern.1: text 1 has 3 tokens"),
    "query": (Patch("pattern.1", KnockOut((0,), (-4,))), "Position -4 at pattern.1: text 1 has 3 tokens"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_the_model_or_the_texts_is_refused(name: str) -> None:
    patch, message = MISFITS[name]
    with pytest.raises(InputError, match=message):
        check(patch)


def test_a_patch_is_held_against_its_own_texts_only() -> None:
    check(Patch("resid_post.1", 0.0, positions=(4,), texts=(0,)))
    check(Patch("resid_post.1", Replace(np.ones((5, 6))), texts=(0,)))
    check(Patch("pattern.1", KnockOut((0,), (-1,))))

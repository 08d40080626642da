"""Massive entries as places: which are found, what stands in for them, and controls that touch none of them."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import texts_of

from probekit.core import Batch, Replace, Scale, TokenText
from probekit.methods.extremes import (
    ROLES,
    WHY,
    Entry,
    Largest,
    averaged,
    carriers_in_words,
    changes,
    in_words,
    other_dims,
    other_positions,
    token_roles,
    zeroed,
)

WIDTH, LENGTHS = 12, (4, 3, 5)


def largest_of(planted: dict[tuple[int, int, int, int], float], n_layers: int = 4, top_k: int = 3) -> Largest:
    """Ones everywhere, and values at (layer, text, position, dimension); batch indices differ from rows."""
    texts = texts_of(LENGTHS)
    batch = Batch(texts.texts, index=(7, 2, 9))
    h = np.ones((n_layers, batch.n_tokens, WIDTH))
    for (layer, text, pos, dim), value in planted.items():
        h[layer, batch.starts[text] + pos, dim] = value
    order = np.argsort(-np.abs(h), axis=-1, kind="stable")[..., :top_k]
    median = np.stack(
        [np.median(np.abs(h[:, s : s + n]), axis=(1, 2)) for s, n in zip(batch.starts, LENGTHS, strict=True)], axis=1
    )
    return Largest(np.take_along_axis(h, order, -1), order, median, batch)


def test_entries_by_text_position_and_falling_magnitude() -> None:
    """Both bounds are strict; sign is kept."""
    found = largest_of({(1, 0, 2, 5): 1500.0, (1, 0, 2, 6): -2000.0, (1, 2, 0, 5): 1001.0, (1, 1, 1, 4): 1000.0})
    assert found.entries(1) == (Entry(1, 0, 2, 6, -2000.0), Entry(1, 0, 2, 5, 1500.0), Entry(1, 2, 0, 5, 1001.0))
    assert found.entries(0) == () and len(found.entries(1, ratio=999.0)) == 4
    assert found.entries(1, min_magnitude=1500.0) == (Entry(1, 0, 2, 6, -2000.0),)


def test_blocks_and_the_first_of_them() -> None:
    """Block 1 in one text of three, block 2 in two, block 3 in all."""
    places = {(layer, text, 0, 5): 2000.0 for layer in (1, 2, 3) for text in range(layer)}
    found = largest_of(places)
    assert found.layers() == [1, 2, 3] and found.layers(share=0.5) == [2, 3] and found.layers(share=1.0) == [3]
    assert found.first() == 2 and found.first(ratio=3000.0) is None
    assert largest_of({(1, 0, 0, 5): 2000.0}).first() == 1, "no block holds them in half of the texts"
    assert found.layers(ratio=3000.0) == []


def test_variables_of_a_result() -> None:
    """Counts per layer, token and dimension; a text counts once however many of its tokens hold an entry."""
    found = largest_of({(1, 0, 0, 5): 2000.0, (2, 0, 0, 5): 2500.0, (2, 0, 3, 5): -2000.0, (2, 2, 1, 8): 600.0})
    data = found.carriers(WIDTH, 100.0, {"": 1000.0, "_loose": 500.0})
    assert data["n_massive"][1].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 0])
    assert data["n_massive_loose"][1].tolist() == pytest.approx([0, 1 / 3, 1, 0])
    assert data["massive_layers"][1].tolist() == [2, 0, 0, 1, *[0] * 8]
    assert data["massive_layers_loose"][1].tolist() == [2, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0]
    assert np.flatnonzero(data["dim_texts"][1]).tolist() == [5] and data["dim_texts"][1][5] == 1
    assert data["dim_texts_loose"][1][[5, 8]].tolist() == [1, 1]


def test_peaks_their_paths_and_writers() -> None:
    """Followed at its own place; unknown where the token's three largest are others, and counted as zero there."""
    places = {(1, 0, 2, 6): -900.0, (2, 0, 2, 6): -2000.0, (3, 0, 2, 6): 0.5, (3, 0, 2, 1): 9.0, (1, 2, 4, 3): 700.0}
    found = largest_of(places)
    mlp, attention = np.ones((4, 12)), np.ones((4, 12))
    mlp[2, 2], attention[2, 2] = 30.0, 10.0
    mlp[1, 11] = attention[1, 11] = 0.0
    data = {name: values for name, (_, values) in found.peaks(mlp, attention).items()}
    assert (data["peak_pos"][0], data["peak_dim"][0], data["peak_layer"][0]) == (2, 6, 2)
    assert (data["peak_pos"][2], data["peak_dim"][2], data["peak_layer"][2]) == (4, 3, 1)
    np.testing.assert_array_equal(data["peak_path"][:, 0], [np.nan, -900, -2000, np.nan])
    assert data["writer"].tolist()[::2] == [2, 1] and data["writer_mlp_share"].tolist()[::2] == [0.75, 0.0]


ENTRIES = (
    Entry(1, 0, 0, 5, -1000.0), Entry(1, 0, 2, 5, 10.0), Entry(1, 1, 0, 5, -2000.0), Entry(1, 2, 0, 5, -4000.0),
    Entry(1, 2, 0, 6, 300.0), Entry(1, 2, 3, 5, 30.0),
)  # fmt: skip


def test_zero_and_mean_of_the_other_texts() -> None:
    """Sign included, own text held out, the first position apart from later ones; without others, left alone."""
    batch = largest_of({}).batch
    zero = zeroed(ENTRIES, batch)
    assert [(p.texts, p.positions, p.dims) for p in zero] == [
        ((7,), (0,), (5,)), ((7,), (2,), (5,)), ((2,), (0,), (5,)), ((9,), (0,), (5,)), ((9,), (0,), (6,)),
        ((9,), (3,), (5,)),
    ]  # fmt: skip
    assert all(p.edit == Scale(0.0) and (p.point.site, p.point.layer) == ("resid_post", 1) for p in zero)
    means = {(p.texts, p.positions): p.edit for p in averaged(ENTRIES, batch)}
    expected = {
        ((7,), (0,)): -3000.0,
        ((7,), (2,)): 30.0,
        ((2,), (0,)): -2500.0,
        ((9,), (0,)): -1500.0,
        ((9,), (3,)): 10.0,
    }
    assert set(means) == set(expected), "dimension 6 occurs in one text only"
    for place, value in expected.items():
        edit = means[place]
        assert isinstance(edit, Replace) and edit.values.array.tolist() == [[value]]
    assert averaged(ENTRIES[:2], batch) == ()


def test_controls_touch_as_many_entries_and_none_that_is_massive() -> None:
    """Over seeds: other dimensions of the same tokens; the same dimensions of other tokens."""
    batch = largest_of({}).batch
    row = {7: 0, 2: 1, 9: 2}
    held = {(e.text, e.pos, e.dim) for e in ENTRIES}
    drawn = set()
    for seed in range(20):
        dims, positions = other_dims(ENTRIES, batch, WIDTH, seed), other_positions(ENTRIES, batch, seed)
        for patches in (dims, positions):
            places = {
                (row[p.texts[0]], p.positions[0], p.dims[0]) for p in patches if p.texts and p.positions and p.dims
            }
            assert len(places) == len(patches) == len(ENTRIES) and not places & held
            assert all(p.edit == Scale(0.0) and p.point.layer == 1 for p in patches)
        assert {(p.texts, p.positions) for p in dims} == {
            ((b,), (e.pos,)) for e in ENTRIES for b in row if row[b] == e.text
        }
        assert not {d for p in dims for d in p.dims or ()} & {5, 6}
        assert sorted(p.dims for p in positions) == sorted((e.dim,) for e in ENTRIES)
        drawn |= {p.positions for p in positions}
    assert len(drawn) > 2 and other_dims(ENTRIES, batch, WIDTH) == other_dims(ENTRIES, batch, WIDTH)


def test_controls_where_no_place_is_left() -> None:
    """All tokens hold an entry, or all dimensions do: there is no such control, and its case is left out."""
    batch = largest_of({}).batch
    everywhere = [Entry(0, 1, pos, 5, 2000.0) for pos in range(3)]
    assert other_positions(everywhere, batch) == () and len(other_dims(everywhere, batch, WIDTH)) == 3
    assert other_dims([Entry(0, 1, 1, 0, 2000.0)], batch, 1) == ()
    assert list(changes(everywhere, batch, WIDTH)) == ["zero", "other dimension"]
    assert list(changes(ENTRIES, batch, WIDTH)) == list(WHY) and changes((), batch, WIDTH) == {}


@pytest.mark.parametrize(
    ("shown", "role"),
    [
        (".", "first delimiter"), (" .", "first delimiter"), ("\n", "first delimiter"), (".\n\n", "first delimiter"),
        ("\r\n", "first delimiter"), ("...", "other"), (",", "other"), (" ", "other"), (".5", "other"), ("", "other"),
        ("<|endoftext|>", "special"), ("</s>", "special"), (" [SEP]", "special"), ("<pad>", "special"),
        ("<b>", "other"), ("[1]", "other"), ("<|", "other"),
    ],
)  # fmt: skip
def test_role_of_one_token(shown: str, role: str) -> None:
    batch = Batch((TokenText((5, 6, 7), ("Once", shown, " upon")),))
    assert token_roles(batch).tolist() == ["first position", role, "other"]


def test_roles_start_anew_in_every_text() -> None:
    """A delimiter at the first position is that position, and does not count as the first; ids tell special tokens."""
    one = TokenText((5, 6, 7, 6), (".", ".", "x", "."))
    batch = Batch((one, one, TokenText((7, 5), ("x", "."))))
    first = ["first position", "first delimiter", "other", "delimiter"]
    assert token_roles(batch).tolist() == [*first, *first, "first position", "first delimiter"]
    assert token_roles(batch, bos_id=6).tolist()[:4] == ["first position", "special", "other", "special"]
    assert set(token_roles(batch)) <= set(ROLES)


def test_words() -> None:
    assert in_words([]) == "none" and in_words([4]) == "4" and in_words([2, 3, 4, 8, 11, 12]) == "2 to 4, 8, 11 to 12"
    shown = np.array(list("abcdeab"), dtype=object)
    role = np.array([*["first position"] * 5, "other", "other"], dtype=object)
    words = carriers_in_words(np.arange(7) != 6, role, shown, np.array([0, 1, 2, 3, 4, 4, 4]))
    assert words == "the first position in 5 texts ('a', 'b', 'c', …); another token in 1 text ('a')"

"""Texts laid end to end: every view of a batch agrees with the plain lists it was made of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probekit.core import Batch, TokenText, token_coords

TEXTS = st.lists(st.lists(st.integers(0, 50_000), min_size=1, max_size=12), min_size=1, max_size=6)


def batch_of(ids: list[list[int]]) -> Batch:
    return Batch(tuple(TokenText(tuple(i), tuple(f"<{x}>" for x in i)) for i in ids))


@given(TEXTS)
def test_views_agree_with_the_lists(ids: list[list[int]]) -> None:
    batch = batch_of(ids)
    assert batch.ids.tolist() == [x for i in ids for x in i]
    assert batch.pos.tolist() == [p for i in ids for p in range(len(i))]
    assert batch.text_of_token.tolist() == [t for t, i in enumerate(ids) for _ in i]
    assert batch.next_ids.tolist() == [x for i in ids for x in [*i[1:], -1]]
    assert batch.strings == tuple(f"<{x}>" for i in ids for x in i)
    assert batch.lengths == tuple(map(len, ids)) and batch.n_tokens == sum(map(len, ids)) and len(batch) == len(ids)
    assert [batch.ids[s] for s in batch.starts] == [i[0] for i in ids]
    coords = token_coords(batch)
    assert all(dims == "token" and len(values) == batch.n_tokens for dims, values in coords.values())


@given(TEXTS, st.randoms())
def test_selected_texts_keep_their_corpus_index(ids: list[list[int]], random: object) -> None:
    batch = batch_of(ids)
    order = list(range(len(ids)))
    random.shuffle(order)  # type: ignore[attr-defined]
    some = batch.select(order).select(range(0, len(order), 2))
    assert some.index == tuple(order[::2])
    assert [t.ids for t in some] == [tuple(ids[i]) for i in order[::2]]
    assert set(some.text_of_token.tolist()) == set(some.index)


@given(TEXTS, st.integers(1, 6))
def test_windows_are_consecutive_and_full(ids: list[list[int]], size: int) -> None:
    cut = batch_of(ids).windows(size)
    assert set(cut.lengths) <= {size}
    assert [t.ids for t in cut] == [tuple(i[a : a + size]) for i in ids for a in range(0, len(i) - size + 1, size)]
    assert all(t.strings == tuple(f"<{x}>" for x in t.ids) for t in cut)


def test_digest_depends_on_ids_and_boundaries_alone() -> None:
    digests = {batch_of(i).digest for i in ([[1, 2, 3]], [[1, 2], [3]], [[1], [2, 3]], [[1, 2, 4]])}
    assert len(digests) == 4
    same = Batch((TokenText((1, 2, 3), ("a", "b", "c")),), "never")
    assert same.digest == batch_of([[1, 2, 3]]).digest


def test_ids_and_strings_must_match() -> None:
    with pytest.raises(ValueError, match="2 ids but 1 strings"):
        TokenText((1, 2), ("a",))

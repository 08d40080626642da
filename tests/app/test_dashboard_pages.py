"""The pure parts of the pages: windows, alternatives, rollouts and their tallies, interventions as patches, tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import xarray as xr
from helpers import scripted, tiny_model
from probekit_dashboard import interventions, rollouts, window
from probekit_dashboard.interventions import Intervention
from probekit_dashboard.rollouts import SILENT, Found, Live, Option, Plan, Row
from probekit_dashboard.views import critical, forks, massive

import probekit as pk
from probekit import stats

WORD = pk.sampling.Pattern(r"(w\d+)$")


# --- windows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "n", "first", "stop"), [(0, 5, 0, 5), (0, 500, 0, 160), (250, 500, 170, 330), (499, 500, 340, 500)]
)
def test_a_window_lies_around_the_selection(token: int, n: int, first: int, stop: int) -> None:
    columns = window.around(token, n)
    assert (columns.edges[0], columns.edges[-1]) == (first, stop) and not columns.whole
    assert columns.token_at(columns.column_of(token), np.zeros(n)) == token


def test_a_long_text_shows_the_largest_value_of_several_tokens() -> None:
    values = np.full((2, 4000), 1.0)
    values[1, 1234], values[0, :30] = 9.0, np.nan
    columns = window.whole(4000)
    shown = columns.largest(values)
    assert len(columns) == window.WIDEST == shown.shape[1] and columns.whole
    column = columns.column_of(1234)
    assert shown[1].argmax() == column and shown[1, column] == 9.0
    assert np.isnan(shown[0, 0]) and shown[0, 2] == 1.0
    assert columns.token_at(column, values[1]) == 1234
    assert columns.labels(["x"] * 4000)[0] == "0–24"


# --- alternatives ------------------------------------------------------------------------------------------------------


def uncertainty() -> xr.Dataset:
    """Two places of a text of three tokens: after 5 comes 7 (not among the likeliest), then 8 (the likeliest)."""
    return xr.Dataset(
        {
            "top_id": (("token", "rank"), [[1, 2], [8, 1], [2, 1]]),
            "top_logprob": (("token", "rank"), np.log([[0.6, 0.3], [0.9, 0.04], [0.5, 0.5]])),
            "surprisal_nats": ("token", [-np.log(0.01), -np.log(0.9), np.nan]),
            "vocab_str": ("vocab", np.array([" a", " b", "\n", "<img>"], dtype=object)),
        },
        coords={
            "vocab": [1, 2, 7, 8], "token_id": ("token", [5, 7, 8]),
            "token_str": ("token", np.array(["x", "\n", "<img>"], dtype=object)),
        },
    )  # fmt: skip


def test_alternatives_of_a_place_come_from_the_row_before_it() -> None:
    some = rollouts.options(uncertainty(), 1)
    assert [(o.token, o.own) for o in some] == [(1, False), (2, False), (7, True)]
    np.testing.assert_allclose([o.probability for o in some], [0.6, 0.3, 0.01])
    assert some[2].label.startswith("↵") and some[2].label.endswith("(stands there)")
    later = rollouts.options(uncertainty(), 2)
    assert [(o.token, o.own) for o in later] == [(8, True), (1, False)]
    end = rollouts.options(uncertainty(), 3)
    assert [o.token for o in end] == [2, 1] and not any(o.own for o in end)


def test_at_first_the_own_and_the_likely_ones_are_chosen() -> None:
    assert [o.token for o in rollouts.chosen_at_first(rollouts.options(uncertainty(), 1))] == [1, 2, 7]
    assert [o.token for o in rollouts.chosen_at_first(rollouts.options(uncertainty(), 2))] == [8, 1]  # 4 %, but two
    many = [Option(i, str(i), 0.1) for i in range(9)] + [Option(99, "own", 0.001, True)]
    chosen = rollouts.chosen_at_first(many)
    assert len(chosen) == rollouts.MOST_CHOSEN and chosen[-1].token == 99


def test_answers_are_read_from_the_beginning_of_their_line() -> None:
    tokens = ["Q", ":", "\n", "A", ":", " 1"]
    assert [rollouts.line_start(tokens, i) for i in (1, 2, 3, 4, 6)] == [1, 1, 3, 3, 3]


# --- rollouts ----------------------------------------------------------------------------------------------------------


def plan(per: int = 5, tokens: tuple[int, ...] = (1, 2, 3)) -> Plan:
    return Plan((4, 5), 1, tokens, per, pk.Sampling(max_tokens=3), WORD)


def rows(token: int, *samples: int, outcome: str = "a") -> list[Row]:
    return [Row(token, i, outcome, "", "length", 0.0) for i in samples]


def test_rounds_ask_for_everything_once_and_begin_small() -> None:
    asked: dict[int, list[int]] = {1: [], 2: [], 3: []}
    requests = list(plan(per=20).rounds(Found()))
    for request in requests:
        assert request.n * len(request.forks) <= rollouts.TOGETHER
        for fork in request.forks:
            assert fork.position == 2 and fork.token is not None
            asked[fork.token] += range(request.first, request.first + request.n)
    assert requests[0].n == 1
    assert asked == {token: list(range(20)) for token in (1, 2, 3)}


def test_rounds_leave_out_what_is_there() -> None:
    found = Found((*rows(1, 0, 1, 2), *rows(2, 0)))
    asked = [(f.token, i) for r in plan().rounds(found) for f in r.forks for i in range(r.first, r.first + r.n)]
    assert sorted(asked) == [(1, 3), (1, 4), *((2, i) for i in (1, 2, 3, 4)), *((3, i) for i in range(5))]
    assert not list(plan(per=1).rounds(Found((*rows(1, 0), *rows(2, 0), *rows(3, 0)))))


def writer(look: Callable[[int], None] = lambda n: None) -> Any:
    """A scripted model: after token 1 always 6, after token 2 always 7, else 9."""
    calls = [0]

    def writes(ids: Any) -> np.ndarray:
        calls[0] += 1
        look(calls[0])
        p = np.zeros(16)
        p[{1: 6, 2: 7}.get(ids[2] if len(ids) > 2 else -1, 9)] = 1.0
        return p

    return scripted(writes=writes)


def test_continuations_are_written_and_said_step_by_step() -> None:
    live, told = Live(), []
    found = rollouts.write(writer(), plan(per=4, tokens=(1, 2)), live, told.append)
    assert [(r.token, r.outcome) for r in found.rows[:2]] == [(1, "w6"), (2, "w7")]
    assert len(found.of(1)) == len(found.of(2)) == 4 and live.found is found
    assert (told[0].done, told[-1].done, told[-1].total) == (0, 8, 8)
    done = [s.done for s in told]
    assert done == sorted(done)
    again = rollouts.write(
        writer(lambda n: pytest.fail("written twice")), plan(per=4, tokens=(1, 2)), live, told.append
    )
    assert again is found
    more = rollouts.write(writer(), plan(per=6, tokens=(1, 2, 3)), live, told.append)
    assert [len(more.of(t)) for t in (1, 2, 3)] == [6, 6, 6] and more.rows[:8] == found.rows


def test_what_is_there_is_not_added_twice() -> None:
    live = Live(Found(tuple(rows(1, 0, 1))))
    live.add([*rows(1, 1, 2), *rows(2, 0)])
    assert [(r.token, r.sample) for r in live.found.rows] == [(1, 0), (1, 1), (1, 2), (2, 0)]
    assert live.found.nbytes > 0


def test_a_cancel_ends_a_round_and_keeps_what_was_written() -> None:
    stop, written = [False], [0]

    def look(n: int) -> None:
        written[0] = n
        stop[0] = n > 430

    def tell(step: pk.Step) -> None:
        if stop[0]:
            raise pk.Cancelled("enough")

    live = Live()
    long = replace(plan(per=10, tokens=(1, 2)), sampling=pk.Sampling(max_tokens=200))
    with pytest.raises(pk.Cancelled):
        rollouts.write(writer(look), long, live, tell)
    assert len(live.found.rows) == 2  # the first round, of 400 tokens
    assert 430 < written[0] <= 436  # within a few tokens, not at the end of a continuation


def test_tallies_have_shares_and_wilson_intervals() -> None:
    found = Found((*rows(1, 0, 1, 2), *rows(1, 3, outcome="b"), *rows(2, 0, 1, outcome=SILENT)))
    some = [Option(1, " x", 0.7, True), Option(2, " y", 0.2), Option(3, " z", 0.1)]
    table = rollouts.tally(found, some).set_index(["alternative", "outcome"])
    one = table.loc[("␣x", "a")]
    assert (one["count"], one["of"], one["share"]) == (3, 4, 0.75)
    assert (one["low"], one["high"]) == stats.wilson(3, 4)
    assert table.loc[("␣y", SILENT)]["share"] == 1.0
    assert "␣z" not in table.index.get_level_values(0)  # nothing was written of it
    assert rollouts.outcomes_of(found, [1, 2]) == ["a", "b", SILENT]


def test_rare_outcomes_are_taken_together() -> None:
    found = Found(tuple(r for i in range(9) for r in rows(1, i, outcome=f"o{i}")))
    table = rollouts.tally(found, [Option(1, "x", 1.0)])
    assert table["count"].sum() == 9 and table[table["outcome"] == "others"]["count"].item() == 3
    figure = rollouts.shares_drawn(table, "o0", "toy")
    assert "11% of the continuations" in figure.title and figure.plot.data[0].error_x.arrayminus[0] > 0


def test_bytes_of_one_character_are_put_together() -> None:
    assert rollouts.whole_characters(r"a \xf0\x9f\x98\x80 b \xf0 \x41") == r"a 😀 b \xf0 \x41"


@pytest.mark.parametrize(
    ("read", "said", "text", "answer"),
    [
        ("the last number", "", "5 + 2 = 1,007.", "1007"),
        ("the first line", "", "\n  one two \nthree", "one two"),
        ("words", "yes, no", "Oh No, yes", "no"),
        ("a letter of choices", "AB", "I say B.", "B"),
        ("a regular expression", r"is (\w+)", "it is so", "so"),
    ],
)
def test_what_an_answer_says(read: str, said: str, text: str, answer: str) -> None:
    assert read in forks._READ and forks.outcome_of(read, said).read(text) == answer


@pytest.mark.parametrize(
    ("read", "said"), [("words", " , "), ("a letter of choices", "A"), ("a regular expression", "(")]
)
def test_a_rule_that_cannot_be_read_is_said_in_words(read: str, said: str) -> None:
    with pytest.raises(pk.ProbekitError, match=r"xpected|is no regular expression|Choices"):
        forks.outcome_of(read, said)


# --- interventions -----------------------------------------------------------------------------------------------------

MANY = (
    Intervention("zero", "mlp_out", 0, positions=(1,)),
    Intervention("scale", "resid_post", 1, factor=2.5),
    Intervention("zero", "z", 1, head=2, positions=(0, 1)),
    Intervention("add", "z", 1, head=1, positions=(1,), factor=3.0, toward=("w3 w4",), away=("w5", "w6")),
    Intervention("replace", "attn_out", 0, positions=(2,), other="w7 w8 w9", other_position=-1),
    Intervention("cut", "pattern", 1, head=3, positions=(1, 2, 3), keys=(0,)),
)  # fmt: skip
TEXT = "w3 w4 w5 w6"


def test_patches_say_what_the_form_says() -> None:
    model = tiny_model("llama").model
    zero, scale, head, add, swap, cut = (one.patch(model) for one in MANY)
    assert zero == pk.Patch("mlp_out.0", 0.0, (1,)) and scale == pk.Patch("resid_post.1", 2.5)
    assert head == pk.Patch("z.1", 0.0, (0, 1), heads=(2,))
    direction = pk.difference_of_means(model, "z.1", ["w3 w4"], ["w5", "w6"]).isel(head=1)
    assert add == pk.Patch("z.1", pk.Add(direction, 3.0), (1,), heads=(1,))
    there = pk.cache(model, "w7 w8 w9", "attn_out.0")["attn_out", 0].values[-1]
    assert swap == pk.Patch("attn_out.0", pk.Replace(there), (2,))
    assert cut == pk.Patch("pattern.1", pk.KnockOut((0,), (1, 2, 3)), heads=(3,))


@pytest.mark.parametrize("one", MANY, ids=lambda one: one.action + one.site)
def test_the_python_of_a_change_makes_its_patch(one: Intervention) -> None:
    model = tiny_model("llama").model
    space: dict[str, Any] = {"pk": pk, "model": model, "patches": []}
    exec("\n".join(one.code()), space)
    assert space["patches"] == [one.patch(model)]


def test_what_does_not_fit_is_said_before_it_runs() -> None:
    info = tiny_model("llama").model.info
    assert all(one.problem(info, 4) == "" for one in MANY)
    for one, said in (
        (replace(MANY[0], layer=99), "Block 99 does not exist: the model has the blocks 0 to"),
        (replace(MANY[0], positions=(4,)), "Token 4 does not exist: the text has the tokens 0 to 3"),
        (replace(MANY[2], head=77), "Head 77 does not exist"),
        (replace(MANY[5], positions=()), "no later token"),
        (replace(MANY[3], away=()), "texts on both sides"),
        (replace(MANY[4], other="  "), "Type the text"),
        (replace(MANY[0], site="router"), "no point 'router'"),
    ):
        assert said in one.problem(info, 4), one
    with pytest.raises(pk.ProbekitError, match="no token 7: it has 3, 0 to 2"):
        replace(MANY[4], other_position=7).patch(tiny_model("llama").model)


def test_changes_in_words() -> None:
    tokens = ["a", " b", "<c>", "\n"]
    assert MANY[0].words(tokens) == "Set to zero: output of the MLP, block 0, at token 1 (␣b)"
    assert MANY[1].words(tokens) == "Scale by 2.5: residual stream after the block, block 1, at all tokens"
    assert "direction 'w3 w4' minus 'w5' and 1 more: output of one head (z), block 1, head 1" in MANY[3].words(tokens)
    assert "Replace by the last token of 'w7 w8 w9'" in MANY[4].words(tokens)
    assert MANY[5].words(tokens) == "Block 1, head 3: tokens 1 (␣b), 2 (<c>), 3 (↵) cannot look at token 0 (a)"


def test_a_run_measures_and_writes_with_and_without() -> None:
    model, told = tiny_model("llama").model, []
    out = interventions.run(model, TEXT, MANY, position=3, n_tokens=3, tell=told.append)
    assert out.effect.kl_nats > 0 and out.nbytes > 0
    assert out.before == pk.generate(model, TEXT, 3).texts[0]
    patches = [one.patch(model) for one in MANY]
    assert out.after == pk.generate(model, TEXT, 3, patches=patches).texts[0]
    table = interventions.next_tokens(out.effect)
    np.testing.assert_allclose(table["change"], table["after"] - table["before"])
    assert (np.diff(table[["before", "after"]].max(axis=1)) <= 0).all()
    assert interventions.change_drawn(out.effect, "toy").plot.data and told[-1].total == 3
    assert "nats per token" in interventions.losses_drawn(out.effect, slice(0, 4), "toy").title
    code = interventions.code_for("m", TEXT, MANY, position=3, n_tokens=3)
    compile(code, "code", "exec")


# --- massive, critical -------------------------------------------------------------------------------------------------


def test_losses_by_case_are_those_of_one_text() -> None:
    loss = np.array([[1.0, 3.0, np.nan, 9.0, np.nan], [2.0, 4.0, np.nan, 0.0, np.nan]])
    data = xr.Dataset(
        {"loss_nats": (("case", "token"), loss)},
        coords={"case": ["as it is", "zero"], "text": ("token", [0, 0, 0, 1, 1]), "pos": ("token", [0, 1, 2, 0, 1])},
    )
    table = massive.losses_by_case(Results(data))  # type: ignore[arg-type]
    assert table["loss (nats per token)"].tolist() == [2.0, 3.0] and table["change (nats per token)"].tolist() == [0, 1]
    np.testing.assert_allclose(table["perplexity"], np.exp([2.0, 3.0]))


class Results:
    """As much of a result as the tables read."""

    def __init__(self, dataset: xr.Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, name: str) -> xr.DataArray:
        return self.dataset[name]


def test_the_landscape_shows_the_largest_dimensions_and_the_first_token() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(300, 90))
    values[0, 77] = -500.0
    strings = np.array([f"t{i}" for i in range(300)], dtype=object)
    array = xr.DataArray(values, dims=("token", "d_model"), coords={"token_str": ("token", strings)})
    figure = massive.landscape_of(array, 200, 3, "toy")
    assert "magnitude is 500, in dimension 77 of token 0" in figure.title
    assert len(figure.plot.data[1].z) == massive.MOST_TOKENS * massive.MOST_DIMS
    assert any("(200)" in t for t in figure.plot.layout.scene.xaxis.ticktext) and "of 300" in figure.caption


def test_a_wrong_answer_becomes_a_text_with_its_critical_token_selected() -> None:
    strings = np.array(["It", " is", " 1", "4", ".", "<|im_end|>"], dtype=object)
    data = xr.Dataset({"critical": ("token", [0, 0, 1, 0, 0, 0])}, coords={"token_str": ("token", strings)})
    text, offset = critical.as_text(Results(data), "How many?")  # type: ignore[arg-type]
    assert text == "How many?\nIt is 14." and text[offset:] == " 14."
    assert critical.token_at(["How", " many", "?", "\n", "It", " is", " 14", "."], offset) == 6
    assert critical.token_at(["How"], 99) == 0
    assert critical._problem("", "1") and critical._problem("a", " ") and not critical._problem("a", "1")


def test_the_table_of_a_wrong_answer_leaves_out_what_was_not_measured() -> None:
    data = xr.Dataset(
        {
            "success_share": ("token", [np.nan, 0.25, 0.0]), "drawn": ("token", [0, 4, 16]), "how": ("token", [0, 1, 2]),
            "critical": ("token", [0, 0, 1]),
        },
        coords={"token_str": ("token", np.array(["a", "\n", " c"], dtype=object))},
    )  # fmt: skip
    table = critical.answer_table(Results(data))  # type: ignore[arg-type]
    assert table["place"].tolist() == [1, 2] and table["token"].tolist() == ["↵", "␣c"]
    assert table["right continuations"].tolist() == [0.25, 0.0] and table["of"].tolist() == [4, 16]
    assert table["measured"].tolist() == ["continued", "as a later one"] and table[""].tolist() == ["", "critical"]

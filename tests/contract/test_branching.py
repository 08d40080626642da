"""Continuations of shared prefixes: what the plain model would give, whoever runs beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from eager_families import Family, family_of
from helpers import assert_close, copy_of, tiny_model, words_tokenizer
from routed_families import tiny_routed
from tiny_configs import KINDS

from probekit.backends.transformers import TransformersModel
from probekit.backends.transformers.branching import branch_bytes, fitting_rows, write_branches
from probekit.core import (
    Base,
    Branch,
    Branches,
    CapabilityError,
    Continuation,
    Fork,
    InputError,
    PlanError,
    Sampling,
    TextError,
    joined,
)

LIMIT = 1 << 30
RNG = np.random.default_rng(3)
BASES = tuple(Base(tuple(int(i) for i in RNG.integers(3, 120, n)), 4) for n in (23, 14))
FORKS = (Fork(0, 4), Fork(0, 9, 17), Fork(0, 9, 30), Fork(1, 14), Fork(0, 22, 5), Fork(1, 6, 40))
REQUEST = Branch(BASES, FORKS, n=3, sampling=Sampling(max_tokens=12, seed=1))


def write(model: TransformersModel, request: Branch, rows: int | None = None) -> Branches:
    found: dict[Fork, list[Continuation]] = {f: [] for f in request.forks}
    write_branches(model, request, lambda fork, one: found[fork].append(one), memory_limit=LIMIT, rows=rows)
    return Branches(request, tuple(tuple(sorted(found[f], key=lambda c: c.sample)) for f in request.forks))


def own_logprobs(module: Any, ids: tuple[int, ...]) -> np.ndarray:
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    return np.asarray(logits.log_softmax(-1))


@pytest.mark.parametrize("name", KINDS)
def test_log_probabilities_are_those_of_the_whole_text(name: str) -> None:
    """Every family, eager and uncached: windows, soft-caps, sinks, grouped heads; prefixes of different lengths."""
    family: Family = family_of(name)
    found = write(family.model, REQUEST, rows=5)
    for fork, continuations in zip(FORKS, found.continuations, strict=True):
        assert [c.sample for c in continuations] == [0, 1, 2]
        base = BASES[fork.base].ids[: fork.position]
        for one in continuations:
            assert fork.token is None or one.ids[0] == fork.token
            log_p = own_logprobs(family.reference, (*base, *one.ids))
            rows = np.arange(len(base) - 1, len(base) + len(one.ids) - 1)
            assert_close(np.array(one.logprobs_nats), log_p[rows, list(one.ids)], atol=1e-4, what=f"{fork}")


@pytest.mark.parametrize("rows", [1, 2, 7, 18, 100])
def test_what_runs_beside_a_continuation_changes_nothing(rows: int) -> None:
    model = tiny_model("llama-grouped").model
    alone, together = write(model, REQUEST, rows=4), write(model, REQUEST, rows=rows)
    for a, b in zip(alone.continuations, together.continuations, strict=True):
        assert [c.ids for c in a] == [c.ids for c in b]
        assert [c.stopped for c in a] == [c.stopped for c in b]


def test_more_samples_and_more_tokens_extend_earlier_ones() -> None:
    model = tiny_model("llama").model
    few, more = write(model, REQUEST), write(model, replace(REQUEST, n=6))
    rest = write(model, replace(REQUEST, first=3))
    assert [c[:3] for c in more.continuations] == list(few.continuations)
    assert [[x.ids for x in c] for c in joined([few, rest]).continuations] == [
        [x.ids for x in c] for c in more.continuations
    ]
    longer = write(model, replace(REQUEST, sampling=replace(REQUEST.sampling, max_tokens=20)))
    for short, long in zip(few.continuations, longer.continuations, strict=True):
        for a, b in zip(short, long, strict=True):
            assert b.ids[: len(a.ids)] == a.ids
    with pytest.raises(InputError, match="follow one another"):
        joined([few, few])


def test_forks_with_the_same_prefix_draw_alike_and_other_seeds_do_not() -> None:
    """A base that differs only after the fork is the same prefix."""
    model = tiny_model("llama").model
    twin = Base((*BASES[0].ids[:9], 5, 5, 5), 4)
    found = write(model, Branch((BASES[0], twin), (Fork(0, 9, 17), Fork(1, 9, 17)), n=4, sampling=REQUEST.sampling))
    assert [c.ids for c in found.continuations[0]] == [c.ids for c in found.continuations[1]]
    other = write(model, replace(REQUEST, sampling=replace(REQUEST.sampling, seed=2)))
    assert other.continuations != write(model, REQUEST).continuations


def test_greedy_is_the_models_own_greedy_answer() -> None:
    model = tiny_model("gpt2").model
    request = replace(REQUEST, n=1, sampling=Sampling(max_tokens=10, temperature=0.0))
    for fork, (one,) in zip(FORKS, write(model, request).continuations, strict=True):
        ids = list(BASES[fork.base].ids[: fork.position])
        for i, token in enumerate(one.ids):
            assert token == (
                fork.token if fork.token is not None and i == 0 else own_logprobs(model.module, tuple(ids))[-1].argmax()
            )
            ids.append(token)


def test_draws_follow_the_distribution() -> None:
    """First tokens of 4,000 continuations against the model's own distribution, by a chi-square test; with a cut too."""
    from scipy.stats import chisquare

    model, n = tiny_model("llama").model, 4000
    p = np.exp(own_logprobs(model.module, BASES[1].ids)[-1])
    for top_p, temperature in ((1.0, 1.0), (0.6, 1.0), (1.0, 0.5)):
        request = Branch((BASES[1],), (Fork(0, 14),), n=n, sampling=Sampling(1, temperature, top_p))
        drawn = np.bincount([c.ids[0] for c in write(model, request).continuations[0]], minlength=len(p))
        expected = p ** (1 / temperature)
        order = np.argsort(-expected)
        expected /= expected.sum()
        kept = order[np.cumsum(expected[order]) - expected[order] < top_p]
        expected = np.where(np.isin(np.arange(len(p)), kept), expected, 0) * n
        assert drawn[expected == 0].sum() == 0
        common = expected > 5
        seen = np.append(drawn[common], drawn[~common].sum()).astype(float)
        hoped = np.append(expected[common], expected[~common].sum())
        seen, hoped = (x[hoped > 0] for x in (seen, hoped))
        assert chisquare(seen, hoped * seen.sum() / hoped.sum()).pvalue > 1e-3


class Sees:
    """An outcome: whether a word was written."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.key = f"sees({word})"

    def read(self, text: str) -> str | None:
        return self.word if self.word in text.split() else None

    def settled(self, text: str) -> bool:
        return self.word in text.split()


def test_writing_stops_once_the_answer_is_there() -> None:
    """The answer may lie in the base, in the forced token or later; the outcome of what was cut is the same."""
    model = tiny_model("llama").model
    plain = write(model, replace(REQUEST, n=40))
    word = f"w{plain.continuations[0][0].ids[5]}"
    stopping = write(model, replace(REQUEST, n=40, outcome=Sees(word)))
    found = 0
    for a, b in zip(plain.continuations, stopping.continuations, strict=True):
        for whole, cut in zip(a, b, strict=True):
            assert whole.ids[: len(cut.ids)] == cut.ids
            ids = [f"w{i}" for i in whole.ids]
            assert (cut.outcome == word) == (word in ids[: len(cut.ids)])
            if cut.stopped == "answer":
                found += 1
                assert word in ids[: len(cut.ids)] and word not in ids[: len(cut.ids) - 4]
            elif word in ids:
                assert ids.index(word) >= 8, "between two looks"
    assert found > 3


def test_an_end_token_ends() -> None:
    model = TransformersModel.from_loaded(copy_of("llama"), words_tokenizer(), name="ending").load()
    model.module.generation_config.eos_token_id = list(range(3, 70))
    for continuations in write(model, replace(REQUEST, n=8)).continuations:
        for one in continuations:
            ends = [i for i, t in enumerate(one.ids) if t in range(3, 70)]
            assert (one.stopped == "end") == bool(ends) and (not ends or ends == [len(one.ids) - 1])


def test_memory_is_refused_with_the_number_or_used_in_part() -> None:
    model = tiny_model("llama").model
    least = branch_bytes(model, REQUEST, 1)
    with pytest.raises(PlanError, match=r"needs [\d.]+ MiB above"):
        fitting_rows(model, REQUEST, least - 1)
    assert fitting_rows(model, REQUEST, least) == 1
    assert fitting_rows(model, REQUEST, branch_bytes(model, REQUEST, 7)) == 7
    assert fitting_rows(model, REQUEST, 1 << 40) == len(FORKS) * 3


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(CapabilityError, match="cannot share prefixes"):
        write(tiny_routed("gptj").model, REQUEST)
    with pytest.raises(TextError, match="exceeds the 256"):
        write(tiny_model("llama").model, replace(REQUEST, sampling=Sampling(max_tokens=250)))


def test_the_model_is_left_as_it_was_also_after_an_exception() -> None:
    model = tiny_model("llama").model
    before = (model.module.config._attn_implementation, model.weights_hash(fresh=True))

    def boom(fork: Fork, one: Continuation) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_branches(model, REQUEST, boom, memory_limit=LIMIT)
    assert (model.module.config._attn_implementation, model.weights_hash(fresh=True)) == before


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"forks": ()}, "needs bases, forks and samples"),
        ({"forks": (Fork(0, 4), Fork(0, 4))}, "names a fork twice"),
        ({"forks": (Fork(2, 4),)}, "there are 2"),
        ({"forks": (Fork(0, 3),)}, "from 4 to 23"),
        ({"forks": (Fork(0, 24),)}, "from 4 to 23"),
        ({"n": 0}, "n=0"),
    ],
)
def test_requests_that_make_no_sense_are_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(REQUEST, **how)


def test_sampling_and_bases_are_checked() -> None:
    for how in (
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"temperature": float("inf")},
    ):
        with pytest.raises(InputError, match="expected at least 1 token"):
            Sampling(**how)
    with pytest.raises(InputError, match="prompt of 1 to"):
        Base((1, 2), 3)

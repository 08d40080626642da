"""A plan covers every text once, keeps its budget, and refuses what does not fit with the number it would need."""

from __future__ import annotations

import dataclasses
import re

import pytest
from helpers import EVERYTHING, scripted, texts_of, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from probekit.core import CapabilityError, Capture, Forward, InputError, PlanError, TextError
from probekit.engine import Job, available_memory, check_texts, human, make_plan
from probekit.engine.plan import ALIKE, BATCH_TOKENS
from probekit.reduce import AttentionStats, Keep, NextToken, Norm, Readout

INFO = dataclasses.replace(scripted().info, n_layers=12, n_heads=8, n_kv_heads=2, d_model=64, d_head=8, d_vocab=5_000)
REQUEST = Forward(
    (Capture("pattern", AttentionStats()), Capture("resid_post", Readout()), Capture("resid_post", Norm()))
)


@given(st.lists(st.integers(1, 900), min_size=1, max_size=30))
def test_every_text_runs_once_beside_its_like(lengths: list[int]) -> None:
    plan = make_plan(REQUEST, texts_of(lengths), INFO, memory_limit=1 << 40)
    assert sorted(i for b in plan.batches for i in b) == list(range(len(lengths)))
    for batch in plan.batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or longest * len(batch) <= BATCH_TOKENS
        assert all(lengths[i] >= ALIKE * longest for i in batch)
    assert [max(lengths[i] for i in b) for b in plan.batches] == sorted(
        (max(lengths[i] for i in b) for b in plan.batches), reverse=True
    )
    assert (plan.n_texts, plan.n_tokens) == (len(lengths), sum(lengths))


def test_less_memory_means_smaller_batches_until_it_is_refused() -> None:
    """The peak stays under the limit; below what one text needs, the plan is refused with that number."""
    batch = texts_of((60,) * 20)
    roomy = make_plan(REQUEST, batch, INFO, memory_limit=1 << 40)
    assert len(roomy.batches) == 2
    tight = make_plan(REQUEST, batch, INFO, memory_limit=roomy.peak_bytes - 1)
    assert len(tight.batches) > 2 and tight.peak_bytes < roomy.peak_bytes
    alone = make_plan(REQUEST, batch.select([0]), INFO, memory_limit=1 << 40)
    with pytest.raises(
        PlanError, match=r"needs about .* and 1 KiB are available. The longest text has 60 tokens"
    ) as caught:
        make_plan(REQUEST, batch.select([0]), INFO, memory_limit=1024)
    assert f"needs about {human(alone.peak_bytes)}" in str(caught.value)
    assert make_plan(REQUEST, batch.select([0]), INFO, memory_limit=alone.peak_bytes).peak_bytes == alone.peak_bytes
    with pytest.raises(PlanError):
        make_plan(REQUEST, batch.select([0]), INFO, memory_limit=alone.peak_bytes - 1)


def test_estimates_grow_with_the_work() -> None:
    """Longer texts, more captures and wider vocabularies cost more; all numbers are positive."""
    small = make_plan(REQUEST, texts_of((100,)), INFO, 1 << 40)
    longer = make_plan(REQUEST, texts_of((200,)), INFO, 1 << 40)
    more = make_plan(Forward((*REQUEST.captures, Capture("resid_post", Keep()))), texts_of((100,)), INFO, 1 << 40)
    wider = make_plan(REQUEST, texts_of((100,)), dataclasses.replace(INFO, d_vocab=50_000), 1 << 40)
    for other in (longer, more, wider):
        assert other.peak_bytes > small.peak_bytes > small.result_bytes > 0
        assert other.gflop >= small.gflop > 0
    assert longer.gflop_readout == pytest.approx(2 * small.gflop_readout)
    assert small.gflop_readout == pytest.approx(2e-9 * 100 * 12 * 5_000 * 64)
    only = make_plan(Forward((Capture("logits", NextToken()),)), texts_of((100,)), INFO, 1 << 40)
    assert only.gflop_readout == pytest.approx(small.gflop_readout / 12)


def test_results_take_what_the_plan_says() -> None:
    """The results' share of the plan is within a factor of three of the arrays, for all captures together."""
    model, batch = tiny_model("llama").model, texts_of((60, 50))
    plan = make_plan(Forward(EVERYTHING), batch, model.info, 1 << 40)
    parts = model.execute(Forward(EVERYTHING), batch)
    real = 2 * sum(a.nbytes for p in parts for a in p.arrays.values())
    assert real / 3 < plan.result_bytes < 3 * real


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        (
            Capture("resid_post", AttentionStats()),
            "reads attention and cannot look at 'resid_post'; it can look at pattern",
        ),
        (Capture("resid_pre", Readout()), "reads vocab and cannot look at 'resid_pre'"),
        (Capture("pattern", Norm()), "reads rows and cannot look at 'pattern'"),
        (Capture("mlp_act", Norm()), "has no point 'mlp_act'"),
    ],
)
def test_a_reducer_that_cannot_read_a_point_is_refused_before_the_run(capture: Capture, message: str) -> None:
    with pytest.raises(CapabilityError, match=re.escape(message)):
        make_plan(Forward((capture,)), texts_of((9,)), INFO)
    with pytest.raises(InputError, match="Layer 12 of 'resid_post' is outside"):
        make_plan(Forward((Capture("resid_post.12", Norm()),)), texts_of((9,)), INFO)


def test_texts_are_checked_against_model_and_analyses() -> None:
    from probekit.analysis import get_analysis

    lens = get_analysis("logit-lens")
    job = Job(lens, lens.Params())
    check_texts([job], texts_of((2, 64)), 64)
    with pytest.raises(TextError, match=r"Text 1 has 65 tokens; the model reads at most 64.*window=64"):
        check_texts([], texts_of((2, 65)), 64)
    with pytest.raises(TextError, match="Text 0 has 1 tokens; logit-lens needs at least 2"):
        check_texts([job], texts_of((1,)), None)


def test_plan_reads_well_and_is_plain_data() -> None:
    plan = make_plan(REQUEST, texts_of((60, 50)), INFO, 1 << 30)
    text = str(plan)
    assert "2 with 110 tokens" in text and "1.0 GiB available" in text and "resid_post:norm()" in text
    assert plan.as_dict()["batches"] == plan.batches
    assert [human(n) for n in (0, 1023, 1024, 1536 * 1024, 5 << 30)] == ["0 B", "1023 B", "1 KiB", "2 MiB", "5.0 GiB"]
    assert available_memory() > 1 << 20

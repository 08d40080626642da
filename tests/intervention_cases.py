"""Texts and parameters with which every analysis that intervenes, writes or compares models is tested.

A new one needs a row in `CASES`; see `contract/test_interventions.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from probekit.core import Batch, TokenText

LENGTHS = (8, 6, 9, 7, 6)


def _text(ids: Any) -> TokenText:
    return TokenText(tuple(map(int, ids)), tuple(f" w{i}" for i in ids))


def singles() -> Batch:
    """Any texts."""
    rng = np.random.default_rng(0)
    return Batch(tuple(_text(rng.integers(3, 120, n)) for n in (*LENGTHS, 8)))


def pairs() -> Batch:
    """Clean and corrupted: equal but for one token and the answer at the end."""
    rng = np.random.default_rng(0)
    done = []
    for n in LENGTHS:
        clean = rng.integers(3, 120, n)
        corrupted = clean.copy()
        corrupted[[1, -1]] = (clean[[1, -1]] + rng.integers(1, 100, 2)) % 117 + 3
        done += [_text(clean), _text(corrupted)]
    return Batch(tuple(done))


def contrasts() -> Batch:
    """Five contrast pairs that part at their second token, then two neutral texts."""
    neutral = singles()
    return Batch((*pairs().texts, *neutral.texts[:2]))


def domains() -> Batch:
    """Texts of two domains."""
    rng = np.random.default_rng(0)
    texts = (_text(rng.integers(3, 120, n)) for n in (12, 10, 14, 11, 13, 12, 10, 15))
    return Batch(tuple(dataclasses.replace(t, domain="ab"[i % 2]) for i, t in enumerate(texts)))


@dataclass(frozen=True)
class Case:
    """How to run one analysis.

    Args:
        texts: makes texts of its kind.
        params: parameters that suit a tiny model.
        group: so many texts belong together and keep their order.
        trailing: so many of the last texts stay where they are.
        group_axis: the axis that runs over groups of texts, if there is one.
        n_unit: what its intervals are over.
        bad: texts that it refuses, with what the message says.
        bounds: values of parameters that are tried beside the defaults.
        by_text: whether all that depends on a text lies on the axes text and token, so that it moves with the text.
    """

    texts: Callable[[], Batch] = singles
    params: dict[str, Any] = field(default_factory=dict)
    group: int = 1
    trailing: int = 0
    group_axis: str = ""
    n_unit: str = "texts"
    bad: tuple[tuple[Callable[[Batch], Batch], str], ...] = ()
    bounds: tuple[dict[str, Any], ...] = ()
    by_text: bool = True


CASES: dict[str, Case] = {
    "activation-patching": Case(
        pairs,
        {"min_gap": 0.01},
        group=2,
        n_unit="pairs",
        bad=(
            (lambda batch: batch.select([0, 1, 2]), "found 3 texts"),
            (lambda batch: batch.select([0, 3]), "have 8 and 6 tokens"),
            (lambda batch: batch.select([0, 0]), "both end with the answer"),
        ),
        bounds=(
            {"sites": "resid_pre"},
            {"sites": "attn_out"},
            {"sites": "mlp_out"},
            {"sites": "z"},
            {"direction": "noising"},
            {"direction": "denoising"},
            {"window": 9},
            {"window": 3, "sites": "mlp_out"},
            {"min_gap": 0.001},
            {"attribution": False},
        ),
    ),
    "branching-factor": Case(
        params={"n_samples": 4, "max_tokens": 6},
        n_unit="prompts",
        bounds=({"top_p": 1.0, "min_p": 0.1}, {"max_tokens": 2}, {"temperature": 0.1}, {"max_tokens": 55}),
    ),
    "critical-tokens": Case(
        lambda: Batch(tuple(dataclasses.replace(t, answer="1") for t in singles())),
        {"answer_regex": r"w\d+ w\d+ w(\d)", "max_tokens": 6, "n": 16, "tries": 8, "controls": 1},
        n_unit="answers",
        bad=((lambda batch: Batch((*batch.texts[:1], *singles().texts)), "Text 1 does not say"),),
        bounds=(
            {"n": 64, "sure": 1.0},
            {"whole": True, "controls": 3},
            {"sure": 0.5},
            {"tries": 1, "least_success": 0.0, "unfinished": True},
            {"temperature": 1.5, "top_p": 0.8},
        ),
        by_text=False,  # tokens that are replaced have an axis of their own
    ),
    "contrastive-estimation": Case(
        lambda: Batch(tuple(dataclasses.replace(t, answer="123"[i % 3]) for i, t in enumerate(singles()))),
        {"answer_from": "given", "answer_regex": r"w(\d)"},
        bad=((lambda batch: Batch((*batch.texts[:1], TokenText((5,), (" w5",)))), "needs at least 2"),),
        bounds=(
            {"answer_from": "model", "max_tokens": 5},
            {"answer_from": "model", "max_tokens": 1, "k": 100},
            {"answer_after": " w"},
            {"beta": 0.0},
            {"beta": 10.0, "k": 1},
        ),
    ),
    "dormant-heads": Case(
        domains,
        {"n_permutations": 199, "n_heads": 5},
        bad=((lambda batch: Batch(batch.texts[:1] + singles().texts), "needs at least 9"),),
        bounds=(
            {"heads": "all"},
            {"n_heads": 1},
            {"removal": "first"},
            {"dormant": 0.4, "active": 0.4},
            {"dormant": 1, "active": 0},
            {"first_query": 1},
            {"n_permutations": 19},
            {"alpha": 0.5},
        ),
    ),
    "forking-paths": Case(
        params={"answer_words": "w5,w9,w30", "max_tokens": 6, "n": 4, "most": 8, "p_min": 0.06},
        n_unit="answers",
        bounds=({"spacing": 3}, {"most": 4}, {"epsilon": 0.05}, {"answer_words": "", "answer_regex": r"w(\d)"}),
        by_text=False,  # branches have an axis of their own
    ),
    "forking-tokens": Case(
        params={
            "answer_words": "w5,w9,w30",
            "max_tokens": 6,
            "answers": 2,
            "n": 4,
            "most": 8,
            "n_sampled": 8,
            "min_count": 2,
            "epsilon": 0.3,
        },
        n_unit="prompts",
        bounds=(
            {"temperature": 0.6},
            {"most": 4},
            {"epsilon": 1.4},
            {"answer_words": "", "answer_regex": r"w(\d)"},
            {"min_count": 1000},
            {"n_sampled": 4, "share": 0.01},
            {"p_min": 0.5},
            {"answers": 1},
        ),
        by_text=False,  # answers have the axes text and token to themselves
    ),
    "layer-ablation": Case(bounds=({"swap": False}, {"stride": 50}, {"count_first": True})),
    "model-shift": Case(
        params={"answer_words": "w5,w9,w30,w60,w70", "max_tokens": 5, "answers": 2, "budget": 1},
        n_unit="prompts",
        bounds=(
            {"budget": 0.0},
            {"budget": 0.5},
            {"budget": 3, "theta": 0.69},
            {"budget": 2, "theta": 1e-6},
            {"switch_on": "nucleus"},
            {"nucleus": 0.01, "near": 0.69},
            {"nucleus": 1.0, "overlap_k": 1000},
            {"answers": 1, "max_tokens": 1},
            {"temperature": 0.0, "answer_words": "", "answer_regex": r"w(\d)"},
        ),
        by_text=False,  # its tokens are those of answers, several to a text
    ),
    "sink-anatomy": Case(
        params={"horizon": 6, "tail": 1, "epsilon": 0.25, "min_magnitude": 0.0, "ratio": 4.0, "phases": 1},
        bounds=(
            {"phases": 0},
            {"phases": 8, "ratio": 1.0},
            {"top_k": 1, "tail": 0},
            {"epsilon": 0.99},
            {"ratio": 1e9, "loose_ratio": 1.0},
        ),
    ),
    "steering": Case(
        contrasts,
        {"n_neutral": 2, "layers": "1", "doses": "0.5,1", "n_controls": 2},
        group=2,
        trailing=2,
        group_axis="sample",
        n_unit="pairs",
        bad=(
            (lambda batch: batch.select(range(11)), "an odd number"),
            (lambda batch: batch.select([0, 1, 2, 3, 10, 11]), "2 contrast pairs"),
            (lambda batch: batch.select([0, 0, *range(2, 12)]), "Texts 0 and 1, a contrast pair, are the same"),
        ),
        bounds=({"position": "mean"}, {"n_controls": 1}, {"layers": "", "doses": "1"}, {"n_neutral": 0}),
    ),
}

"""Praise and blame in the real SmolLM2-135M-Instruct: read from words the probe never saw, erased, and steered."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import probekit as pk

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("one_thread")]
GOOD = [
    "wonderful",
    "excellent",
    "lovely",
    "brilliant",
    "delightful",
    "superb",
    "charming",
    "splendid",
    "fantastic",
    "magnificent",
    "amazing",
    "perfect",
    "beautiful",
    "terrific",
    "enjoyable",
    "outstanding",
    "impressive",
    "glorious",
    "fabulous",
    "great",
]
BAD = [
    "terrible",
    "awful",
    "horrible",
    "dreadful",
    "disgusting",
    "miserable",
    "appalling",
    "hideous",
    "ghastly",
    "unpleasant",
    "boring",
    "pathetic",
    "ugly",
    "nasty",
    "disappointing",
    "atrocious",
    "dismal",
    "worthless",
    "tedious",
    "vile",
]
FRAMES = ("The film we saw last night was {}, everyone said", "My brother thought the soup was {}, as he wrote")
PROMPTS = (
    "The new restaurant in town is",
    "Our holiday by the lake was",
    "Her speech at the wedding was",
    "The book that you lent me is",
    "My first day at the new job was",
    "The service in this shop is",
)


def test_praise_is_read_and_steers(smol: Any) -> None:
    """A word is a prompt of its own: probes are tested on words they have not seen, which a bag of ids cannot know."""
    texts = [
        {"text": frame.format(word), "label": label, "group": word}
        for label, words in (("praise", GOOD), ("blame", BAD))
        for word in words
        for frame in FRAMES
    ]
    points = ("resid_post.0", "resid_post.8", "resid_post.16")
    rows = pk.collect(smol, texts, points, progress=False)
    assert len(rows) == 80 and len(np.unique(rows.groups)) == 40
    at = pk.probing.sweep(rows, n_permutations=200, progress=False).dataset.isel(case=0)
    # Measured: AUROC 0.87, 1.00 and 1.00; a bag of token ids 0.50, shuffled labels 0.55 to 0.65; p 0.015 each.
    auroc = at["auroc"].values
    assert auroc[0] < 0.95 and auroc[2] > 0.95 and at["auroc_low"].values[2] > 0.7
    assert at["p_bonferroni"].values[2] < 0.05
    assert abs(float(at["bag_auroc"]) - 0.5) < 0.2 and float(at["over_bag_low"]) > 0.1
    assert float(at["embedding_auroc"]) == 0.5  # the last word is the frame's
    assert (np.abs(at["shuffled_auroc"].values - 0.5) < 0.25).all() and at["compression"].values[2] > 1.5
    after = pk.probing.erase(rows, points="resid_post.16").dataset.isel(case=0, layer=0)
    assert after["before_auroc"] > 0.95 and after["refit_low"] <= 0.5 <= after["refit_high"]
    direction = pk.probing.DifferenceOfMeans().fit(rows.matrix("resid_post.16"), rows.labels)
    answers = (" great", " terrible")
    how: dict[str, Any] = {"doses": (-0.3, 0.3), "n_random": 4, "fitted_on": rows, "progress": False}
    moved = pk.probing.steer(smol, direction, "resid_post.16", PROMPTS, answers, **how)
    first = moved.findings[0]  # measured: 7.4 logits per dose, interval 3.5 to 11.4; random directions up to 3.4
    assert first.value > 3 and first.ci95 is not None and first.ci95[0] > 0

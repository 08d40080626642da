"""How the Bigram-Backcopy transformers are trained: as published, and smaller; every difference in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from probekit.core import unknown

SINK, DRAIN, PEAK = "attention sink", "value drain", "residual peak"
PHENOMENA = (SINK, DRAIN, PEAK)
UNCLAIMED = "no claim"


@dataclass(frozen=True)
class Setting:
    """One kind of training run.

    Args:
        name: such as "3-layer-sgd".
        title: the same in words.
        n_layers: blocks.
        optimiser: "adamw" or "sgd".
        learning_rate: constant over training.
        steps: updates.
        relu: ReLU attention instead of softmax.
        n_seeds: runs that a study makes unless told otherwise.
        published: by phenomenon, whether arXiv 2410.13835 reports it; None where it does not say.
    """

    name: str
    title: str
    n_layers: int
    optimiser: Literal["adamw", "sgd"]
    learning_rate: float
    steps: int
    relu: bool = False
    n_seeds: int = 1
    published: Mapping[str, bool | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Preset:
    """Sizes that all settings share, and the settings.

    Args:
        name: "paper" or "small".
        d_model: width of the stream and of the only head; the MLP is four times as wide.
        context: tokens that a model reads at once, `<s>` included.
        batch_size: fresh sequences in each update.
        settings: the runs.
        changes: what differs from the publication, in sentences.
    """

    name: str
    d_model: int
    context: int
    batch_size: int
    settings: tuple[Setting, ...]
    changes: tuple[str, ...]

    def setting(self, name: str) -> Setting:
        """The setting of this name.

        Raises:
            UnknownName: there is none.
        """
        found = {s.name: s for s in self.settings}
        if name not in found:
            raise unknown("setting", name, found)
        return found[name]


# What both presets share, arXiv 2410.13835, appendix, and its code: AdamW and SGD, no schedule, no clipping.
WEIGHT_DECAY, BETAS, EPSILON, MOMENTUM = 1e-4, (0.9, 0.99), 1e-8, 0.9

_ALL = {SINK: True, DRAIN: True, PEAK: True}
_RELU = {SINK: False, DRAIN: False, PEAK: None}
_COMMON = (
    "The vocabulary has 66 tokens: the publication's 67th, a spare special token, never occurs.",
    "Losses and phenomena are measured on 128 fresh sequences that no run was trained on.",
    "The first query, <s> itself, is left out of the attention on <s>, which the authors' code includes.",
)


def _settings(adam: float, relu: float, sgd: float, steps: tuple[int, int, int, int], seeds: tuple[int, ...]) -> tuple[
    Setting, ...
]:  # fmt: skip
    """The four settings, given learning rates and, in their order, steps and seeds."""
    return (
        Setting(
            "1-layer", "1 layer, softmax, Adam", 1, "adamw", adam, steps[0], False, seeds[0], {**_ALL, PEAK: False}
        ),
        Setting("3-layer", "3 layers, softmax, Adam", 3, "adamw", adam, steps[1], False, seeds[1], _ALL),
        Setting("1-layer-relu", "1 layer, ReLU attention, Adam", 1, "adamw", relu, steps[2], True, seeds[2], _RELU),
        Setting(
            "3-layer-sgd", "3 layers, softmax, SGD", 3, "sgd", sgd, steps[3], False, seeds[3], {**_ALL, PEAK: False}
        ),
    )


PAPER = Preset(
    name="paper",
    d_model=256,
    context=256,
    batch_size=512,
    settings=_settings(3e-4, 3e-3, 0.03, (10_000, 10_000, 100_000, 10_000), (3, 3, 1, 1)),
    changes=_COMMON,
)
SMALL = Preset(
    name="small",
    d_model=64,
    context=64,
    batch_size=32,
    settings=_settings(2e-3, 3e-3, 0.1, (1000, 3000, 1000, 1500), (3, 3, 3, 3)),
    changes=(
        "The stream has 64 dimensions instead of 256, and the MLP 256 instead of 1,024.",
        "Sequences have 64 tokens instead of 256, and an update sees 32 of them instead of 512.",
        "Runs stop after 1,000 updates (1 layer, softmax and ReLU), 3,000 (3 layers, Adam) and 1,500 (3 layers, SGD) "
        "instead of 10,000, and 100,000 for ReLU.",
        "Learning rates are 0.002 instead of 0.0003 (Adam) and 0.1 instead of 0.03 (SGD), so that fewer updates go as "
        "far; that of ReLU attention is the published 0.003.",
        *_COMMON,
    ),
)
PRESETS = {p.name: p for p in (SMALL, PAPER)}

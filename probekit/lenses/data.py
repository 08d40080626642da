"""Which text a lens is trained on, and how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from probekit.analysis import Params, param
from probekit.core import Batch, BosPolicy, InputError

RATES = {"regression": 1e-4, "sgd": 0.1, "adam": 1e-3}  # of the last two: as released, see `train_lens`
DECAYS = {"regression": 0.0, "sgd": 1e-3, "adam": 1e-3}
STRETCHES = 20  # pieces that a few long texts are cut into, some of which are held out


@dataclass(frozen=True)
class LensTraining(Params):
    """How a tuned lens is trained."""

    recipe: str = param(
        "regression",
        choices=("regression", "sgd", "adam"),
        help="Least squares, then Adam in whitened coordinates; or from zero with the optimisers of arXiv 2303.08112",
    )
    steps: int = param(32, low=0, high=1_000_000, unit="updates", help="Updates on the exact KL divergence")
    tokens_per_step: int = param(32, low=1, high=1 << 20, unit="tokens", help="Tokens of an update, drawn at random")
    windows_per_step: int = param(2, low=1, high=4096, unit="windows", help="Windows that they are drawn from")
    window: int = param(128, low=8, high=131072, unit="tokens", help="Texts are cut into windows of this length")
    fit_tokens: int = param(24_000, low=64, high=1 << 30, unit="tokens", help="Most tokens of the least squares")
    learning_rate: float = param(0.0, low=0.0, high=10.0, help="At its peak; 0 for the recipe's own")
    weight_decay: float = param(-1.0, low=-1.0, high=1.0, help="Of the trained matrices; -1 for the recipe's own")
    apart_tokens: int = param(
        96, low=8, high=1 << 20, unit="tokens", help="Most tokens on which choices are made; never trained on"
    )
    held_out: float = param(
        0.1, low=0.01, high=0.5, unit="share", help="Share of texts or stretches kept for the report"
    )
    held_tokens: int = param(768, low=8, high=1 << 24, unit="tokens", help="Most held-out tokens that are read")
    seed: int = param(0, low=0, high=2**31 - 1, help="Of the split, of the order and of the tokens drawn")

    @property
    def rate(self) -> float:
        """The learning rate at its peak."""
        return self.learning_rate or RATES[self.recipe]

    @property
    def decay(self) -> float:
        """The weight decay."""
        return self.weight_decay if self.weight_decay >= 0 else DECAYS[self.recipe]


def windows_of(model: Any, texts: Any, bos: BosPolicy, settings: LensTraining) -> list[list[Any]]:
    """The windows of every text that fills one.

    Raises:
        InputError: a window is longer than the model reads.
    """
    from probekit.batches import make_batch
    from probekit.texts import read_texts

    if isinstance(texts, Path) or (
        isinstance(texts, str) and texts.endswith((".txt", ".jsonl")) and Path(texts).is_file()
    ):
        texts = read_texts(texts)
    limit = model.info.context_length
    if limit is not None and settings.window > limit:
        raise InputError(f"The model reads at most {limit:,} tokens; choose a window of at most that.")
    batch = texts if isinstance(texts, Batch) else make_batch(_Unlimited(model), (), texts, bos, None)
    found = [list(Batch((text,), batch.bos).windows(settings.window)) for text in batch]
    return [windows for windows in found if windows]


class _Unlimited:
    """A model of which only the tokenizer is asked: a text longer than its context is cut into windows later."""

    def __init__(self, model: Any) -> None:
        self.info, self._model = replace(model.info, context_length=None), model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@dataclass(frozen=True)
class Parts:
    """Windows by what they are for.

    Args:
        train: they are fitted and trained on.
        apart: choices are made on them.
        held: the report is about them.
        by: "text" or "stretch": what was held out as a whole.
    """

    train: tuple[Any, ...]
    apart: tuple[Any, ...]
    held: tuple[Any, ...]
    by: str

    @property
    def digest(self) -> str:
        """sha256 over all token ids, in this order."""
        return Batch((*self.train, *self.apart, *self.held)).digest


def split(texts: Sequence[Sequence[Any]], settings: LensTraining) -> Parts:
    """Held-out texts or stretches, one more that is kept apart for choices, and the rest, which is trained on.

    Raises:
        InputError: there is too little text.
    """
    groups, by = list(texts), "text"
    if len(texts) < STRETCHES:
        by = "stretch"
        groups = [g for text in texts for g in _pieces(text, max(1, STRETCHES // len(texts)))]
    n_held = max(1, round(settings.held_out * len(groups)))
    if len(groups) < n_held + 2:
        n_windows = sum(map(len, groups))
        raise InputError(
            f"Too little text: it fills {n_windows} windows of {settings.window} tokens; a lens needs at least 4, and for "
            "a good one some 50 tokens for each of the model's d_model. Give more text, or lower window."
        )
    order = np.random.default_rng([settings.seed, 0]).permutation(len(groups))
    chosen = [groups[i] for i in order]
    held, apart, train = chosen[:n_held], chosen[n_held], chosen[n_held + 1 :]
    return Parts(tuple(w for g in train for w in g), tuple(apart), tuple(w for g in held for w in g), by)


def _pieces(text: Sequence[Any], n: int) -> Iterator[Sequence[Any]]:
    for part in np.array_split(np.arange(len(text)), min(n, len(text))):
        yield [text[i] for i in part]

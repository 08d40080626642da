"""Training a Bigram-Backcopy transformer, with what its extreme tokens do on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from probekit.core import InputError, Model

from .bigram_backcopy import BigramBackcopy
from .measures import ExtremeTokens, extreme_tokens, measured_sequences
from .presets import BETAS, EPSILON, MOMENTUM, WEIGHT_DECAY, Preset, Setting
from .shipped import untrained_module

N_MOMENTS = 16  # how often a run is measured by default, the beginning and the end included


@dataclass(frozen=True)
class Trained:
    """A trained toy and its history.

    Args:
        model: opened and self-checked; runs every analysis.
        setting: how it was trained.
        seed: of initial weights and sequences.
        steps: when it was measured, in updates.
        measured: what was found then.
        train_nats: cross-entropy of the batch of each update.
    """

    model: Model
    setting: Setting
    seed: int
    steps: tuple[int, ...]
    measured: tuple[ExtremeTokens, ...]
    train_nats: np.ndarray


def train(
    preset: Preset,
    setting: str | Setting,
    seed: int = 0,
    *,
    steps: int | None = None,
    n_moments: int = N_MOMENTS,
    device: str = "cpu",
    progress: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train one model from scratch on fresh sequences.

    The same seed gives the same model on the same machine with the same number of threads; elsewhere sums are ordered
    differently, and training carries that on.

    Args:
        preset: sizes.
        setting: one of its settings, or the name of one.
        seed: of initial weights and sequences.
        steps: updates; those of the setting if None.
        n_moments: how often the model is measured, in equal distances of the square root of the step, so more often
            early on; at least at the beginning and the end.
        device: where to train, such as "cuda".
        progress: is told the step and the batch's cross-entropy, after each update.

    Raises:
        UnknownName: the preset has no such setting.
        InputError: there is nothing to train.
    """
    from probekit.backends.transformers.toy import open_toy

    setting = preset.setting(setting) if isinstance(setting, str) else setting
    steps = setting.steps if steps is None else steps
    if steps < 1 or n_moments < 2:
        raise InputError(f"Expected at least 1 step and 2 moments, found {steps} and {n_moments}.")
    task = BigramBackcopy()
    module = untrained_module(preset, setting, seed).to(device)
    model = open_toy(module, task.vocabulary, f"bigram-backcopy {setting.name} ({preset.name}, seed {seed})")
    ids = measured_sequences(task, preset.context)
    optimiser = _optimiser(setting, module)
    rng = np.random.default_rng(seed)
    losses = np.empty(steps)
    moments = {0: extreme_tokens(model, task, ids)}
    due = {round(steps * (i / (n_moments - 1)) ** 2) for i in range(1, n_moments)}
    for step in range(1, steps + 1):
        sequences = torch.from_numpy(task.sample(preset.batch_size, preset.context + 1, rng)).to(device)
        with _training(module):
            losses[step - 1] = _update(module, optimiser, sequences)
        if step in due:
            moments[step] = extreme_tokens(model, task, ids)
        if progress is not None:
            progress(step, losses[step - 1])
    return Trained(model, setting, seed, tuple(moments), tuple(moments.values()), losses)


def _update(module: Any, optimiser: torch.optim.Optimizer, sequences: torch.Tensor) -> float:
    optimiser.zero_grad(set_to_none=True)
    logits = module(input_ids=sequences[:, :-1], use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1).float(), sequences[:, 1:].flatten())
    loss.backward()
    optimiser.step()
    return float(loss.detach())


@contextmanager
def _training(module: Any) -> Iterator[None]:
    """Training mode and gradients inside; measured in evaluation mode outside. There is no dropout either way."""
    module.train()
    try:
        with torch.enable_grad():
            yield
    finally:
        module.eval()


def _optimiser(setting: Setting, module: Any) -> torch.optim.Optimizer:
    rate, parameters = setting.learning_rate, module.parameters()
    if setting.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    return torch.optim.AdamW(parameters, lr=rate, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY)

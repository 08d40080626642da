"""Tuning a model on answers: the loss is that of the answer's tokens alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .answers import Example

_MOST_MEASURED = 64  # examples whose loss is measured before and after
_MOST_NORM = 1.0  # gradients are scaled down to this norm


@dataclass(frozen=True)
class Schedule:
    """How the added matrices are trained: AdamW without weight decay.

    Args:
        learning_rate: at its peak, in reach of which it rises linearly and from which it falls as a half cosine.
        warmup: updates until the peak, but at most half of all updates.
        epochs: passes over the examples, each in another order.
        batch_size: examples of an update.
        seed: of the order, of dropout and of the initial matrices.
    """

    learning_rate: float = 3e-4
    warmup: int = 100
    epochs: int = 1
    batch_size: int = 6
    seed: int = 0

    def steps(self, n_examples: int) -> int:
        """Updates in all."""
        return self.epochs * math.ceil(n_examples / self.batch_size)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of an update, counted from 0."""
        warmup = min(self.warmup, steps // 2)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@dataclass(frozen=True)
class Fitted:
    """How a training run went.

    Args:
        losses: cross-entropy of each update's answers, in nats per token, dropout included.
        before: mean over the tokens of (at most 64 of) the answers before training, without dropout.
        after: the same after training.
    """

    losses: tuple[float, ...]
    before: float
    after: float


def fit(
    make: Callable[[], Any],
    examples: Sequence[Example],
    schedule: Schedule,
    progress: Callable[[], object] | None = None,
) -> tuple[Any, Fitted]:
    """Train what can be trained of a model.

    The caller's random state stays as it is.

    Args:
        make: builds the model; its random numbers belong to the seed.
        examples: prompts with answers.
        schedule: how.
        progress: is called after each update.

    Returns:
        The model in evaluation mode, and how it went.
    """
    steps, done = schedule.steps(len(examples)), 0
    with _seeded(schedule.seed), torch.enable_grad():
        module = make()
        trained = [p for p in module.parameters() if p.requires_grad]
        before = mean_loss(module, examples[:_MOST_MEASURED], schedule.batch_size)
        optimiser = torch.optim.AdamW(trained, lr=schedule.learning_rate, weight_decay=0.0)
        losses: list[float] = []
        module.train()
        for chosen in _batches(len(examples), schedule):
            for group in optimiser.param_groups:
                group["lr"] = schedule.rate(done, steps)
            optimiser.zero_grad(set_to_none=True)
            loss = response_loss(module, [examples[i] for i in chosen])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, _MOST_NORM)
            optimiser.step()
            losses.append(float(loss.detach()))
            done += 1
            if progress is not None:
                progress()
        module.eval()
        after = mean_loss(module, examples[:_MOST_MEASURED], schedule.batch_size)
    return module, Fitted(tuple(losses), before, after)


def response_loss(module: Any, examples: Sequence[Example]) -> Tensor:
    """Mean cross-entropy over the answers' tokens, in nats; tokens of prompts are read, and not predicted.

    Args:
        module: a causal model of transformers.
        examples: prompts with answers; shorter ones are padded on the right, where no token of theirs looks.
    """
    longest, device = max(len(e.ids) for e in examples), next(module.parameters()).device
    ids = torch.zeros((len(examples), longest), dtype=torch.long)
    learnt = torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        n = len(example.ids)
        ids[row, :n] = torch.tensor(example.ids)
        learnt[row, example.n_prompt : n] = True
    logits = module(input_ids=ids.to(device), use_cache=False).logits[:, :-1]
    which = learnt[:, 1:].to(logits.device)
    return cross_entropy(logits[which].float(), ids[:, 1:].to(logits.device)[which])


def mean_loss(module: Any, examples: Sequence[Example], batch_size: int) -> float:
    """The same over many examples, every token of an answer the same weight, without dropout."""
    total, n_tokens = 0.0, 0
    module.eval()
    with torch.no_grad():
        for start in range(0, len(examples), batch_size):
            some = examples[start : start + batch_size]
            n = sum(len(e.ids) - e.n_prompt for e in some)
            total += float(response_loss(module, some)) * n
            n_tokens += n
    return total / n_tokens


def _batches(n: int, schedule: Schedule) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(schedule.seed)
    for _ in range(schedule.epochs):
        order = rng.permutation(n)
        for start in range(0, n, schedule.batch_size):
            yield order[start : start + schedule.batch_size]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers from a seed inside; the caller's afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield

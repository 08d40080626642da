"""A world in which entropy is a function of the embedding, and a copier that lives in it: with slopes, by the chain rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import vocabulary_toy as toy

from probekit.backends.scripted import Script
from probekit.core import Batch, Forward, NextTokenEntropy, TokenText, VocabularyWeights
from probekit.methods.mining import EMBED, LAST, Budget, Mined, mine
from probekit.methods.repeating import Prompts
from probekit.reduce import Partial, Recorder, Rows

PROMPT = Prompts(((7, 3, 8),), stand_in=3)


def spread_of(p: np.ndarray, n: int) -> np.ndarray:
    """Entropy of a distribution with p on one of n tokens, and the rest on the others alike."""
    rest: np.ndarray = -p * np.log(p) - (1 - p) * np.log((1 - p) / (n - 1))
    return rest


@dataclass
class World:
    """Tokens at places; the model is sure of itself at -u, and falls apart along u. Broken ones write token 0.

    Args:
        rows: their embeddings.
        broken: those that it cannot write.
        steep: by how much a step along the first dimension makes it less sure.
    """

    rows: np.ndarray
    broken: frozenset[int] = frozenset()
    steep: float = 1.0
    looked: list[int] = field(default_factory=list)
    slopes: list[int] = field(default_factory=list)

    def sure(self, token: int) -> float:
        return float(0.55 + 0.4 / (1 + np.exp(self.steep * self.rows[token, 0])))

    def entropy(self, token: int) -> float:
        return float(spread_of(np.array(self.sure(token)), len(self.rows)))

    def slope(self, token: int) -> np.ndarray:
        """dH/dx, by the chain rule."""
        p, n = self.sure(token), len(self.rows)
        s = (p - 0.55) / 0.4
        along = (np.log((1 - p) / (n - 1)) - np.log(p)) * -0.4 * self.steep * s * (1 - s)
        return along * np.eye(self.rows.shape[1])[0]

    def logits(self, token: int) -> np.ndarray:
        p, n = self.sure(token), len(self.rows)
        found = np.full(n, np.log((1 - p) / (n - 1)))
        found[0 if token in self.broken else token] = np.log(p)
        return found + 3.0

    def answer(self, request: Forward) -> Any:
        assert request.inputs is not None
        tokens = [ids[1] for ids in request.inputs]
        if request.gradient_of is not None:
            assert request.gradient_of == NextTokenEntropy(-1) and request.captures == (EMBED,)
            self.slopes += tokens
            value = np.zeros((3, self.rows.shape[1]))
            value[1] = self.slope(tokens[0])
            return {EMBED: {"value": SimpleNamespace(values=value)}}
        self.looked += tokens
        return {LAST: {"value": SimpleNamespace(values=np.stack([self.logits(t) for t in tokens]))}}

    def mined(self, how: Budget, valid: np.ndarray | None = None, prompt: Prompts = PROMPT) -> Mined:
        everything = np.ones(len(self.rows), dtype=bool)
        return driven(mine(prompt, self.rows, everything if valid is None else valid, how), self.answer)


def driven(flow: Any, answer: Callable[[Any], Any]) -> Any:
    """What a flow returns whose requests are answered like this."""
    try:
        request = next(flow)
        while True:
            request = flow.send(answer(request))
    except StopIteration as stop:
        return stop.value


class Graded(toy.Copier):
    """A copier that is the less sure of a token the farther its row lies along the first dimension; it has slopes."""

    def __init__(self, broken: Any, weights: Any) -> None:
        super().__init__(broken, weights=weights)
        self.world = World(np.asarray(weights.embedding, dtype=float), steep=1.5)
        self.info = dataclasses.replace(self.info, sites=self.info.sites | {"embed"})

    def _place(self, ids: tuple[int, ...]) -> int:
        """Where the token stands that is to be repeated; -1 if none is."""
        before = [i for i in range(len(ids) - 1) if ids[i] == toy.id_of("«")]
        if ids[-1] != toy.id_of("«") or not before:
            return -1
        return before[-1] if before[-1] - 1 in before else before[-1] + 1  # the mark may be the token itself

    def _script(self, text: TokenText) -> Script:
        script, at = super()._script(text), self._place(text.ids)
        if at >= 0:
            p = self.world.sure(text.ids[at])
            script.resid[0, -1] = np.log((1 - p) / (toy.V - 1))
            script.resid[0, -1, self._can(text.ids[at])] = np.log(p)
        return script

    def execute(self, request: Any, batch: Batch, progress: Any = None) -> list[Partial]:
        if request.gradient_of is None:
            return super().execute(request, batch, progress)
        (capture,), (text,) = request.captures, batch.texts
        rows = torch.zeros(len(text), self.world.rows.shape[1])
        rows[self._place(text.ids)] = torch.as_tensor(self.world.slope(text.ids[self._place(text.ids)]))
        recorder = Recorder(capture.reducer, capture.point, (0,), batch.lengths)
        recorder.rows(0, Rows(rows, batch.lengths))
        return [recorder.close(batch.index)]


def far_out(planted: tuple[int, ...]) -> Any:
    """Random rows, the planted ones farthest along the first dimension; the reserved at one point."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(toy.V, 6)).clip(-2, 2)
    rows[list(planted), 0] = 3 + 0.1 * rng.normal(size=len(planted))
    rows[list(toy.RESERVED)] = rows[toy.RESERVED[0]] + 0.01 * rng.normal(size=(3, 6))
    return VocabularyWeights(rows.astype(np.float32), rows.astype(np.float32), None, True)

"""Translators of a tuned lens: fitted by least squares, trained on the exact KL divergence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probekit.core import InputError
from probekit.reduce.frozen_norm import FrozenNorm
from probekit.reduce.unembed import Unembed

RIDGES = (1e-3, 1e-2, 1e-1)  # added to the correlations of the inputs; the best is chosen on tokens kept apart
ABSORBED = 0.2  # first length that is tried along the direction that the unembedding hardly reads
_FLOOR = 1e-4  # of the mean variance: directions with less are not whitened further
_ROWS = 64  # rows whose logits exist at a time


class LeastSquares:
    """Sums from which the linear map from each layer's rows to the final ones follows.

    The final norm divides a row by its length, so each token weighs 1 / mean square of its final row: what is fitted is
    the direction. Sums are float64.

    Args:
        n_layers: blocks, the last of which is the target.
        d_model: width.
        device: where the rows are.
    """

    def __init__(self, n_layers: int, d_model: int, device: torch.device) -> None:
        n = n_layers - 1
        exact: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.weight = torch.zeros((), **exact)
        self.means = torch.zeros(n_layers, d_model, **exact)
        self.squares = torch.zeros(n, d_model, d_model, **exact)
        self.crossed = torch.zeros(n, d_model, d_model, **exact)

    def add(self, rows: Tensor) -> None:
        """Take in some tokens; axes layer, token, d_model."""
        weights = 1 / rows[-1].double().square().mean(-1).clamp(min=1e-30)
        roots = weights.sqrt().float()
        self.weight += weights.sum()
        final = rows[-1] * roots[:, None]
        for layer, own in enumerate(rows[:-1]):  # products are float32, of one chunk; only their sums are float64
            scaled = own * roots[:, None]
            self.means[layer] += roots @ scaled
            self.squares[layer] += scaled.T @ scaled
            self.crossed[layer] += scaled.T @ final
        self.means[-1] += roots @ final

    def spread(self, layer: int) -> tuple[Tensor, Tensor]:
        """Mean (d_model) and covariance (d_model, d_model) of a layer's rows."""
        mean = self.means[layer] / self.weight
        return mean, self.squares[layer] / self.weight - torch.outer(mean, mean)

    def solve(self, layer: int, ridge: float) -> tuple[Tensor, Tensor]:
        """A (d_model, d_model) and b (d_model) of the best h + A h + b, float32.

        Args:
            layer: the block whose output is read.
            ridge: is added to the diagonal of the inputs' correlations.
        """
        mean, covariance = self.spread(layer)
        final = self.means[-1] / self.weight
        wanted = self.crossed[layer] / self.weight - torch.outer(mean, final) - covariance
        size = covariance.diagonal().clamp(min=1e-30).sqrt()
        correlations = covariance / torch.outer(size, size) + ridge * torch.eye(len(size), device=size.device)
        matrix = (torch.linalg.solve(correlations, wanted / size[:, None]) / size[:, None]).T
        return matrix.float(), (final - mean - matrix @ mean).float()

    def whitening(self, layer: int) -> tuple[Tensor, Tensor]:
        """Mean (d_model) and matrix P (d_model, d_model): the covariance of (h - mean) P is about 1; float32."""
        mean, covariance = self.spread(layer)
        values, vectors = torch.linalg.eigh(covariance)
        floor = (_FLOOR * values.mean()).clamp(min=1e-30)
        return mean.float(), (vectors * values.clamp(min=floor).rsqrt()).float()

    def state(self) -> dict[str, Tensor]:
        """The sums, for a checkpoint."""
        return dict(vars(self))

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from sums that `state` gave."""
        for name, values in state.items():
            setattr(self, name, values.to(self.weight.device))


@dataclass(frozen=True)
class Coordinates:
    """What a trained matrix reads and what its outcome is added to: base + scale · (B x + c), x = (h - mean) P.

    Args:
        matrix: A of the translator that training begins with; axes d_model out, d_model in.
        bias: b of it.
        mean: of the rows.
        whitening: P.
        scale: of the final rows.
    """

    matrix: Tensor
    bias: Tensor
    mean: Tensor
    whitening: Tensor
    scale: float

    def inputs(self, rows: Tensor) -> Tensor:
        """X of rows; axes token, d_model."""
        return (rows - self.mean) @ self.whitening

    def translated(self, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Rows as the final norm reads them."""
        base = rows + rows @ self.matrix.T + self.bias
        return base + self.scale * (self.inputs(rows) @ weight.T + bias)

    def plain(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """A and b of h + A h + b."""
        added = self.scale * (weight @ self.whitening.T)
        return self.matrix + added, self.bias + self.scale * bias - added @ self.mean


def zero_coordinates(d_model: int, device: torch.device) -> Coordinates:
    """Training begins with the logit lens, in the rows' own coordinates."""
    zero, none = torch.zeros(d_model, d_model, device=device), torch.zeros(d_model, device=device)
    return Coordinates(zero, none, none, torch.eye(d_model, device=device), 1.0)


@dataclass(frozen=True)
class Final:
    """The model's own next-token distributions.

    Args:
        probs: axes row, vocab.
        entropy: in nats; axis row.
    """

    probs: Tensor
    entropy: Tensor


class Reading:
    """Next-token distributions of translated rows, with a gradient.

    Args:
        unembed: the model's own way from rows to logits.
    """

    def __init__(self, unembed: Unembed) -> None:
        self.unembed, self.dtype = unembed, unembed.weight.dtype
        self.weight = unembed.weight.detach()
        self.bias = None if unembed.bias is None else unembed.bias.detach()

    def logprobs(self, rows: Tensor) -> Tensor:
        """Log-probabilities of the next token; axes row, vocab; float32."""
        logits = self.unembed.norm(rows.to(self.dtype)).to(self.dtype) @ self.weight.T
        if self.bias is not None:
            logits = logits + self.bias
        return self.unembed.finish(logits.float()).log_softmax(-1)

    def final(self, rows: Tensor) -> Final:
        """The model's own distribution, from rows that leave the last block; axes row, d_model."""
        with torch.no_grad():
            logprobs = self.logprobs(rows)
            probs = logprobs.exp()
            return Final(probs, -(probs * logprobs).sum(-1))

    def loss(self, rows: Tensor, final: Final) -> Tensor:
        """Mean over rows of KL(final ‖ reading), nats; axes of `rows` row, d_model, translated."""
        crossed = (final.probs * self.logprobs(rows)).sum(-1)
        return (-final.entropy - crossed).mean()

    def divergence(self, rows: Tensor, final: Final) -> float:
        """The same as a number, without gradient, some rows at a time."""
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(rows), _ROWS):
                some = slice(start, start + _ROWS)
                part = Final(final.probs[some], final.entropy[some])
                total += float(self.loss(rows[some], part)) * len(rows[some])
        return total / len(rows)

    def quiet_direction(self) -> Tensor:
        """The direction of a row that changes the next-token distribution least, of length 1; axis d_model.

        The unembedding, centred over the vocabulary, and the norm's gain say how much a direction is read. Such a
        direction takes up length before the norm, and so makes readings less sharp (Stolfo et al. 2024, arXiv
        2406.16254, on entropy neurons).
        """
        with torch.no_grad():
            norm = FrozenNorm.of(self.unembed.norm, self.weight[:1])
            gram = torch.zeros(
                self.weight.shape[1], self.weight.shape[1], dtype=torch.float64, device=self.weight.device
            )
            total = torch.zeros_like(gram[0])
            for rows in self.weight.split(8192):
                gram += (rows.float().T @ rows.float()).double()
                total += rows.double().sum(0)
            gram -= torch.outer(total, total) / len(self.weight)
            gram *= torch.outer(norm.gain, norm.gain)
            if norm.centres:  # what the norm takes away takes up no length
                centring = torch.eye(len(gram), device=gram.device, dtype=gram.dtype) - 1 / len(gram)
                gram = centring @ gram @ centring + gram.trace() / len(gram)
            return torch.linalg.eigh(gram)[1][:, 0].float()


@dataclass(frozen=True)
class Apart:
    """Tokens that choices are made on: never trained on, and not those that a report is about.

    Args:
        rows: axes layer, token, d_model.
        final: the model's own distributions.
    """

    rows: Tensor
    final: Final


def fitted_coordinates(
    layer: int, sums: LeastSquares, reading: Reading, apart: Apart, quiet: Tensor
) -> tuple[Coordinates, float]:
    """Where training begins: the best ridge regression, with its readings as sharp as they should be.

    Args:
        layer: the block whose output is read.
        sums: of the training tokens.
        reading: the model's unembedding.
        apart: tokens on which ridge and sharpness are chosen.
        quiet: from `Reading.quiet_direction`.

    Returns:
        The coordinates, and their KL on `apart`.
    """
    rows = apart.rows[layer]
    found = []
    for ridge in RIDGES:
        matrix, bias = sums.solve(layer, ridge)
        translated = rows + rows @ matrix.T + bias
        found.append((reading.divergence(translated, apart.final), matrix, bias, translated))
    best, matrix, bias, translated = min(found, key=lambda f: f[0])
    length = float(translated.norm(dim=-1).median())
    share = 0.0
    for sign in (1.0, -1.0):
        step = sign * ABSORBED
        while (trial := reading.divergence(translated + step * length * quiet, apart.final)) < best:
            best, share, step = trial, step, step + sign * ABSORBED
        if share:
            break
    mean, whitening = sums.whitening(layer)
    scale = float(apart.rows[-1].square().mean(-1).median().sqrt())
    return Coordinates(matrix, bias + share * length * quiet, mean, whitening, scale), best


class Translators:
    """The matrices that are trained, their optimiser and its schedule.

    Args:
        recipe: "regression" (Adam, whitened coordinates), "sgd" or "adam" (as released, raw coordinates).
        coordinates: of each block but the last.
        steps: updates in all.
        rate: learning rate at its peak.
        decay: weight decay.
    """

    def __init__(self, recipe: str, coordinates: Sequence[Coordinates], steps: int, rate: float, decay: float) -> None:
        self.coordinates, self.steps, self.rate, self.done = list(coordinates), steps, rate, 0
        self.warmup = 0 if recipe == "sgd" else min(1000, steps // 5)
        self.weights = [torch.zeros_like(c.matrix, requires_grad=True) for c in self.coordinates]
        self.biases = [torch.zeros_like(c.bias, requires_grad=True) for c in self.coordinates]
        self.parameters = [*self.weights, *self.biases]
        how: dict[str, Any] = {"lr": rate, "weight_decay": decay}
        self.clip = recipe != "regression"
        self.optimiser: torch.optim.Optimizer
        if recipe == "sgd":
            self.optimiser = torch.optim.SGD(self.parameters, momentum=0.9, nesterov=True, **how)
        elif recipe == "adam":
            self.optimiser = torch.optim.Adam(self.parameters, betas=(0.9, 0.999), amsgrad=True, **how)
        else:
            self.optimiser = torch.optim.Adam(self.parameters, betas=(0.9, 0.99), **how)

    def step(self, rows: Tensor, reading: Reading) -> list[float]:
        """One update: KL(model ‖ lens) of every layer, each differentiated by itself.

        Args:
            rows: some tokens; axes layer, token, d_model.
            reading: the model's unembedding.

        Returns:
            The loss of each layer before the update, nats.

        Raises:
            InputError: the loss is not finite; says what to change.
        """
        final = reading.final(rows[-1])
        losses = []
        self.optimiser.zero_grad(set_to_none=True)
        with torch.enable_grad():
            for layer, where in enumerate(self.coordinates):
                translated = where.translated(rows[layer], self.weights[layer], self.biases[layer])
                loss = reading.loss(translated, final)
                own = self.weights[layer], self.biases[layer]
                # Not backward(): that would leave gradients on the model's final norm.
                for parameter, gradient in zip(own, torch.autograd.grad(loss, own), strict=True):
                    parameter.grad = gradient
                losses.append(float(loss.detach()))
        if not all(map(math.isfinite, losses)):
            raise InputError(
                f"Training diverged at step {self.done} (learning rate {self.rate:g}): the loss is not finite. "
                "Lower learning_rate."
            )
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * self._share()
        self.optimiser.step()
        self.done += 1
        return losses

    def _share(self) -> float:
        """Of the peak rate: up linearly, then down to 0."""
        if self.done < self.warmup:
            return (self.done + 1) / self.warmup
        return (self.steps - self.done) / max(1, self.steps - self.warmup)

    def plain(self, layer: int) -> tuple[Tensor, Tensor]:
        """A and b of h + A h + b, as trained so far."""
        with torch.no_grad():
            return self.coordinates[layer].plain(self.weights[layer].detach(), self.biases[layer].detach())

    def state(self) -> dict[str, Any]:
        """Everything that training goes on from."""
        return {
            "coordinates": [vars(c) for c in self.coordinates],
            "weights": [w.detach() for w in self.weights],
            "biases": [b.detach() for b in self.biases],
            "optimiser": self.optimiser.state_dict(),
            "done": self.done,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        with torch.no_grad():
            for own, kept in zip(self.parameters, [*state["weights"], *state["biases"]], strict=True):
                own.copy_(kept)
        self.optimiser.load_state_dict(state["optimiser"])
        self.done = state["done"]

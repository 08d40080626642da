"""The lens: next-token distributions read from residual rows, never layer × token × vocabulary as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .base import Recorder
from .sizes import ROWS, RUN, STRIP, TOKENS, VOCAB_TILE
from .unembed import Unembed

Translate = Callable[[int, Tensor], Tensor]  # what a lens makes of the rows that leave a block, given its number


@dataclass(frozen=True)
class VocabRows:
    """Next-token logits of some layers at some tokens, with what several reducers want of them.

    Args:
        logits: axes layer, token, vocab; float32; overwritten after `measure`.
        targets: id of the token that really follows, axis token; -1 where none does.
        final: the final distribution at the same tokens; None if these rows are the final ones.
        probs: a buffer like `logits`; holds the probabilities once they were asked for.
        work: a buffer like `logits` for intermediate products.
    """

    logits: Tensor
    targets: Tensor
    final: FinalRows | None
    probs: Tensor
    work: Tensor

    @cached_property
    def _filled(self) -> Tensor:
        return torch.softmax(self.logits, dim=-1, out=self.probs)

    @cached_property
    def _mass(self) -> Tensor:
        # Rounding keeps the probabilities from summing to exactly 1; every expectation divides by this.
        return self._filled.sum(-1)

    @cached_property
    def _run_maxima(self) -> Tensor:
        n_runs, rest = divmod(self.logits.shape[-1], RUN)
        runs = self.logits[..., : n_runs * RUN].unflatten(-1, (n_runs, RUN)).amax(-1)
        return torch.cat([runs, self.logits[..., n_runs * RUN :].amax(-1, keepdim=True)], -1) if rest else runs

    def _mean_of_logits(self, probs: Tensor, mass: Tensor) -> Tensor:
        return torch.mul(probs, self.logits, out=self.work).sum(-1) / mass

    @cached_property
    def log_sum(self) -> Tensor:
        """Log of the sum of exp(logits); axes layer, token."""
        largest = self._run_maxima.amax(-1)
        # The largest probability is exp(largest logit - log_sum); no pass over the logits is needed.
        return largest - (self._filled.amax(-1) / self._mass).log()

    @cached_property
    def entropy_nats(self) -> Tensor:
        """Entropy; axes layer, token."""
        return (self.log_sum - self._mean_of_logits(self._filled, self._mass)).clamp(min=0)

    @property
    def varentropy_nats2(self) -> Tensor:
        """Variance of the surprisal; axes layer, token."""
        mean = self._mean_of_logits(self._filled, self._mass)
        centred = torch.sub(self.logits, mean[..., None], out=self.work)
        return centred.square_().mul_(self._filled).sum(-1) / self._mass

    @property
    def kl_from_final_nats(self) -> Tensor:
        """KL(final ‖ these rows); axes layer, token; zero for the final rows."""
        if self.final is None:
            return torch.zeros_like(self.log_sum)
        crossed = self._mean_of_logits(self.final.probs, self.final.mass)
        return (self.log_sum - crossed - self.final.entropy_nats).clamp(min=0)

    @cached_property
    def _target_logits(self) -> Tensor:
        at = self.targets.clamp(min=0).expand(self.logits.shape[:2])[..., None]
        return self.logits.gather(-1, at)[..., 0].masked_fill(self.targets < 0, float("nan"))

    @property
    def target_logprob(self) -> Tensor:
        """Log-probability of the token that follows; NaN where none does."""
        return self._target_logits - self.log_sum

    @property
    def target_rank(self) -> Tensor:
        """How many tokens have a larger logit than the one that follows; NaN where none does."""
        above = torch.gt(self.logits, self._target_logits[..., None], out=self.work)
        return above.sum(-1).masked_fill(self.targets < 0, float("nan"))

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The `k` largest log-probabilities and their ids, largest first; axes layer, token, rank."""
        values, ids = self._top_logits(k)
        return values - self.log_sum[..., None], ids

    def _top_logits(self, k: int) -> tuple[Tensor, Tensor]:
        n_vocab = self.logits.shape[-1]
        n_runs = n_vocab // RUN
        if n_runs <= 2 * k:
            return self.logits.topk(min(k, n_vocab), dim=-1)
        # The k largest entries lie in the k runs with the largest maxima (and in the rest past the last run).
        best = self._run_maxima[..., :n_runs].topk(k, dim=-1).indices
        runs = self.logits[..., : n_runs * RUN].unflatten(-1, (n_runs, RUN))
        inside = runs.gather(-2, best[..., None].expand(*best.shape, RUN)).flatten(-2)
        place = (best[..., None] * RUN + torch.arange(RUN, device=best.device)).flatten(-2)
        rest = self.logits[..., n_runs * RUN :]
        if rest.shape[-1]:
            beyond = torch.arange(n_runs * RUN, n_vocab, device=best.device).expand(rest.shape)
            inside, place = torch.cat([inside, rest], -1), torch.cat([place, beyond], -1)
        values, at = inside.topk(k, dim=-1)
        return values, place.gather(-1, at)


@dataclass(frozen=True)
class FinalRows:
    """The model's own distribution at some tokens, for comparison with a layer's.

    Args:
        probs: up to a factor near 1; axes 1, token, vocab.
        mass: the sum of `probs`; axes 1, token.
        entropy_nats: axes 1, token.
    """

    probs: Tensor
    mass: Tensor
    entropy_nats: Tensor

    def strip(self, start: int, stop: int) -> FinalRows:
        """The rows of some of the tokens."""
        return FinalRows(self.probs[:, start:stop], self.mass[:, start:stop], self.entropy_nats[:, start:stop])


def project(rows: Tensor, unembed: Unembed, out: Tensor) -> Tensor:
    """Logits of residual rows, written into `out`; axes row, vocab."""
    normed = unembed.norm(rows).to(unembed.weight.dtype)
    for a in range(0, out.shape[-1], VOCAB_TILE):
        tile = out[:, a : a + VOCAB_TILE]
        weight = unembed.weight[a : a + VOCAB_TILE].T
        if normed.dtype == torch.float32:
            torch.mm(normed, weight, out=tile)
        else:
            tile.copy_(normed @ weight)
    if unembed.bias is not None:
        out += unembed.bias.float()
    return unembed.finish(out)


def stream_readout(
    residuals: Mapping[int, Tensor],
    last_layer: int,
    targets: Tensor,
    unembed: Unembed,
    layered: Sequence[Recorder],
    final_only: Sequence[Recorder],
    progress: Callable[[int], None] | None = None,
    *,
    translate: Translate | None = None,
) -> None:
    """Read next-token distributions from residual rows, some layers and tokens at a time.

    Args:
        residuals: rows leaving each wanted block, axes token, d_model; the last block is among them.
        last_layer: number of the last block, whose rows give the model's own distribution.
        targets: id of the token that follows each row; -1 where none does.
        unembed: the way from rows to logits.
        layered: recorders of readouts at layers.
        final_only: recorders of the model's own distribution.
        progress: is told how many rows were read since the last call.
        translate: what a lens makes of the rows that leave a block, given its number; nothing if None.
    """
    n_vocab, last = unembed.weight.shape[0], residuals[last_layer]
    wanted = sorted({layer for r in layered for layer in r.layers} - {last_layer})
    n_chunk = max(1, min(len(targets), TOKENS))
    n_rows = max(n_chunk, min(ROWS, n_chunk * (len(wanted) + 1)))
    stacked = last.new_empty((n_rows, n_vocab), dtype=torch.float32)
    own_probs = last.new_empty((n_chunk, n_vocab), dtype=torch.float32)
    strips = _Strips(last.new_empty((2, 1, min(n_chunk, STRIP), n_vocab), dtype=torch.float32))
    own_layered = [r for r in layered if r.wants(last_layer)]
    for start in range(0, len(targets), TOKENS):
        stop = min(start + TOKENS, len(targets))
        n, target, final = stop - start, targets[start:stop], None
        for some in _groups([last_layer, *wanted], n_rows // n):
            rows = torch.cat([translated(translate, layer, residuals[layer][start:stop]) for layer in some])
            logits = project(rows, unembed, stacked[: len(rows)]).view(len(some), n, n_vocab)
            for layer, of_layer in zip(some, logits, strict=True):
                if final is None:  # the last layer comes first: the others are compared with it
                    final = strips.final(of_layer, own_probs[:n], target, start, layer, own_layered, final_only)
                else:
                    strips.layer(of_layer, final, target, start, layer, [r for r in layered if r.wants(layer)])
        if progress is not None:
            progress(n * (len(wanted) + 1))


def translated(translate: Translate | None, layer: int, rows: Tensor) -> Tensor:
    """What a lens makes of the rows that leave a block; the rows themselves without one."""
    return rows if translate is None else translate(layer, rows)


def _groups(layers: list[int], at_most: int) -> list[list[int]]:
    """Consecutive groups of layers that share a product; only the first may be short."""
    first = len(layers) % at_most or at_most
    return [layers[:first], *(layers[i : i + at_most] for i in range(first, len(layers), at_most))]


class _Strips:
    """Cuts logits into strips of rows that fit the cache and shows them to recorders.

    Args:
        buffers: two of them, axes buffer, 1, token, vocab.
    """

    def __init__(self, buffers: Tensor) -> None:
        self.probs, self.work = buffers

    def layer(
        self, logits: Tensor, final: FinalRows, targets: Tensor, start: int, layer: int, recorders: Sequence[Recorder]
    ) -> None:
        """One layer's logits (axes token, vocab) for the tokens from `start` on."""
        for a in range(0, len(logits), STRIP):
            b = min(a + STRIP, len(logits))
            n = b - a
            strip = VocabRows(logits[None, a:b], targets[a:b], final.strip(a, b), self.probs[:, :n], self.work[:, :n])
            for recorder in recorders:
                recorder.vocab((layer,), start + a, strip)

    def final(
        self,
        logits: Tensor,
        probs: Tensor,
        targets: Tensor,
        start: int,
        last_layer: int,
        layered: Sequence[Recorder],
        final_only: Sequence[Recorder],
    ) -> FinalRows:
        """The model's own logits: shown as the last layer and as themselves; returned for comparison."""
        masses, entropies = [], []
        for a in range(0, len(logits), STRIP):
            b = min(a + STRIP, len(logits))
            strip = VocabRows(logits[None, a:b], targets[a:b], None, probs[None, a:b], self.work[:, : b - a])
            for recorder in layered:
                recorder.vocab((last_layer,), start + a, strip)
            for recorder in final_only:
                recorder.vocab((0,), start + a, strip)
            entropies.append(strip.entropy_nats)
            masses.append(strip._mass)
        return FinalRows(probs[None], torch.cat(masses, 1), torch.cat(entropies, 1))

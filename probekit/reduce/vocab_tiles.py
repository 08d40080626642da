"""The lens on an accelerator: running sums over tiles of the vocabulary; the logits of a row never exist as a whole.

The same numbers as `vocab_rows`, made for devices where memory traffic costs more than arithmetic: each
tile of logits is reduced as soon as it is computed, in one function that `torch.compile` fuses. Products run in
the weights' type, sums in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Recorder
from .sizes import DEVICE_ROWS, DEVICE_TILE
from .unembed import Unembed
from .vocab_rows import Translate, stream_readout, translated


@dataclass
class RunningRows:
    """What the tiles seen so far say of each row; axes layer, token.

    Sums are relative to the running maximum m: `mass` = sum e^(x - m), `first` = sum e^(x - m) (x - m),
    `second` the same with the square; `crossed` = sum p_final x.
    """

    top: Tensor
    mass: Tensor
    first: Tensor
    second: Tensor
    crossed: Tensor
    above: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, int], device: torch.device) -> RunningRows:
        """Before the first tile."""
        zero = torch.zeros(shape, device=device)
        return cls(torch.full(shape, -torch.inf, device=device), *(zero.clone() for _ in range(5)))

    @property
    def log_sum(self) -> Tensor:
        """Log of the sum of exp(logits)."""
        return self.top + self.mass.log()


def add_tile(
    rows: RunningRows, tile: Tensor, final_probs: Tensor | None, wanted: Tensor, is_wanted: Tensor
) -> RunningRows:
    """The sums after one more tile.

    Args:
        rows: the sums before.
        tile: logits; axes layer, token, vocabulary of the tile.
        final_probs: the final distribution's probabilities of the same entries, one layer; None for the final rows.
        wanted: logit of the token that follows; axes layer, token.
        is_wanted: axes token, vocabulary of the tile: where that token itself is, which is not above itself.
    """
    top = torch.maximum(rows.top, tile.amax(-1))
    # The first tile finds a maximum of -inf and sums of 0; there is nothing to shift then.
    shift = torch.where(rows.top.isfinite(), rows.top - top, 0.0)
    keep = shift.exp()
    centred = tile - top[..., None]
    weights = centred.exp()
    second = keep * (rows.second + 2 * shift * rows.first + shift * shift * rows.mass)
    first = keep * (rows.first + shift * rows.mass)
    crossed = rows.crossed if final_probs is None else rows.crossed + (final_probs * tile).sum(-1)
    return RunningRows(
        top,
        keep * rows.mass + weights.sum(-1),
        first + (weights * centred).sum(-1),
        second + (weights * centred * centred).sum(-1),
        crossed,
        rows.above + ((tile > wanted[..., None]) & ~is_wanted).sum(-1),
    )


@dataclass(frozen=True)
class VocabNumbers:
    """What reducers want of next-token distributions, computed; the counterpart of `VocabRows`. Axes layer, token."""

    entropy_nats: Tensor
    varentropy_nats2: Tensor
    kl_from_final_nats: Tensor
    target_logprob: Tensor
    target_rank: Tensor
    top_logprobs: Tensor
    top_ids: Tensor

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The `k` largest log-probabilities and their ids; axes layer, token, rank."""
        return self.top_logprobs[..., :k], self.top_ids[..., :k]

    def of(self, layers: list[int]) -> VocabNumbers:
        """The numbers of some of the layers, by their place on the layer axis."""
        return VocabNumbers(**{name: values[layers] for name, values in vars(self).items()})


class _Reader:
    """Reads rows tile by tile."""

    def __init__(self, unembed: Unembed, top_k: int, compiled: bool) -> None:
        self.unembed, self.n_vocab = unembed, unembed.weight.shape[0]
        self.top_k = min(top_k, self.n_vocab)
        self.add: Callable[..., RunningRows] = torch.compile(add_tile) if compiled else add_tile

    def logits(self, normed: Tensor, start: int) -> Tensor:
        """One tile of logits, float32; the last axis is the vocabulary of the tile."""
        stop = min(start + DEVICE_TILE, self.n_vocab)
        tile = (normed @ self.unembed.weight[start:stop].T).float()
        if self.unembed.bias is not None:
            tile = tile + self.unembed.bias[start:stop].float()
        return self.unembed.finish(tile)

    def normed(self, rows: Tensor) -> Tensor:
        """Rows after the final norm, in the type of the unembedding."""
        return self.unembed.norm(rows).to(self.unembed.weight.dtype)

    def read(
        self, rows: Tensor, targets: Tensor, final: tuple[Tensor, Tensor, Tensor] | None
    ) -> tuple[VocabNumbers, Tensor]:
        """The numbers of some rows, and their log-sums; axes layer, token.

        Args:
            rows: residual rows; axes layer, token, d_model.
            targets: id of the token that follows, axis token; -1 where none does.
            final: normed final rows, their log-sums and entropies, one layer; None if these are they.
        """
        normed = self.normed(rows)
        known = targets.clamp(min=0)
        sums = RunningRows.empty((rows.shape[0], rows.shape[1]), rows.device)
        wanted = self._logit_of(normed, known)
        best = torch.full((*rows.shape[:2], self.top_k), -torch.inf, device=rows.device)
        best_ids = torch.zeros(best.shape, dtype=torch.long, device=rows.device)
        for start in range(0, self.n_vocab, DEVICE_TILE):
            tile = self.logits(normed, start)
            ids = torch.arange(start, start + tile.shape[-1], device=rows.device)
            probs = None if final is None else (self.logits(final[0], start) - final[1][..., None]).exp()
            sums = self.add(sums, tile, probs, wanted, ids[None] == known[:, None])
            values, at = torch.cat([best, tile], -1).topk(self.top_k, -1)
            best_ids = torch.cat([best_ids, ids.expand(tile.shape)], -1).gather(-1, at)
            best = values
        return self._numbers(sums, wanted, targets, best, best_ids, final), sums.log_sum

    def _logit_of(self, normed: Tensor, ids: Tensor) -> Tensor:
        rows = (normed.float() * self.unembed.weight[ids].float()).sum(-1, keepdim=True)
        if self.unembed.bias is not None:
            rows = rows + self.unembed.bias[ids].float()[:, None]
        return self.unembed.finish(rows)[..., 0]

    def _numbers(
        self,
        sums: RunningRows,
        wanted: Tensor,
        targets: Tensor,
        best: Tensor,
        best_ids: Tensor,
        final: tuple[Tensor, Tensor, Tensor] | None,
    ) -> VocabNumbers:
        log_sum, mean = sums.log_sum, sums.first / sums.mass
        none = targets < 0
        kl = torch.zeros_like(mean) if final is None else (log_sum - sums.crossed - final[2]).clamp(min=0)
        return VocabNumbers(
            entropy_nats=(sums.mass.log() - mean).clamp(min=0),
            varentropy_nats2=(sums.second / sums.mass - mean * mean).clamp(min=0),
            kl_from_final_nats=kl,
            target_logprob=(wanted - log_sum).masked_fill(none, torch.nan),
            target_rank=sums.above.masked_fill(none, torch.nan),
            top_logprobs=best - log_sum[..., None],
            top_ids=best_ids,
        )


def stream_readout_tiles(
    residuals: Mapping[int, Tensor],
    last_layer: int,
    targets: Tensor,
    unembed: Unembed,
    layered: Sequence[Recorder],
    final_only: Sequence[Recorder],
    progress: Callable[[int], None] | None = None,
    *,
    compiled: bool = True,
    translate: Translate | None = None,
) -> None:
    """As `probekit.reduce.vocab_rows.stream_readout`, tile by tile.

    Args:
        residuals: rows leaving each wanted block, axes token, d_model; the last block is among them.
        last_layer: number of the last block, whose rows give the model's own distribution.
        targets: id of the token that follows each row; -1 where none does.
        unembed: the way from rows to logits.
        layered: recorders of readouts at layers.
        final_only: recorders of the model's own distribution.
        progress: is told how many rows were read since the last call.
        compiled: fuse the reduction with torch.compile.
        translate: as there.
    """
    whole = [r for r in (*layered, *final_only) if getattr(r.reducer, "whole_rows", False)]
    if whole:  # these sort or cut whole rows, which tiles do not hold
        some = [r for r in layered if r in whole], [r for r in final_only if r in whole]
        stream_readout(residuals, last_layer, targets, unembed, *some, translate=translate)
        layered, final_only = [r for r in layered if r not in whole], [r for r in final_only if r not in whole]
    recorders = [*layered, *final_only]
    if not recorders:
        return
    reader = _Reader(unembed, max((getattr(r.reducer, "top_k", 1) for r in recorders), default=1), compiled)
    wanted = sorted({layer for r in layered for layer in r.layers} - {last_layer})
    n_tokens = max(1, DEVICE_ROWS // max(1, len(wanted)))
    for start in range(0, len(targets), n_tokens):
        chunk = slice(start, min(start + n_tokens, len(targets)))
        last = residuals[last_layer][None, chunk]
        own, log_sum = reader.read(last, targets[chunk], None)
        for recorder in final_only:
            recorder.vocab((0,), start, own)
        for recorder in layered:
            if recorder.wants(last_layer):
                recorder.vocab((last_layer,), start, own)
        if wanted:
            final = (reader.normed(last), log_sum, own.entropy_nats)
            # All layers at once, so that each tile of the final distribution is computed once for all of them.
            rows = torch.stack([translated(translate, i, residuals[i][chunk]) for i in wanted])
            numbers, _ = reader.read(rows, targets[chunk], final)
            for recorder in layered:
                here = [i for i in wanted if recorder.wants(i)]
                if here:
                    recorder.vocab(here, start, numbers.of([wanted.index(i) for i in here]))
        if progress is not None:
            progress((chunk.stop - start) * (len(wanted) + 1))

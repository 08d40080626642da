"""What was found out about validated tokens: the published rule, random tokens, both sides of u."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from .sticky import beyond_random, outlier_cut, two_sided
from .sticky_choice import CANDIDATE, RANDOM, spread, strongest, tested
from .sticky_trials import Pairs, Trials, hit_shares

_BINS = 40


@dataclass(frozen=True)
class Validated:
    """Everything about one model's tokens.

    Args:
        asked: 1 for candidates, 2 for random tokens, 3 for named ones; axis vocab.
        score: axis vocab, NaN where not scored.
        p: axis vocab, NaN where not validated.
        valid: the validated tokens, by id, on pairs below u.
        higher: the same on pairs above u, with the largest number of copies.
        below: the pairs below u.
        above: the pairs above u.
        u: mean similarity of the vocabulary.
    """

    asked: np.ndarray
    score: np.ndarray
    p: np.ndarray
    valid: Trials
    higher: Trials
    below: Pairs
    above: Pairs
    u: float

    def dataset(self, scoring: Pairs, *, level: float) -> xr.Dataset:
        """The measures that follow.

        Args:
            scoring: pairs that candidates were chosen by; they do not count against random tokens.
            level: probability with which at least one of the tested tokens is called though all are random.
        """
        asked, score, p, tokens = self.asked, self.score, self.p, np.flatnonzero(self.asked)
        fresh = np.array([pair not in scoring.texts for pair in self.below.texts])
        held = spread(hit_shares(self.valid, self.below, fresh), tokens, len(asked))
        cut, chosen = outlier_cut(p[asked == CANDIDATE]), tested(asked)
        sticky = np.zeros(len(asked), dtype=np.int64)
        if fresh.any():
            sticky[chosen] = beyond_random(held[chosen], held[asked == RANDOM], int(fresh.sum()), level)
        ratios = both_sides(self.below, self.valid.cosine, self.above, self.higher.cosine, self.u)
        per_token = {
            "two_sided": ratios[:, 0], "variance_ratio": ratios[:, 1],
            "survival": self.valid.survival, "added": self.valid.added,
        }  # fmt: skip
        counts, edges = np.histogram(score[np.isfinite(score)], bins=_BINS)
        moved = np.concatenate([t.cosine[..., -1].mean(axis=-1) for t in (self.valid, self.higher)], axis=1)
        return xr.Dataset(
            {
                "score": ("vocab", score),
                "score_cut": ((), score[asked == CANDIDATE].min()),
                "asked": ("vocab", asked),
                "p": ("vocab", p),
                "p_fresh": ("vocab", held),
                "cut": ((), cut),
                "published": ("vocab", (chosen & (p > cut)).astype(np.int64)),
                "sticky": ("vocab", sticky),
                **{name: ("vocab", spread(v, tokens, len(asked))) for name, v in per_token.items()},
                "before": ("rank", np.concatenate([self.below.cosine, self.above.cosine])),
                "after": ("rank", moved[tokens == strongest(p, asked)[0]][0]),
                "after_random": ("rank", moved[asked[tokens] == RANDOM].mean(axis=0)),
                "n_pairs": ((), len(self.below)),
                "count": ("bin", counts),
            },
            coords={"bin": (edges[:-1] + edges[1:]) / 2, "vocab": np.arange(len(asked))},
        )


def both_sides(below: Pairs, cosine: np.ndarray, above: Pairs, higher: np.ndarray, u: float) -> np.ndarray:
    """Two-sided stickiness of each token at the largest count: mean |cos - u| and variance, over those without tokens.

    As many pairs of either side, those below evenly from the validation; places weigh the same.

    Args:
        below: pairs of the validation.
        cosine: with tokens; axes token, pair, place, count.
        above: pairs above u.
        higher: with tokens; axes token, pair, place, count.
        u: mean similarity of the vocabulary.

    Returns:
        Axes token, and the two ratios; NaN where no pair lies above u.
    """
    n = min(len(above), len(below))
    if not n:
        return np.full((len(cosine), 2), np.nan)
    low = np.linspace(0, len(below) - 1, n).round().astype(int)
    high = np.linspace(0, len(above) - 1, n).round().astype(int)
    without = np.concatenate([below.cosine[low], above.cosine[high]])[:, None]
    moved = np.concatenate([cosine[..., -1][:, low], higher[..., -1][:, high]], axis=1)
    return np.array([two_sided(one, without, u) for one in moved])

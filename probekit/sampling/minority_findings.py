"""What forking-tokens claims: how well entropy predicts forks, how concentrated it is, and in which tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from probekit.analysis import Finding, Result, fmt
from probekit.plots import visible
from probekit.stats import Estimate

from .drawn import jackknife
from .fork_labels import auroc, auroc_estimate, share_estimate
from .minority import carried
from .minority_table import units_of

FEWEST = 5  # forks, and positions that do not fork, without which nothing is said of how well entropy tells them apart
SMALL_NATS = 0.01  # entropy below which a token counts as determined, as in arXiv 2506.01939


@dataclass(frozen=True)
class Evidence:
    """What a result of forking-tokens holds of the sampled positions, in the form that claims need."""

    result: Result

    def at(self, name: str) -> np.ndarray:
        """A number of the sampled positions."""
        return np.asarray(self.result[name].values[self.places], dtype=float)

    @cached_property
    def places(self) -> np.ndarray:
        """Where they lie on the token axis."""
        return np.flatnonzero(self.result["weight"].values)

    @cached_property
    def fork(self) -> np.ndarray:
        """Which of them fork."""
        return self.at("fork") > 0

    @cached_property
    def n_unit(self) -> str:
        """What intervals resample."""
        return units_of(self.result["prompt"].values)[1]

    @cached_property
    def unit_of_token(self) -> np.ndarray:
        """The unit of each token."""
        return units_of(self.result["prompt"].values)[0][self.result["text"].values.astype(int)]

    @cached_property
    def eligible(self) -> np.ndarray:
        """Tokens with two plausible tokens or more."""
        return np.asarray(self.result["n_plausible"].values > 1)

    @cached_property
    def minority(self) -> np.ndarray:
        """Tokens in the minority."""
        return np.asarray(self.result["minority"].values > 0)

    @cached_property
    def fork_share(self) -> Estimate:
        """Share of the eligible positions that fork."""
        return share_estimate(self.fork, self.at("weight"), self.unit_of_token[self.places], self.n_unit)

    @cached_property
    def by_chance(self) -> float:
        """Share of the eligible positions that would fork if their tokens made no difference."""
        return float(np.average(self.at("dealt_fork"), weights=self.at("weight")))

    @cached_property
    def auroc(self) -> Estimate:
        """How well entropy tells positions that fork from other eligible ones."""
        unit = self.unit_of_token[self.places]
        return auroc_estimate(self.at("entropy_nats"), self.fork, self.at("weight"), unit, self.n_unit)

    @cached_property
    def auroc_all(self) -> float:
        """The same among all tokens, those with one plausible token as no forks."""
        single = ~self.eligible
        values = np.append(self.at("entropy_nats"), self.result["entropy_nats"].values[single])
        fork = np.append(self.fork, np.zeros(int(single.sum()), dtype=bool))
        return auroc(values, fork, np.append(self.at("weight"), np.ones(int(single.sum()))))


def minority_findings(result: Result) -> list[Finding]:
    """All claims, the one on prediction first; those on forks only where there was something to sample."""
    seen = Evidence(result)
    on_forks = [_predicts(seen)]
    if seen.places.size:
        on_forks += [*_recall(seen), *_precision(seen), _forks(seen)]
    return [*on_forks, _concentrated(seen), _types(seen)]


def _predicts(seen: Evidence) -> Finding:
    k, m = int(seen.fork.sum()), len(seen.places)
    null, quantity = ("AUROC", 0.5, "entropy says nothing about forks"), "prediction of forks by entropy"
    if not m:
        claim = (
            "Whether entropy predicts a fork could not be told: at no token of the answers is another one plausible."
        )
        return Finding(claim, 0.5, *null, None, 1, "answers", quantity=f"{quantity} (not measurable)")
    found = seen.auroc
    where = {"n_forks": k, "n_positions": m}
    among = f"{k} fork{'s' * (k != 1)} among {m} sampled positions with two or more plausible tokens"
    trouble = _trouble(seen)
    if trouble or found.ci95 is None or not np.isfinite(found.value):
        value = found.value if np.isfinite(found.value) else 0.5
        quantity += "" if np.isfinite(found.value) else " (not measurable)"
        claim = f"How well entropy predicts a fork could not be told: {trouble or 'there is one answer only'}."
        ends = found.ci95 if found.n > 1 else None
        return Finding(claim, value, *null, ends, max(found.n, 1), found.n_unit, where, quantity=quantity)
    low, high = found.ci95
    what = "better than chance" if low > 0.5 else "worse than chance" if high < 0.5 else "no better than chance can"
    if what.endswith("can"):
        claim = (
            f"Entropy does not predict forks beyond doubt: AUROC {found.value:.2f}, {low:.2f} to {high:.2f}; {among}."
        )
    else:
        claim = f"Entropy predicts forks {what}: AUROC {found.value:.2f}; {among}."
    beside = where | {"auroc_all": seen.auroc_all}
    return Finding(claim, found.value, *null, found.ci95, found.n, found.n_unit, beside, quantity=quantity)


def _trouble(seen: Evidence) -> str:
    """Why nothing can be said of prediction; empty if something can."""
    k, m = int(seen.fork.sum()), len(seen.places)
    if k < FEWEST:
        return f"only {k} fork{'s' * (k != 1)} among {m} sampled positions with two or more plausible tokens"
    if m - k < FEWEST:
        return f"of {m} sampled positions with two or more plausible tokens all but {m - k} fork"
    if seen.by_chance >= seen.fork_share.value / 2:
        return (
            f"{seen.fork_share.value:.0%} of the positions with two or more plausible tokens fork, and with so few "
            f"continuations {seen.by_chance:.0%} would by chance"
        )
    return ""


def _share(result: Result) -> float:
    return float(result.params.as_dict()["share"])


def _recall(seen: Evidence) -> list[Finding]:
    fork, unit = seen.fork, seen.unit_of_token[seen.places]
    if not fork.any():
        return []
    inside = seen.minority[seen.places]
    found = share_estimate(inside[fork], seen.at("weight")[fork], unit[fork], seen.n_unit)
    chance = float(seen.minority[seen.eligible].mean())
    claim = (
        f"The {_share(seen.result):.0%} of tokens with the highest entropy hold {found.value:.0%} of the forks; of the "
        f"positions with two or more plausible tokens they hold {chance:.0%}."
    )
    null = "share of the positions with two plausible tokens"
    return [
        Finding(
            claim, found.value, "share of forks", chance, null, found.ci95, found.n, found.n_unit,
            quantity="forks in the high-entropy minority",
        )
    ]  # fmt: skip


def _precision(seen: Evidence) -> list[Finding]:
    inside = seen.minority[seen.places]
    if not inside.any():
        return []
    unit = seen.unit_of_token[seen.places][inside]
    found = share_estimate(seen.fork[inside], seen.at("weight")[inside], unit, seen.n_unit)
    of_all = found.value * float((seen.eligible & seen.minority).sum() / seen.minority.sum())
    claim = (
        f"In that minority {found.value:.0%} of the positions with two or more plausible tokens fork, everywhere "
        f"{seen.fork_share.value:.0%}; of all its tokens {of_all:.0%}."
    )
    null = "share of all positions with two plausible tokens that fork"
    return [
        Finding(
            claim, found.value, "share of positions", seen.fork_share.value, null, found.ci95, found.n, found.n_unit,
            quantity="positions of the high-entropy minority that fork",
        )
    ]  # fmt: skip


def _forks(seen: Evidence) -> Finding:
    k, m, share = int(seen.fork.sum()), len(seen.places), seen.fork_share
    halves = seen.at("half_fork")
    known = np.isfinite(halves)
    half = float(np.average(halves[known], weights=seen.at("weight")[known])) if known.any() else None
    n, n_eligible = len(seen.eligible), int(seen.eligible.sum())
    claim = (
        f"{k} of {m} sampled positions fork, which stands for {share.value:.0%} of the {n_eligible:,} with two or more "
        f"plausible tokens; by chance {seen.by_chance:.0%} would"
    )
    claim += "." if half is None else f" (halves of the same continuations: {half:.0%})."
    claim += f" At the other {n - n_eligible:,} of {n:,} tokens only one is plausible."
    null = "continuations dealt anew to the tokens"
    return Finding(
        claim, share.value, "share of positions", seen.by_chance, null, share.ci95, share.n, share.n_unit,
        {"half_share": half if half is not None else "none"}, quantity="positions that fork",
    )  # fmt: skip


def _concentrated(seen: Evidence) -> Finding:
    result, share = seen.result, _share(seen.result)
    entropy, unit = result["entropy_nats"].values, seen.unit_of_token
    n_units = int(unit.max()) + 1
    found = jackknife(lambda kept: carried(entropy[kept[unit]], share), n_units, seen.n_unit).within(0, 1)
    cut = float(entropy[seen.minority].min())
    value = found.value if np.isfinite(found.value) else share
    claim = (
        f"The {share:.0%} of tokens with the highest entropy, {fmt(cut)} nats or more, carry {value:.0%} of all entropy; "
        f"{float((entropy < SMALL_NATS).mean()):.0%} of the tokens have less than {SMALL_NATS:g} nats."
    )
    null = "entropy spread evenly over tokens"
    ends = found.ci95 if np.isfinite(found.value) else (None if found.n == 1 else (0.0, 1.0))
    return Finding(
        claim, value, "share of entropy", share, null, ends, found.n, found.n_unit, {"cut_nats": cut},
        quantity="entropy in the high-entropy minority" + ("" if np.isfinite(found.value) else " (not measurable)"),
    )  # fmt: skip


def _types(seen: Evidence) -> Finding:
    result = seen.result
    value, null = float(result["type_share"]), float(result["type_share_null"])
    low, high = float(result["type_share_low"]), float(result["type_share_high"])
    words, quantity = "entropies shuffled over tokens", "variance of entropy that the token explains"
    least = result.params.as_dict()["min_count"]
    if not np.isfinite([value, null]).all():
        claim = f"No two token types occur {least} times or more and in two answers: there is no word table."
        quantity += " (not measurable)"
        return Finding(claim, 0.0, "share of variance", 0.0, words, None, 1, seen.n_unit, quantity=quantity)
    mean, names = result["word_mean"].values, result["vocab_str"].values
    top, bottom = int(np.nanargmax(mean)), int(np.nanargmin(mean))
    claim = (
        f"Which token it is accounts for {value:.0%} of the variance of entropy ({null:.0%} after shuffling): highest "
        f"{visible(str(names[top]))!r}, {fmt(float(mean[top]))} nats on average, lowest "
        f"{visible(str(names[bottom]))!r}, {fmt(float(mean[bottom]))}; {int(np.isfinite(mean).sum())} types that occur "
        f"{least} times or more."
    )
    n = int(seen.unit_of_token.max()) + 1
    ends = (low, high) if np.isfinite([low, high]).all() else None
    n = n if ends else 1
    return Finding(claim, value, "share of variance", null, words, ends, n, seen.n_unit, quantity=quantity)

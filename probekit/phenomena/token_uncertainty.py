"""Token uncertainty: how sure the model is of the next token, and what else it would have said."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Measure, Params, Result, Statistic, fmt, param, register
from probekit.core import Capture, Forward, ModelInfo, Trace
from probekit.methods import levels
from probekit.reduce import NextToken
from probekit.stats import Estimate, estimate, token_moments

N_BINS = 10


@dataclass(frozen=True)
class UncertaintyParams(Params):
    """Parameters of token-uncertainty."""

    top_k: int = param(10, low=2, high=100, unit="tokens", help="Alternatives kept for each position")
    high_share: float = param(0.2, low=0.01, high=0.5, help="Share of tokens that counts as the high-entropy minority")


@register
class TokenUncertainty(Analysis):
    """Where is the model unsure of the next token, and what are the alternatives?

    Question:
        At each position, how much does the model know about the token that comes next, and is it as
        sure as it should be?

    Method:
        From the final next-token distribution p at each position, normalised over the full
        vocabulary in float32: entropy H = -sum p ln p, varentropy = the variance of -ln p under p,
        margin = ln p of the likeliest token minus that of the second, and, for the token that really
        follows, surprisal -ln p and rank (0 = it was the likeliest). Everything is stored at the
        position that predicts; the last token of a text predicts nothing that is known. All tokens
        weigh the same. The high-entropy minority is cut on 1024 levels of entropy from 0 to ln V, within
        which tokens count as spread evenly; over a streamed corpus so are the tenths.

    Null:
        A uniform guess has entropy ln V. A calibrated model is on average exactly as surprised as it
        expects to be: mean surprisal = mean entropy. Were uncertainty spread evenly, any share of
        tokens would carry the same share of the entropy.

    Known failure modes:
        High entropy is not the same as a fork: many high-entropy positions lead to the same answer,
        and only sampling tells. Entropy depends on the tokenizer, so it does not compare across
        vocabularies. Memorised text looks certain. Instruction-tuned models are overconfident on
        plain text.

    References:
        Wang et al. 2025, Beyond the 80/20 Rule, arXiv 2506.01939 (high-entropy minority tokens).
        Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv 1706.04599.
    """

    name = "token-uncertainty"
    title = "Token uncertainty"
    Params = UncertaintyParams
    measures = {
        "entropy_nats": Measure(("token",), "nats", "entropy of the distribution of the next token"),
        "varentropy_nats2": Measure(("token",), "nats²", "variance of the next token's surprisal under the model"),
        "surprisal_nats": Measure(("token",), "nats", "surprisal of the token that follows; NaN at the end of a text"),
        "margin_nats": Measure(("token",), "nats", "log-probability of the likeliest next token minus the second's"),
        "target_rank": Measure(("token",), "1", "tokens likelier than the one that follows; NaN at the end of a text"),
        "top_logprob": Measure(("token", "rank"), "nats", "log-probabilities of the likeliest next tokens"),
        "top_id": Measure(("token", "rank"), "1", "ids of the likeliest next tokens"),
        "vocab_str": Measure(("vocab",), "1", "what the ids in top_id show as"),
        "binned_entropy_nats": Measure(("bin",), "nats", "mean entropy in tenths of the tokens, from sure to unsure"),
        "binned_surprisal_nats": Measure(("bin",), "nats", "mean surprisal of the same tokens"),
    }

    statistics = {
        "gap": Statistic(("unit", "moment"), "surprisal minus entropy, over tokens"),
        "entropy": Statistic(("unit", "moment"), "entropy, over tokens"),
        "level_tokens": Statistic(("bin",), "tokens by level of entropy"),
        "level_known": Statistic(("bin",), "tokens by level whose next one is known"),
        "level_entropy": Statistic(("bin",), "sum of their entropy"),
        "level_surprisal": Statistic(("bin",), "sum of their surprisal"),
        "above": Statistic(("unit", "bin"), "entropy held from a level on, summed over units"),
        "above_by_all": Statistic(("unit", "bin"), "the same times all entropy of the unit"),
        "above_squared": Statistic(("unit", "bin"), "the same squared"),
        "above_by_next": Statistic(("unit", "bin"), "the same times that from the next level on"),
        "entropy_all": Statistic(("unit", "moment"), "entropy of a unit, weighted by itself"),
    }

    def observe(self, params: UncertaintyParams, info: ModelInfo) -> Forward:
        """The model's own distribution at every token."""
        return Forward((Capture("logits", NextToken(params.top_k)),))

    def compute(self, trace: Trace, params: UncertaintyParams) -> xr.Dataset:
        """Per-token numbers and the calibration curve."""
        seen = trace[Capture("logits", NextToken(params.top_k))]
        surprisal = -seen["logprob_nats"]
        known = np.isfinite(surprisal.values)
        order = np.argsort(seen["entropy_nats"].values[known], kind="stable")
        tenths = np.array_split(order, min(N_BINS, len(order)))
        bins = {"bin": (np.arange(len(tenths)) + 0.5) / len(tenths)}
        return xr.Dataset(
            {
                "entropy_nats": seen["entropy_nats"],
                "varentropy_nats2": seen["varentropy_nats2"],
                "surprisal_nats": surprisal,
                "margin_nats": seen["top_logprob"].isel(rank=0) - seen["top_logprob"].isel(rank=1),
                "target_rank": seen["target_rank"],
                "top_logprob": seen["top_logprob"],
                "top_id": seen["top_id"],
                "vocab_str": trace.vocab_table(),
                "binned_entropy_nats": ("bin", [seen["entropy_nats"].values[known][i].mean() for i in tenths]),
                "binned_surprisal_nats": ("bin", [surprisal.values[known][i].mean() for i in tenths]),
            },
            coords=bins,
            attrs={"d_vocab": trace.info.d_vocab},
        )

    def summarise(self, dataset: xr.Dataset, params: UncertaintyParams) -> xr.Dataset:
        """Moments of gap and entropy, and tokens by level of entropy."""
        texts, pos = dataset["text"].values, dataset["pos"].values
        entropy, surprisal = dataset["entropy_nats"].values, dataset["surprisal_nats"].values
        d_vocab = dataset.attrs["d_vocab"]
        found = levels.ladder(entropy, surprisal, texts, pos, float(np.log(d_vocab)))
        axes = ("unit", "moment")
        means = {"gap": surprisal.astype(float) - entropy, "entropy": entropy}
        return found.assign({n: (axes, token_moments(v, texts, pos)) for n, v in means.items()}).assign_attrs(
            d_vocab=d_vocab
        )

    def totals(self, summary: xr.Dataset, params: UncertaintyParams) -> dict[str, xr.DataArray]:
        """The calibration curve, on the levels."""
        return levels.tenths(summary, N_BINS)

    def findings(self, result: Result) -> list[Finding]:
        """Calibration, mean entropy, and how concentrated uncertainty is."""
        data = result.summary
        gap, mean = estimate(data["gap"].values), estimate(data["entropy"].values)
        limit = float(np.log(data.attrs["d_vocab"]))
        return [
            Finding(
                _calibration_claim(gap),
                gap.value, "nats", 0.0, "calibrated: mean surprisal = mean entropy", gap.ci95, gap.n, gap.n_unit,
                quantity="mean surprisal minus mean entropy",
            ),
            Finding(
                f"On average the next token is uncertain by {fmt(mean.value)} nats, "
                f"as if {fmt(float(np.exp(mean.value)))} tokens were equally likely.",
                mean.value, "nats", limit, "uniform over the vocabulary", mean.ci95, mean.n, mean.n_unit,
                quantity="entropy of the next token",
            ),
            *([self._concentration(result)] if mean.value > 0 else []),
        ]  # fmt: skip

    def _concentration(self, result: Result) -> Finding:
        share = result.params.as_dict()["high_share"]
        held, exact, level = levels.top_share(result.summary, share)
        held, least = held.within(0, 1), level * float(np.log(result.summary.attrs["d_vocab"]))
        return Finding(
            f"The {share:.0%} of tokens with the highest entropy (at least {fmt(least)} nats) hold "
            f"{held.value:.0%} of all uncertainty.",
            held.value, "share of entropy", exact, "spread evenly", held.ci95, held.n, held.n_unit,
            {"entropy_at_least_nats": least}, quantity="entropy at the most uncertain tokens",
        )  # fmt: skip

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """The text coloured by uncertainty, and the calibration curve."""
        data = result.dataset
        gap = result.findings[0]
        curve = plots.lines(
            {"surprisal": data["binned_surprisal_nats"], "entropy (expected)": data["binned_entropy_nats"]},
            title=gap.claim,
            unit="nats",
            quantity="mean",
            caption=f"{result.about} Tokens sorted by entropy, in tenths; a calibrated model's two curves coincide.",
            alt="Two curves over tenths of tokens from sure to unsure: mean surprisal and mean entropy.",
        )
        return {"strip": self._strip(result), "calibration": curve}

    def _strip(self, result: Result) -> plots.TokenStrip:
        data = result.dataset
        first = data["pos"].values == 0

        def of_this(name: str) -> np.ndarray:
            # What the position before says of this token, so that the colour lies on the token it is about.
            moved = np.roll(data[name].values.astype(float), 1)
            moved[first] = np.nan
            return moved

        words = plots.next_words(data["top_id"], data["top_logprob"], data["vocab_str"])
        return plots.TokenStrip(
            title="Which tokens surprise the model, and where it does not know how to go on",
            tokens=tuple(map(str, data["token_str"].values)),
            texts=data["text"].values,
            quantities=(
                plots.Quantity("surprisal of this token", "nats", of_this("surprisal_nats"), low=0.0),
                plots.Quantity("entropy before this token", "nats", of_this("entropy_nats"), low=0.0),
                plots.Quantity("entropy of the next token", "nats", data["entropy_nats"].values, low=0.0),
                plots.Quantity("varentropy of the next token", "nats²", data["varentropy_nats2"].values, low=0.0),
                plots.Quantity("margin of the next token", "nats", data["margin_nats"].values, low=0.0),
                plots.Quantity("rank of this token", "1", of_this("target_rank") + 1, "log"),
            ),
            caption=f"{result.about_shown} Hover a token for its numbers and for what the model expects next.",
            alt="The text, each token coloured by how uncertain or surprising it is.",
            notes=tuple(f"next: {w}" for w in words.values),
        )


def _calibration_claim(gap: Estimate) -> str:
    amount = f"{fmt(abs(gap.value))} nats per token"
    if gap.ci95 is None or gap.ci95[0] <= 0 <= gap.ci95[1]:
        return (
            f"The model is about as surprised as it expects to be: the difference of {amount} is within its interval."
        )
    if gap.value > 0:
        return f"The model is overconfident: the text surprises it by {amount} more than it expects."
    return f"The model is underconfident: the text surprises it by {amount} less than it expects."

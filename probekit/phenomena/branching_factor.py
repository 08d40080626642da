"""Branching factor: how many next tokens a model effectively chooses among while it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Flow, Measure, Params, Result, fmt, param, register
from probekit.core import Base, Capture, Continuation, Forward, ModelInfo, Sampling, Texts
from probekit.reduce import Nucleus
from probekit.sampling.drawn import drawn_answers
from probekit.sampling.factor import LIMIT, SampledAnswers
from probekit.stats import Estimate, text_mean

_STEP = "token of the answer"


@dataclass(frozen=True)
class BranchingParams(Params):
    """Parameters of branching-factor."""

    n_samples: int = param(16, low=4, high=10000, unit="answers", help="Sampled answers per prompt; the paper has 50")
    max_tokens: int = param(128, low=2, high=4096, unit="tokens", help="Longest answer; the paper has 512 or 1024")
    top_p: float = param(
        0.9, low=0.01, high=1.0, unit="share", help="Nucleus that answers are drawn from and that is measured"
    )
    min_p: float = param(
        0.0, low=0.0, high=1.0, unit="share", help="Measure only tokens at least this much as likely as the likeliest"
    )
    temperature: float = param(1.0, low=0.01, high=5.0, help="Temperature at which answers are drawn and measured")
    seed: int = param(0, low=0, high=2**31 - 1, help="Seed of the draws; more samples extend earlier ones")

    def sampling(self) -> Sampling:
        """How answers are drawn."""
        return Sampling(self.max_tokens, self.temperature, self.top_p, self.seed)


@register
class BranchingFactor(Analysis):
    """How many next tokens does the model effectively choose among along its answers?

    Question:
        From how many equally likely tokens might each token of an answer as well have been drawn; does that number fall
        as the answer goes on; and does it differ between prompts?

    Method:
        Texts are prompts. `n_samples` answers are drawn to each, at `temperature` from the nucleus `top_p`, and read
        once more. At each step the full next-token distribution is cut: sorted, tokens below 1e-12 dropped, the rest
        kept until they hold `top_p`, those below `min_p` times the largest dropped; the token that was drawn is kept in
        any case; what is kept is divided by its sum. That gives the entropy H of the cut distribution and log p of the
        drawn token in it, per step. Positions run to the .95-quantile of the answers' lengths and while more than three
        answers are alive; at each, H is averaged over the answers alive there. With n such positions, log BF is the mean
        of these means over positions if n <= 50, and otherwise the mean over answers alive at n of -(1/n) times the sum
        of log p over their first n tokens; the two agree in the limit (asymptotic equipartition). BF is exp of that, per
        prompt, and then averaged over prompts. Uniform over k tokens gives ceil(top_p k), not k; a deterministic model
        gives 1. Trend: least squares of H on position with a level for each answer. Intervals: Student's t over prompts;
        with one prompt, a jackknife over its answers (of log BF; positions as with all answers).

    Null:
        A deterministic model, 1. For the trend: the same steps in shuffled order within each answer, 0 on average. For
        the two estimators: equal on average for tokens drawn from the very distribution that is measured.

    Known failure modes:
        Survivors: at late positions only long answers are left, and the number describes these; the trend within answers
        is free of it, the curve is not. Leaving out ended answers also makes the two estimators differ. With min_p, or
        wherever many tokens are kept only because they were drawn, the two estimators differ more, the likelihood being
        larger. BF depends on the nucleus, and counts spellings, not meanings. Answers that are cut at `max_tokens` miss
        what would follow.

    References:
        Yang and Holtzman 2025, How Alignment Shrinks the Generative Horizon, arXiv 2506.17871, and its released code.
    """

    name = "branching-factor"
    title = "Branching factor"
    writes = True
    Params = BranchingParams
    measures = {
        "bf": Measure(("text",), "tokens", "branching factor: by entropy up to 50 positions, by likelihood beyond"),
        "bf_low": Measure(("text",), "tokens", "lower end of its 95 % interval over the prompt's answers"),
        "bf_high": Measure(("text",), "tokens", "upper end of its 95 % interval over the prompt's answers"),
        "bf_entropy": Measure(("text",), "tokens", "exp of the mean cut entropy over positions"),
        "bf_likelihood": Measure(("text",), "tokens", "exp of the mean surprisal of the drawn tokens, answers alive at the last position"),
        "gap_nats": Measure(("text",), "nats", "log of bf_likelihood over bf_entropy"),
        "gap_low": Measure(("text",), "nats", "lower end of its 95 % interval over the prompt's answers"),
        "gap_high": Measure(("text",), "nats", "upper end of its 95 % interval over the prompt's answers"),
        "slope_nats": Measure(("text",), "nats per 100 tokens", "trend of the cut entropy within answers; NaN with one position"),
        "slope_low": Measure(("text",), "nats per 100 tokens", "lower end of its 95 % interval over answers; NaN without one"),
        "slope_high": Measure(("text",), "nats per 100 tokens", "upper end of its 95 % interval over answers; NaN without one"),
        "slope_alive_nats": Measure(("text",), "nats per 100 tokens", "trend of the mean over answers alive, survivors included; NaN with one position"),
        "perplexity": Measure(("text",), "tokens", "mean over answers of exp of the answer's own mean cut entropy"),
        "sequences_nats": Measure(("text",), "nats", "sum over positions of the mean cut entropy: log of the number of answers"),
        "product_nats": Measure(("text",), "nats", "log of the product over positions of the mean of exp(cut entropy)"),
        "n_positions": Measure(("text",), "tokens", "positions that count"),
        "n_kept": Measure(("text",), "tokens", "tokens kept per step, mean over all steps"),
        "forced_share": Measure(("text",), "share", "steps whose token was kept only because it was drawn"),
        "cut_share": Measure(("text",), "share", "answers that max_tokens cut short"),
        "step_nats": Measure(("text", "bin"), "nats", "cut entropy at a position, mean over answers alive; NaN past the last that counts"),
        "alive": Measure(("text", "bin"), "answers", "answers that have a token at a position"),
        "step_bf": Measure(("bin",), "tokens", "exp(step_nats), mean over the prompts that have the position; NaN past the last"),
        "step_low": Measure(("bin",), "tokens", "lower end of its 95 % interval (prompts, or the answers of an only one); NaN with two prompts or fewer"),
        "step_high": Measure(("bin",), "tokens", "upper end of its 95 % interval (prompts, or the answers of an only one); NaN with two prompts or fewer"),
        "upto_entropy_bf": Measure(("bin",), "tokens", "BF of the answers up to a position, by entropy, mean over prompts; one that has ended keeps its value"),
        "upto_likelihood_bf": Measure(("bin",), "tokens", "BF of the answers up to a position, by likelihood, mean over prompts; one that has ended keeps its value"),
        "alive_share": Measure(("bin",), "share", "answers that have a token at a position, mean over prompts"),
        "entropy_nats": Measure(("text", "sample", "bin"), "nats", "cut entropy at each token of each answer; NaN past its end"),
        "logprob_nats": Measure(("text", "sample", "bin"), "nats", "log-probability of each token in the cut distribution; NaN past the answer's end"),
    }  # fmt: skip

    def passes(self, params: Any, info: ModelInfo, batch: Any) -> int:
        """The answers, and one look at them."""
        return 2

    def flow(self, params: Any, info: ModelInfo) -> Flow:
        """Sampled answers, read once more."""
        cut = Capture("logits", Nucleus(params.top_p, params.min_p, params.temperature))
        prompts = yield Texts()
        bases, answers = yield from drawn_answers(prompts, params.n_samples, params.sampling())
        inside = yield Forward((cut,), inputs=tuple(b.ids for b in bases), why="cut distributions along the answers")
        return _table(bases, answers, inside[cut], params.n_samples)

    def findings(self, result: Result) -> list[Finding]:
        """The branching factor, its trend, the two estimators, and who is left at the end."""
        return [_factor(result), _trend(result), _estimators(result), _survivors(result)]

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """The curve along answers, prompts beside each other, both estimators, and the answers alive."""
        data, found = result.dataset, result.findings
        n = int(data["n_positions"].max())
        along = data.isel(bin=slice(0, n)).rename(bin=_STEP)
        p = result.params.as_dict()
        cut = f"top_p {p['top_p']:g}" + (f", min_p {p['min_p']:g}" if p["min_p"] else "")
        about = f"{result.about} {p['n_samples']} answers to each, T={p['temperature']:g}, distributions cut at {cut}."
        one = data.sizes["text"] == 1
        figures: dict[str, plots.Drawing] = {
            "along": plots.lines(
                {"branching factor of the step": along["step_bf"]}, title=found[1].claim, unit="tokens", log_y=True,
                bands={"branching factor of the step": (along["step_low"], along["step_high"])},
                caption=f"{about} Exp of the cut entropy, mean over answers still being written, then over prompts. Band: "
                f"95 % interval over {'answers' if one else 'prompts'}. Late positions belong to long answers and to the prompts that have them.",
                alt="Branching factor against the position in the answer, with its interval.",
            ),
            "prompts": plots.bars(
                data["bf"].assign_coords(text=np.arange(data.sizes["text"])).rename(text="prompt"), title=found[0].claim, unit="tokens",
                intervals=(data["bf_low"], data["bf_high"]), quantity="branching factor",
                reference=(1.0, "one possible token"),
                caption=f"{about} Each text is a prompt; whiskers: 95 % interval over its answers.",
                alt="Bars of the branching factor of each prompt with intervals.",
            ),
            "estimators": plots.lines(
                {"by entropy": along["upto_entropy_bf"], "by likelihood": along["upto_likelihood_bf"]},
                title=found[2].claim, unit="tokens", quantity="branching factor up to here",
                caption=f"{about} Over the answers up to each position, mean over prompts (one whose answers have ended "
                f"keeps its value); entropy is reported up to {LIMIT} positions, likelihood beyond.",
                alt="Two curves of the branching factor of answer prefixes, by entropy and by likelihood.",
            ),
            "alive": plots.lines(
                {"answers alive": along["alive_share"]}, title=found[3].claim, unit="share", y_range=(0, 1.02),
                caption=f"{about} Share of the answers that have a token at each position, mean over prompts.",
                alt="Share of answers still being written against the position in the answer.",
            ),
        }  # fmt: skip
        if one:
            del figures["prompts"]
        return figures


def _table(bases: list[Base], answers: list[Continuation], seen: xr.Dataset, n_samples: int) -> xr.Dataset:
    """All measures, from one pass over the answers."""
    longest = max(len(a.ids) for a in answers)
    ends = np.cumsum([len(b.ids) for b in bases])
    steps = {name: np.full((len(bases), longest), np.nan) for name in ("entropy_nats", "logprob_nats")}
    totals = {name: np.zeros(len(bases)) for name in ("n_kept", "forced")}
    for i, (end, one) in enumerate(zip(ends, answers, strict=True)):
        rows = slice(int(end) - len(one.ids) - 1, int(end) - 1)  # the row before a token holds what it was drawn from
        for name in steps:
            steps[name][i, : len(one.ids)] = seen[name].values[rows]
        for name in totals:
            totals[name][i] = seen[name].values[rows].sum()
    shape = (-1, n_samples, longest)
    entropy, logprob = (steps[name].reshape(shape) for name in ("entropy_nats", "logprob_nats"))
    prompts = [SampledAnswers(h, lp) for h, lp in zip(entropy, logprob, strict=True)]
    n_steps = np.array([len(a.ids) for a in answers]).reshape(-1, n_samples).sum(axis=1)
    per_step = {name: values.reshape(-1, n_samples).sum(axis=1) / n_steps for name, values in totals.items()}
    cut = np.array([a.stopped == "length" for a in answers]).reshape(-1, n_samples).mean(axis=1)
    along, curves = _along(prompts, longest)
    return xr.Dataset(
        {
            **{name: ("text", np.array(values)) for name, values in _per_prompt(prompts).items()},
            "n_kept": ("text", per_step["n_kept"]),
            "forced_share": ("text", per_step["forced"]),
            "cut_share": ("text", cut),
            **{name: (("text", "bin"), values) for name, values in along.items()},
            **{name: ("bin", values) for name, values in curves.items()},
            "entropy_nats": (("text", "sample", "bin"), entropy),
            "logprob_nats": (("text", "sample", "bin"), logprob),
        },
        coords={"bin": np.arange(1, longest + 1)},
    )[list(BranchingFactor.measures)]


def _per_prompt(prompts: list[SampledAnswers]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}

    def add(**values: float) -> None:
        for name, value in values.items():
            found.setdefault(name, []).append(value)

    for one in prompts:
        for name, estimate in {"bf": one.factor(), "gap": one.gap(), "slope": one.slope()}.items():
            low, high = estimate.ci95 or (np.nan, np.nan)
            suffix = "" if name == "bf" else "_nats"
            add(**{f"{name}{suffix}": estimate.value, f"{name}_low": low, f"{name}_high": high})
        add(bf_entropy=float(np.exp(one.by_entropy[-1])), bf_likelihood=float(np.exp(one.by_likelihood[-1])))
        add(slope_alive_nats=one.slope_alive(), perplexity=one.perplexity, product_nats=one.log_product_nats)
        add(sequences_nats=float(one.step_nats.sum()), n_positions=float(one.n))
    return found


def _along(prompts: list[SampledAnswers], longest: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What belongs to positions: per prompt, and over prompts."""

    def padded(name: str, with_last: bool) -> np.ndarray:
        rows = [getattr(one, name) for one in prompts]
        return np.stack([np.append(r, np.full(longest - len(r), r[-1] if with_last else np.nan)) for r in rows])

    step = padded("step_nats", False)
    alive = np.stack([one.alive for one in prompts]).astype(float)
    curves = {name: np.full(longest, np.nan) for name in ("step_bf", "step_low", "step_high")}
    for name in ("entropy", "likelihood"):
        curves[f"upto_{name}_bf"] = np.exp(padded(f"by_{name}", True)).mean(axis=0)
    for t in range(max(one.n for one in prompts)):
        here = _step(prompts[0].entropy[:, t]) if len(prompts) == 1 else text_mean(np.exp(step[:, t]))
        curves["step_bf"][t] = here.value
        if here.ci95 is not None and (here.n > 2 or len(prompts) == 1):  # two prompts span nearly any interval
            curves["step_low"][t], curves["step_high"][t] = max(here.ci95[0], 1.0), here.ci95[1]
    shares = alive / alive[:, :1]
    return {"step_nats": step, "alive": alive}, curves | {"alive_share": shares.mean(axis=0)}


def _step(entropies: np.ndarray) -> Estimate:
    """Exp of the mean entropy of some answers at one position, with the interval of the mean."""
    mean = text_mean(entropies, "answers")
    assert mean.ci95 is not None
    return Estimate(
        float(np.exp(mean.value)), (float(np.exp(mean.ci95[0])), float(np.exp(mean.ci95[1]))), mean.n, mean.n_unit
    )


def _over_prompts(result: Result, name: str, ends: str) -> Estimate:
    """Mean over prompts with its interval; of an only prompt, the one over its answers."""
    values = result[name].values
    if len(values) > 1:
        return text_mean(values, "prompts")
    low, high = float(result[f"{ends}_low"].values[0]), float(result[f"{ends}_high"].values[0])
    if not np.isfinite([low, high]).all():
        return Estimate(float(values[0]), None, 1, "prompts")
    return Estimate(float(values[0]), (low, high), result.dataset.sizes["sample"], "answers")


def _factor(result: Result) -> Finding:
    mean, values = _over_prompts(result, "bf", "bf"), result["bf"].values
    between = "" if len(values) == 1 else f" ({fmt(float(values.min()))} to {fmt(float(values.max()))} over prompts)"
    kept = float(result["n_kept"].values.mean())
    return Finding(
        f"Each token of the answers might as well have been drawn evenly from {fmt(mean.value)} tokens{between}; the "
        f"nucleus holds {fmt(kept)} on average.",
        mean.value, "tokens", 1.0, "a deterministic model: one possible token", mean.within(1, np.inf).ci95, mean.n,
        mean.n_unit, quantity="branching factor of the answers",
    )  # fmt: skip


def _trend(result: Result) -> Finding:
    null = "the same steps in shuffled order within each answer"
    mean = _over_prompts(result, "slope_nats", "slope")
    if not np.isfinite(mean.value):
        return Finding(
            "The answers are too short to have a trend.", 0.0, "nats per 100 tokens", 0.0, null, None, 1, "prompts",
            quantity="slope of entropy within answers (not measurable)",
        )  # fmt: skip
    sure = mean.ci95 is not None and (mean.ci95[0] > 0 or mean.ci95[1] < 0)
    what = "falls" if mean.value < 0 else "rises"
    claim = (
        f"Within answers the entropy of the next token {what} by {fmt(abs(mean.value))} nats per 100 tokens."
        if sure
        else "Within answers the entropy of the next token neither falls nor rises beyond doubt "
        f"({mean.value:+.2g} nats per 100 tokens)."
    )
    return Finding(
        claim, mean.value, "nats per 100 tokens", 0.0, null, mean.ci95, mean.n, mean.n_unit,
        quantity="slope of entropy within answers",
    )  # fmt: skip


def _estimators(result: Result) -> Finding:
    mean = _over_prompts(result, "gap_nats", "gap")
    entropy, likelihood = (float(result[f"bf_{kind}"].values.mean()) for kind in ("entropy", "likelihood"))
    n = int(result["n_positions"].values.max())
    used = "entropy" if n <= LIMIT else "likelihood"
    forced = float(result["forced_share"].values.mean())
    claim = (
        f"Entropies give a branching factor of {fmt(entropy)}, likelihoods {fmt(likelihood)}, {fmt(abs(mean.value))} nats "
        f"apart; {used} is reported, with answers of up to {n} tokens."
    )
    claim += f" {forced:.1%} of the tokens lie outside the cut and were kept because they were drawn." if forced else ""
    null = "tokens drawn from the distribution that is measured"
    return Finding(
        claim, mean.value, "nats", 0.0, null, mean.ci95, mean.n, mean.n_unit,
        quantity="branching factors by likelihood over entropy, logarithm",
    )  # fmt: skip


def _survivors(result: Result) -> Finding:
    data = result.dataset
    last = data["n_positions"].values.astype(int) - 1
    shares = data["alive"].values[np.arange(len(last)), last] / data.sizes["sample"]
    mean = text_mean(shares, "prompts").within(0, 1)
    slopes = [float(data[name].mean()) for name in ("slope_alive_nats", "slope_nats")]
    trend = (
        f" Over the answers alive the entropy changes by {slopes[0]:+.2g} nats per 100 tokens, within answers by "
        f"{slopes[1]:+.2g}: the difference is a matter of which answers are left."
        if mean.value < 1 and np.isfinite(slopes).all()
        else ""
    )
    claim = (
        f"At the last position that counts {mean.value:.0%} of the answers are still being written; "
        f"{float(data['cut_share'].mean()):.0%} are cut at the longest length.{trend}"
    )
    return Finding(
        claim, mean.value, "share of answers", 1.0, "no answer ends before", mean.ci95, mean.n, mean.n_unit,
        quantity="answers still being written at the last position",
    )  # fmt: skip

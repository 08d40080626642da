"""Direct logit attribution: which parts of the model write the difference between two logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Measure, Params, Result, fmt, param, register
from probekit.core import Capture, Forward, ModelInfo, SelfCheckError, Trace
from probekit.reduce import LogitDirection, NextToken, Pair, pair_ids
from probekit.stats import Estimate, ratio, token_mean, units

TOLERANCE = 1e-4  # of the largest logit difference (at least 1 logit), in float32
_COARSE = 5e-2  # the same for half precision, of the largest sum of magnitudes
_PAIRS = {
    "top": ("the likeliest", "the second likeliest token"),
    "target": ("the token that follows", "the likeliest other one"),
}
_LIKELIEST = Capture("logits", NextToken(2))
_N_BARS = 12


@dataclass(frozen=True)
class AttributionParams(Params):
    """Parameters of direct-logit-attribution."""

    pair: str = param(
        "top",
        choices=("top", "target"),
        help="Two tokens compared: likeliest and second likeliest (top), or the one that follows and the likeliest "
        "other (target)",
    )
    shown_tokens: int = param(64, low=1, high=2000, unit="tokens", help="Tokens of each text's start in the heatmaps")


@register
class DirectLogitAttribution(Analysis):
    """Which blocks write the difference between two tokens' logits, through attention or through the MLP?

    Question:
        The logits are a sum over everything that was written into the residual stream. How much of the
        difference between two tokens' logits comes from the embedding, from each attention sub-layer,
        from each MLP, and from biases?

    Method:
        With the scale of the final norm frozen at what the model found at each token, norm and
        unembedding are linear: the difference of two logits is an inner product of the last residual
        with one direction, the difference of two unembedding rows through the norm's gain (and
        centring). A sub-layer's contribution is the inner product with what it adds to the stream:
        after a post-norm and a residual multiplier where the family has them. The embedding includes
        learned positions. A factor or soft-cap after the unembedding is taken at the slope between
        the two logits. The parts add up to the difference that the model returns, or the result is
        refused (tolerance in float32: 1e-4 of the largest difference, at least 1e-4 logits). All
        tokens weigh the same, position 0 included.

    Null:
        The same components, norm and positions with two random tokens of the vocabulary instead: what
        a component writes along any difference of unembedding rows.

    Known failure modes:
        Direct effects only: what a block does through later blocks is credited to them. The frozen
        scale hides that components also change each other's scale; a component along the norm's own
        direction seems to do nothing. Contributions of opposite sign cancel, so that a large one is
        not by itself important: remove it and later blocks may make up for it. Heads are not split.

    References:
        Elhage et al. 2021, A Mathematical Framework for Transformer Circuits (direct path and logit attribution).
        Wang et al. 2022, Interpretability in the Wild, arXiv 2211.00593, section 3.
        McGrath et al. 2023, The Hydra Effect, arXiv 2307.15771 (direct against total effect).
    """

    name = "direct-logit-attribution"
    title = "Direct logit attribution"
    Params = AttributionParams
    measures = {
        "attention_logits": Measure(
            ("layer", "token"), "logits", "what the attention sub-layer adds to the difference; NaN without a pair"
        ),
        "mlp_logits": Measure(("layer", "token"), "logits", "what the MLP adds to the difference; NaN without a pair"),
        "embedding_logits": Measure(
            ("token",), "logits", "what the embedding adds, learned positions included; NaN without a pair"
        ),
        "bias_logits": Measure(
            ("token",), "logits", "what biases of final norm and unembedding add; NaN without a pair"
        ),
        "difference_logits": Measure(
            ("token",), "logits", "the model's logit of the first token minus the second's; NaN without a pair"
        ),
        "random_attention_logits": Measure(
            ("layer", "token"), "logits", "what attention adds to the difference of two random tokens"
        ),
        "random_mlp_logits": Measure(
            ("layer", "token"), "logits", "what the MLP adds to the difference of two random tokens"
        ),
        "random_embedding_logits": Measure(
            ("token",), "logits", "what the embedding adds to the difference of two random tokens"
        ),
        "plus_id": Measure(("token",), "1", "id of the first token; -1 at the end of a text where it is unknown"),
        "minus_id": Measure(("token",), "1", "id of the second token; -1 at the end of a text where it is unknown"),
        "vocab_str": Measure(("vocab",), "1", "what the ids show as"),
    }

    def observe(self, params: AttributionParams, info: ModelInfo) -> Forward:
        """Projections of the stream, and the two likeliest tokens."""
        pairs: tuple[Pair, ...] = (cast(Pair, params.pair), "random")
        seen = [Capture(site, LogitDirection(pair)) for pair in pairs for site in _sites(info)]
        return Forward((*seen, _LIKELIEST))

    def compute(self, trace: Trace, params: AttributionParams) -> xr.Dataset:
        """Contributions per component, after checking that they add up."""
        seen, pair = trace[_LIKELIEST], cast(Pair, params.pair)
        plus, minus = pair_ids(pair, seen["top_id"].values, trace.batch, trace.info.d_vocab)
        difference = _difference(pair, seen, plus)
        attention, mlp, embedding, bias = _contributions(trace, pair)
        random_attention, random_mlp, random_embedding, _ = _contributions(trace, "random")
        error = _check_sum(trace, difference, attention, mlp, embedding, bias)
        words = dict(zip(trace.batch.ids.tolist(), trace.batch.strings, strict=True)) | dict(trace.vocab)
        ids = sorted({*plus.tolist(), *minus.tolist()} - {-1})
        layered = ("layer", "token")
        return xr.Dataset(
            {
                "attention_logits": (layered, attention),
                "mlp_logits": (layered, mlp),
                "embedding_logits": ("token", embedding),
                "bias_logits": ("token", bias),
                "difference_logits": ("token", difference),
                "random_attention_logits": (layered, random_attention),
                "random_mlp_logits": (layered, random_mlp),
                "random_embedding_logits": ("token", random_embedding),
                "plus_id": ("token", plus),
                "minus_id": ("token", minus),
                "vocab_str": ("vocab", np.asarray([words[i] for i in ids], dtype=object)),
            },
            coords={n: seen[n] for n in ("text", "pos", "token_id", "token_str")}
            | {"layer": np.arange(len(mlp)), "vocab": np.asarray(ids, dtype=np.int64)},
            attrs={"sum_error_logits": error},
        )

    def findings(self, result: Result) -> list[Finding]:
        """The largest contribution, attention against MLPs, and how late it is written."""
        parts, total = _parts(result), _mean(result, result["difference_logits"].values)
        label = max(parts, key=lambda name: abs(parts[name][0].value))
        most, null = parts[label]
        first, second = _PAIRS[str(result.params.as_dict()["pair"])]
        verb = "adds most to" if most.value >= 0 else "takes most away from"
        attention, mlp = (result[f"{n}_logits"].sum("layer", skipna=False).values for n in ("attention", "mlp"))
        of_attention, of_mlp = _mean(result, attention), _mean(result, mlp)
        of_null = _mean(result, result["random_mlp_logits"].sum("layer").values)
        return [
            Finding(
                f"{_sentence(label)} {verb} the lead of {first} over {second}: {fmt(most.value)} logits, "
                f"where all parts together make {fmt(total.value)}.",
                most.value, "logits", null.value, "the same component on two random tokens", most.ci95, most.n,
                most.n_unit, {"component": label}, quantity="largest contribution of one component",
            ),
            Finding(
                f"The MLPs together add {fmt(of_mlp.value)} logits to that lead, attention {fmt(of_attention.value)}.",
                of_mlp.value, "logits", of_null.value, "the MLPs on two random tokens", of_mlp.ci95, of_mlp.n,
                of_mlp.n_unit, quantity="contribution of all MLPs",
            ),
            self._late(result),
        ]  # fmt: skip

    def _late(self, result: Result) -> Finding:
        n_layers = result.dataset.sizes["layer"]
        late = min(3 * n_layers // 4, n_layers - 1)
        unit, name = units(result["text"].values, result["pos"].values)
        found, null = (
            _late_share(result[f"{kind}attention_logits"].values, result[f"{kind}mlp_logits"].values, late, unit, name)
            for kind in ("", "random_")
        )
        return Finding(
            f"Blocks {late} to {n_layers - 1} of {n_layers} hold {found.value:.0%} of all that is written along it, "
            "signs aside.",
            found.value, "share", null.value, "the same blocks on two random tokens", found.ci95, found.n,
            found.n_unit, {"layer": late}, quantity="share written in the last quarter of blocks",
        )  # fmt: skip

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Contributions by component and depth, maps over one text, and the text by its logit difference."""
        data, found = result.dataset, result.findings
        first, second = _PAIRS[str(result.params.as_dict()["pair"])]
        parts = _parts(result)
        largest = sorted(parts, key=lambda name: -abs(parts[name][0].value))[:_N_BARS]
        ends = {name: parts[name][0].ci95 for name in largest}
        known = {name: ci95 for name, ci95 in ends.items() if ci95 is not None}
        what = f"contribution to the lead of {first} over {second}"
        drawings: dict[str, plots.Drawing] = {
            "components": plots.bars(
                {name: parts[name][0].value for name in largest},
                title=found[0].claim,
                unit="logits",
                quantity=what,
                intervals=known if len(known) == len(largest) else None,
                caption=f"{result.about} The {len(largest)} components with the largest mean over tokens, with 95 % "
                f"intervals. All components add up to the model's own difference within "
                f"{fmt(data.attrs['sum_error_logits'])} logits at every token.",
                alt="Bars of the mean contribution of the largest components.",
            ),
            "layers": plots.lines(
                {
                    "attention": data["attention_logits"].mean("token"),
                    "MLP": data["mlp_logits"].mean("token"),
                    "attention, random tokens": data["random_attention_logits"].mean("token"),
                    "MLP, random tokens": data["random_mlp_logits"].mean("token"),
                },
                title=found[1].claim,
                unit="logits",
                quantity="mean contribution",
                caption=f"{result.about} Mean over tokens of what each sub-layer adds to the lead of {first} over "
                f"{second}; for comparison, to the difference of two random tokens.",
                alt="Mean contribution of attention and MLP against layer, with random tokens as null.",
            ),
        }
        for kind, words in (("attention", "attention"), ("mlp", "the MLP")):
            drawings[f"{kind}-map"] = self._map(result, kind, f"What {words} of each block adds at each token")
        return drawings | {"strip": self._strip(result, what)}

    def _map(self, result: Result, kind: str, title: str) -> plots.Figure:
        n = result.params.as_dict()["shown_tokens"]
        first = int(result["text"].values[0])
        data = result.dataset.isel(token=(result["text"].values == first) & (result["pos"].values < n))
        values = data[f"{kind}_logits"]
        bound = float(np.nanmax(np.abs(values.values), initial=1e-9))
        return plots.heatmap(
            values,
            title=title,
            unit="logits",
            quantity="contribution",
            scale="diverging",
            low=-bound,
            high=bound,
            hover=np.tile(np.asarray(_notes(data), dtype=object), (data.sizes["layer"], 1)),
            caption=f"{result.about} The first {data.sizes['token']} tokens of text {first}; red counts for the first "
            "of the two tokens, blue for the second. Hover for the tokens.",
            alt=f"Heatmap over layers and tokens of the contribution of {kind} to the logit difference.",
        )

    def _strip(self, result: Result, what: str) -> plots.TokenStrip:
        data = result.dataset
        named = {"difference_logits": "all parts together", "embedding_logits": "embedding"}
        sums = {"attention_logits": "attention, all blocks", "mlp_logits": "MLPs, all blocks"}
        shown = [(label, data[name].values) for name, label in named.items()]
        shown += [(label, data[name].sum("layer", skipna=False).values) for name, label in sums.items()]
        return plots.TokenStrip(
            title=f"Where the model decides: {what}",
            tokens=tuple(map(str, data["token_str"].values)),
            texts=data["text"].values,
            quantities=tuple(
                plots.Quantity(label, "logits", np.asarray(values, dtype=float), "diverging") for label, values in shown
            ),
            caption=f"{result.about} The colour belongs to the position that predicts.",
            alt="The text, each token coloured by the logit difference of what is predicted after it.",
            notes=tuple(_notes(data)),
        )


def _sites(info: ModelInfo) -> tuple[str, ...]:
    # What a sub-layer adds is the difference of the stream around it; where both run side by side, its own output.
    if "resid_mid" in info.sites:
        return "resid_pre", "resid_mid", "resid_post", "logits"
    return "resid_pre.0", "attn_out", "mlp_out", "logits"


def _contributions(trace: Trace, pair: Pair) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Attention and MLP (layer, token), embedding and biases (token), in logits."""
    start, first, second, end = (
        trace[Capture(site, LogitDirection(pair))]["projection"].values for site in _sites(trace.info)
    )
    if "resid_mid" in trace.info.sites:
        return first - start, second - first, start[0], end
    return first, second, start[0], end


def _difference(pair: str, seen: xr.Dataset, plus: np.ndarray) -> np.ndarray:
    """The model's own logit difference: log-probabilities differ from logits by the same number for all tokens."""
    top = seen["top_logprob"].values
    if pair == "top":
        return top[:, 0] - top[:, 1]
    is_first = plus == seen["top_id"].values[:, 0]
    return seen["logprob_nats"].values - np.where(is_first, top[:, 1], top[:, 0])


def _check_sum(trace: Trace, difference: np.ndarray, *parts: np.ndarray) -> float:
    """The largest distance between the sum of the parts and the model's own difference, in logits.

    Raises:
        SelfCheckError: it is larger than rounding explains.
    """
    rows = np.concatenate([np.atleast_2d(p) for p in parts]).astype(np.float64)
    known = np.isfinite(difference)
    off = np.abs(rows.sum(axis=0) - difference)[known]
    exact = trace.info.dtype in ("float32", "float64")
    size = np.abs(difference[known]) if exact else np.abs(rows[:, known]).sum(axis=0)
    allowed = (TOLERANCE if exact else _COARSE) * max(1.0, float(size.max(initial=0.0)))
    worst = float(off.max(initial=0.0))
    if not worst <= allowed:
        raise SelfCheckError(
            f"The contributions miss the logit difference by {worst:.2e} logits at token "
            f"{int(np.flatnonzero(known)[off.argmax()])}; expected at most {allowed:.1e}. Something else writes into "
            f"the residual stream of {trace.info.name!r} ({trace.info.architecture}): its row in the architecture table "
            "needs another path or multiplier."
        )
    return worst


def _mean(result: Result, values: np.ndarray) -> Estimate:
    return token_mean(values, result["text"].values, result["pos"].values)


def _parts(result: Result) -> dict[str, tuple[Estimate, Estimate]]:
    """By component, its mean contribution and the same for two random tokens."""
    own, random = result["embedding_logits"].values, result["random_embedding_logits"].values
    parts = {"embedding": (_mean(result, own), _mean(result, random))}
    for kind, label in (("attention", "attention"), ("mlp", "MLP")):
        own, random = result[f"{kind}_logits"].values, result[f"random_{kind}_logits"].values
        parts |= {
            f"{label} {layer}": (_mean(result, own[layer]), _mean(result, random[layer])) for layer in range(len(own))
        }
    return parts


def _sentence(label: str) -> str:
    kind, _, layer = label.partition(" ")
    return f"The {kind} of block {layer}" if layer else f"The {kind}"


def _late_share(attention: np.ndarray, mlp: np.ndarray, late: int, unit: np.ndarray, name: str) -> Estimate:
    written = np.nan_to_num(np.abs(attention) + np.abs(mlp))
    weights = np.bincount(unit, written.sum(axis=0))
    return ratio(np.bincount(unit, written[late:].sum(axis=0)), weights, name).within(0, 1)


def _notes(data: xr.Dataset) -> list[str]:
    words = plots.words_by_id(data["vocab_str"])
    pairs = zip(data["plus_id"].values.tolist(), data["minus_id"].values.tolist(), strict=True)
    return ["next token unknown" if a < 0 else f"{words[a]!r} over {words[b]!r}" for a, b in pairs]

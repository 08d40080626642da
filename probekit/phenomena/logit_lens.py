"""What each layer would predict if the model stopped there, read by the logit lens or by a trained one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Measure, Params, Result, Statistic, param, register
from probekit.core import Capture, Forward, ModelInfo, Trace
from probekit.reduce import LensRef, Readout, open_lens
from probekit.stats import both_units, estimate, text_moments, token_moments


@dataclass(frozen=True)
class LensParams(Params):
    """Parameters of logit-lens."""

    top_k: int = param(10, low=1, high=100, unit="tokens", help="Predictions kept for each layer and position")
    shown_tokens: int = param(64, low=1, high=2000, unit="tokens", help="Tokens of each text's start in the heatmap")
    lens: str = param(
        "", help="Folder, file or hub id of the tuned or Jacobian lens that reads; empty for the logit lens"
    )
    lens_transfer: bool = param(False, help="Read with a lens that was made for another model of the same sizes")

    @property
    def reader(self) -> LensRef | None:
        """The lens that reads; None for the logit lens."""
        return open_lens(self.lens) if self.lens else None

    @property
    def capture(self) -> Capture:
        """The readout of every layer."""
        return Capture("resid_post", Readout(self.top_k, self.reader))


@register
class LogitLens(Analysis):
    """When does the model know the next token: what would each layer predict?

    Question:
        If the model stopped after a block, what would it predict, and from which block on does the
        final prediction stay?

    Method:
        The residual stream h after each block goes through the model's own final norm and unembedding;
        weights are raw. With `lens`, a trained one translates h first: a tuned lens to h + A h + b, with A
        and b trained to bring the reading close to the final distribution; a Jacobian lens to J h, with J
        the mean derivative of the final stream with respect to h. Per layer and token: top-k, entropy, log-probability and rank of the token
        that really follows, KL(final ‖ layer), all normalised over the full vocabulary in float32.
        The last layer is the model itself. `settled_layer` is the first layer from which the
        likeliest token is the final one in every later layer. Position 0 is part of all token means.

    Null:
        A layer is uninformative if the token that follows is no likelier than under a uniform guess,
        -ln V. Agreement with the final prediction is held against the agreement of the layer's
        predictions with the final predictions of other positions (all pairings). A model without
        early decisions settles at its last layer.

    Known failure modes:
        The lens assumes that every layer writes in the final basis. In many models early and middle
        layers do not, and the logit lens is worse than a uniform guess there; that says nothing about what
        these layers know. A tuned lens is trained on some texts: it may read less well on others, and what
        it reads early is what can be had linearly, not what the model uses. Massive activations dominate
        the norm at position 0.

    References:
        nostalgebraist 2020, interpreting GPT: the logit lens.
        Belrose et al. 2023, Eliciting Latent Predictions with the Tuned Lens, arXiv 2303.08112.
        Gurnee et al. 2026, Verbalizable Representations Form a Global Workspace in Language Models,
        Transformer Circuits Thread: the Jacobian lens (not checked against the paper's text).
    """

    name = "logit-lens"
    title = "Logit lens"
    Params = LensParams
    measures = {
        "entropy_nats": Measure(("layer", "token"), "nats", "entropy of the layer's next-token distribution"),
        "logprob_nats": Measure(("layer", "token"), "nats", "log-probability of the token that follows"),
        "target_rank": Measure(
            ("layer", "token"), "1", "tokens that the layer finds likelier than the one that follows"
        ),
        "kl_nats": Measure(("layer", "token"), "nats", "KL(final distribution ‖ layer's distribution)"),
        "top_logprob": Measure(("layer", "token", "rank"), "nats", "log-probabilities of the layer's likeliest tokens"),
        "top_id": Measure(("layer", "token", "rank"), "1", "ids of the layer's likeliest tokens"),
        "vocab_str": Measure(("vocab",), "1", "what the ids in top_id show as"),
        "settled_layer": Measure(("token",), "layer", "first layer from which the likeliest token stays the final one"),
        "agreement": Measure(("layer",), "share", "tokens whose likeliest next token is already the final one"),
        "agreement_null": Measure(("layer",), "share", "the same against the final predictions of other positions"),
    }

    statistics = {
        "settled": Statistic(("unit", "moment"), "layer at which a prediction settles, over tokens"),
        "agree": Statistic(("layer", "unit", "moment"), "whether the likeliest token is the final one, over tokens"),
        "informative": Statistic(("unit", "moment"), "layer from which a unit's mean beats a uniform guess"),
        "tokens": Statistic((), "tokens"),
        "known": Statistic((), "tokens whose next one is known"),
        "logprob_sum": Statistic(("layer",), "sum of the log-probabilities of the tokens that follow"),
        "kl_sum": Statistic(("layer",), "sum of KL(final ‖ layer)"),
        "entropy_sum": Statistic(("layer",), "sum of the entropies"),
        "predicted": Statistic(("layer", "vocab"), "how often each token is the layer's likeliest"),
    }

    def observe(self, params: LensParams, info: ModelInfo) -> Forward:
        """The readout of every layer."""
        if (reader := params.reader) is not None:
            reader.check_sizes(info)
        return Forward((params.capture,))

    def check_model(self, params: LensParams, info: ModelInfo, weights_hash: Callable[[], str]) -> None:
        """A lens fits its own model."""
        if (reader := params.reader) is not None:
            reader.check_model(info, weights_hash, transfer=params.lens_transfer)

    def compute(self, trace: Trace, params: LensParams) -> xr.Dataset:
        """The lens' numbers, agreement and where predictions settle."""
        reader, seen = params.reader, trace[params.capture]
        best = seen["top_id"].isel(rank=0)
        same = best == best.isel(layer=-1)
        settled = same.isel(layer=slice(None, None, -1)).cumprod("layer").sum("layer")
        variables = dict(seen.data_vars) | {
            "vocab_str": trace.vocab_table(),
            "settled_layer": seen.sizes["layer"] - settled,
            "agreement": same.mean("token"),
            "agreement_null": ("layer", _chance(best.values)),
        }
        about = {"lens": reader.title, "lens_sha256": reader.digest, "lens_model": reader.model} if reader else {}
        return xr.Dataset(variables, attrs={"d_vocab": trace.info.d_vocab, **about})

    def heading(self, result: Result) -> str:
        """Which lens reads."""
        reader = _reader(result.dataset)
        return reader[:1].upper() + reader[1:]

    def summarise(self, dataset: xr.Dataset, params: LensParams) -> xr.Dataset:
        """Moments of the findings, sums of the curves, and how often each layer predicts each token."""
        texts, pos = dataset["text"].values, dataset["pos"].values
        best, logprob = dataset["top_id"].isel(rank=0).values, dataset["logprob_nats"].values.astype(float)
        known, d_vocab = np.isfinite(logprob[-1]), dataset.attrs["d_vocab"]
        moments = ("unit", "moment")
        sums = {n: ("layer", dataset[f"{n[:-4]}_nats"].values.sum(1, dtype=float)) for n in ("kl_sum", "entropy_sum")}
        return xr.Dataset(
            {
                "settled": (moments, token_moments(dataset["settled_layer"].values, texts, pos)),
                "agree": (("layer", *moments), token_moments((best == best[-1]).astype(float), texts, pos)),
                "informative": (moments, _informative_units(logprob[:, known], texts[known], pos[known], d_vocab)),
                "tokens": len(texts),
                "known": int(known.sum()),
                "logprob_sum": ("layer", logprob[:, known].sum(1)),
                **sums,
                "predicted": (("layer", "vocab"), np.stack([np.bincount(ids, minlength=d_vocab) for ids in best])),
            },
            coords={"layer": dataset["layer"].values},
            attrs={"d_vocab": d_vocab},
        )

    def totals(self, summary: xr.Dataset, params: LensParams) -> dict[str, xr.DataArray]:
        """Agreement, and agreement by chance."""
        agree = summary["agree"].isel(unit=0)
        chances = _by_chance(summary["predicted"].values, agree.isel(moment=2).values)
        return {
            "agreement": agree.isel(moment=2) / agree.isel(moment=1),
            "agreement_null": xr.DataArray(chances, dims="layer"),
        }

    def findings(self, result: Result) -> list[Finding]:
        """Where the lens becomes informative, where predictions settle, how early they agree."""
        data, seen = result.dataset, result.summary
        n_layers = data.sizes["layer"]
        settled = estimate(seen["settled"].values)
        late = max(0, min((3 * n_layers) // 4, n_layers - 2))
        agree = estimate(seen["agree"].values[late]).within(0, 1)
        chance = float(data["agreement_null"][late])
        return [
            self._informative(result),
            Finding(
                f"Predictions{_by(data)} settle at block {settled.value:.1f} of {n_layers - 1} on average.",
                settled.value, "layer", n_layers - 1.0, "decided only in the last block",
                settled.ci95, settled.n, settled.n_unit, quantity="layer at which predictions settle",
            ),
            Finding(
                f"After block {late} of {n_layers - 1} the {_reader(data)} names the final prediction "
                f"for {agree.value:.0%} of tokens.",
                agree.value, "share of tokens", chance, "paired with other positions' predictions",
                agree.ci95, agree.n, agree.n_unit, {"layer": late},
                quantity="predictions final after three quarters of the blocks",
            ),
        ]  # fmt: skip

    def _informative(self, result: Result) -> Finding:
        data = result.summary
        n_layers, uniform = data.sizes["layer"], -float(np.log(data.attrs["d_vocab"]))
        from_layer = estimate(data["informative"].values)
        pooled = _informative_from((data["logprob_sum"] / data["known"]).values, uniform)
        if pooled == n_layers:
            claim = f"Even the last block is no better than a uniform guess ({uniform:.1f} nats)."
        elif pooled == 0:
            claim = f"The {_reader(result.dataset)} beats a uniform guess ({uniform:.1f} nats) from the first block on."
        else:
            claim = (
                f"The {_reader(result.dataset)} beats a uniform guess ({uniform:.1f} nats) only from block {pooled} on: "
                f"in the last {1 - pooled / n_layers:.0%} of the depth."
            )
        return Finding(
            claim, from_layer.value, "layer", 0.0, "informative at every layer",
            from_layer.ci95, from_layer.n, from_layer.n_unit, {"layer": pooled},
            quantity="layer from which the lens beats a uniform guess",
        )  # fmt: skip

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Curves over depth, the classic layer × token map, and the text by where it settles."""
        data, seen = result.dataset, result.summary
        informative, settled, agree = result.findings
        uniform, about = -float(np.log(data.attrs["d_vocab"])), _about(result)
        return {
            "logprob": plots.lines(
                {"log-probability of the next token": seen["logprob_sum"] / seen["known"]},
                title=informative.claim,
                unit="nats",
                reference=(uniform, f"uniform guess, {uniform:.1f}"),
                caption=f"{about} Mean over tokens of ln p(token that follows), read after each block.",
                alt="Mean log-probability of the next token against layer, with a uniform guess as a level line.",
            ),
            "kl": plots.lines(
                {"KL(final ‖ layer)": seen["kl_sum"] / seen["tokens"], "entropy": seen["entropy_sum"] / seen["tokens"]},
                title=f"How far each layer's reading{_by(data)} is from the final distribution",
                unit="nats",
                quantity="mean",
                caption=f"{about} Means over tokens.",
                alt="Mean KL divergence to the final distribution and mean entropy against layer.",
            ),
            "agreement": plots.lines(
                {"same position": data["agreement"], "other positions (null)": data["agreement_null"]},
                title=agree.claim,
                unit="share of tokens",
                quantity="agreement with the final prediction",
                y_range=(0, 1),
                caption=f"{about} Share of tokens whose likeliest next token is the final one.",
                alt="Agreement with the final prediction against layer, beside its permutation null.",
            ),
            "map": self._map(result),
            "strip": self._strip(result, settled.claim),
        }

    def _map(self, result: Result) -> plots.Figure:
        n = result.params.as_dict()["shown_tokens"]
        first = int(result["text"].values[0])
        data = result.dataset.isel(token=(result["text"].values == first) & (result["pos"].values < n))
        hover = plots.next_words(data["top_id"], data["top_logprob"], data["vocab_str"], separator="\n")
        return plots.heatmap(
            data["entropy_nats"],
            title=f"What each layer would say next{_by(data)} (hover for the words)",
            unit="nats",
            quantity="entropy",
            low=0.0,
            hover=hover,
            caption=f"{_about(result, shown=True)} The first {data.sizes['token']} tokens of text {first}; dark = undecided.",
            alt="Heatmap of the lens' entropy over layers and the first tokens; hover lists the likeliest tokens.",
        )

    def _strip(self, result: Result, title: str) -> plots.TokenStrip:
        data = result.dataset
        n_layers = data.sizes["layer"]
        last = data[["top_id", "top_logprob"]].isel(layer=-1)
        words = plots.next_words(last["top_id"], last["top_logprob"], data["vocab_str"])
        return plots.TokenStrip(
            title=title,
            tokens=tuple(map(str, data["token_str"].values)),
            texts=data["text"].values,
            quantities=(
                plots.Quantity(
                    "layer at which the next token is settled",
                    "layer",
                    data["settled_layer"].values,
                    low=0,
                    high=n_layers - 1,
                ),
                plots.Quantity(
                    "KL(final ‖ middle layer)", "nats", data["kl_nats"].isel(layer=n_layers // 2).values, low=0
                ),
                plots.Quantity(
                    "rank of the next token, last layer", "1", data["target_rank"].isel(layer=-1).values + 1, "log"
                ),
            ),
            caption=f"{_about(result, shown=True)} The colour belongs to the position that predicts.",
            alt="The text, each token coloured by the layer at which the prediction of the next one is settled.",
            notes=tuple(f"next: {w}" for w in words.values),
        )


def _reader(data: xr.Dataset) -> str:
    return str(data.attrs.get("lens") or "logit lens")


def _by(data: xr.Dataset) -> str:
    return f" by the {data.attrs['lens']}" if data.attrs.get("lens") else ""


def _about(result: Result, *, shown: bool = False) -> str:
    """Model and corpus, and the lens if it is not the logit lens; `shown`: and how many of the texts are shown."""
    about = result.about_shown if shown else result.about
    return f"{about}{f' Read by the {_reader(result.dataset)}.' if result.dataset.attrs.get('lens') else ''}"


def _chance(best: np.ndarray) -> list[float]:
    """Per layer, how often its predictions equal the final predictions of other positions."""
    ids, place = np.unique(best, return_inverse=True)
    counts = np.stack([np.bincount(row, minlength=len(ids)) for row in place.reshape(best.shape)])
    return _by_chance(counts, (best == best[-1]).sum(1))


def _by_chance(counts: np.ndarray, same: np.ndarray) -> list[float]:
    """The same from how often each layer predicts each token, and how often it predicts the final one."""
    n = float(counts[-1].sum())
    pairs = counts.astype(float) @ counts[-1].astype(float) - same
    return [float(p) / (n * (n - 1)) if n > 1 else float("nan") for p in pairs]


def _informative_units(logprob: np.ndarray, texts: np.ndarray, pos: np.ndarray, d_vocab: int) -> np.ndarray:
    """Moments, by texts and by blocks, of the layer from which on the mean of each beats a uniform guess."""
    made = []
    for unit in both_units(texts, pos):
        curves = np.stack([np.bincount(unit, row) for row in logprob]) / np.bincount(unit)
        made.append(
            text_moments(np.array([_informative_from(c, -float(np.log(d_vocab))) for c in curves.T], dtype=float))
        )
    return np.stack(made)


def _informative_from(logprob: np.ndarray, uniform: float) -> int:
    """First layer from which on every layer beats a uniform guess; the number of layers if none does."""
    better = np.append(logprob > uniform, True)
    return int(len(better) - np.argmax(~better[::-1])) if not better.all() else 0

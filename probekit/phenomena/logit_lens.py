"""What each layer would predict if the model stopped there, read by the logit lens or by a trained one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Measure, Params, Result, param, register
from probekit.core import Capture, Forward, ModelInfo, Trace
from probekit.reduce import LensRef, Readout, open_lens
from probekit.stats import text_mean, token_mean, units


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

    def findings(self, result: Result) -> list[Finding]:
        """Where the lens becomes informative, where predictions settle, how early they agree."""
        data, texts, pos = result.dataset, result["text"].values, result["pos"].values
        n_layers = data.sizes["layer"]
        settled = token_mean(data["settled_layer"].values, texts, pos)
        late = max(0, min((3 * n_layers) // 4, n_layers - 2))
        best = data["top_id"].isel(rank=0).values
        agree = token_mean((best[late] == best[-1]).astype(float), texts, pos).within(0, 1)
        chance = float(data["agreement_null"][late])
        return [
            self._informative(result),
            Finding(
                f"Predictions{_by(data)} settle at block {settled.value:.1f} of {n_layers - 1} on average.",
                settled.value, "layer", n_layers - 1.0, "decided only in the last block",
                settled.ci95, settled.n, settled.n_unit,
            ),
            Finding(
                f"After block {late} of {n_layers - 1} the {_reader(data)} names the final prediction "
                f"for {agree.value:.0%} of tokens.",
                agree.value, "share of tokens", chance, "paired with other positions' predictions",
                agree.ci95, agree.n, agree.n_unit, {"layer": late},
            ),
        ]  # fmt: skip

    def _informative(self, result: Result) -> Finding:
        data = result.dataset
        n_layers, uniform = data.sizes["layer"], -float(np.log(data.attrs["d_vocab"]))
        unit, name = units(result["text"].values, result["pos"].values)
        logprob = data["logprob_nats"].values
        known = np.isfinite(logprob[-1])
        curves = [logprob[:, known & (unit == u)].mean(axis=1) for u in np.unique(unit[known])]
        from_layer = text_mean(np.array([_informative_from(c, uniform) for c in curves], dtype=float), name)
        pooled = _informative_from(logprob[:, known].mean(axis=1), uniform)
        if pooled == n_layers:
            claim = f"Even the last block is no better than a uniform guess ({uniform:.1f} nats)."
        elif pooled == 0:
            claim = f"The {_reader(data)} beats a uniform guess ({uniform:.1f} nats) from the first block on."
        else:
            claim = (
                f"The {_reader(data)} beats a uniform guess ({uniform:.1f} nats) only from block {pooled} on: "
                f"in the last {1 - pooled / n_layers:.0%} of the depth."
            )
        return Finding(
            claim, from_layer.value, "layer", 0.0, "informative at every layer",
            from_layer.ci95, from_layer.n, from_layer.n_unit, {"layer": pooled},
        )  # fmt: skip

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Curves over depth, the classic layer × token map, and the text by where it settles."""
        data = result.dataset
        informative, settled, agree = result.findings
        uniform, about = -float(np.log(data.attrs["d_vocab"])), _about(result)
        return {
            "logprob": plots.lines(
                {"log-probability of the next token": data["logprob_nats"].mean("token")},
                title=informative.claim,
                unit="nats",
                reference=(uniform, f"uniform guess, {uniform:.1f}"),
                caption=f"{about} Mean over tokens of ln p(token that follows), read after each block.",
                alt="Mean log-probability of the next token against layer, with a uniform guess as a level line.",
            ),
            "kl": plots.lines(
                {"KL(final ‖ layer)": data["kl_nats"].mean("token"), "entropy": data["entropy_nats"].mean("token")},
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
            caption=f"{_about(result)} The first {data.sizes['token']} tokens of text {first}; dark = undecided.",
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
            caption=f"{_about(result)} The colour belongs to the position that predicts.",
            alt="The text, each token coloured by the layer at which the prediction of the next one is settled.",
            notes=tuple(f"next: {w}" for w in words.values),
        )


def _reader(data: xr.Dataset) -> str:
    return str(data.attrs.get("lens") or "logit lens")


def _by(data: xr.Dataset) -> str:
    return f" by the {data.attrs['lens']}" if data.attrs.get("lens") else ""


def _about(result: Result) -> str:
    """Model and corpus, and the lens if it is not the logit lens."""
    return f"{result.about}{f' Read by the {_reader(result.dataset)}.' if result.dataset.attrs.get('lens') else ''}"


def _chance(best: np.ndarray) -> list[float]:
    """Per layer, how often its predictions equal the final predictions of other positions."""
    final_ids, final_counts = np.unique(best[-1], return_counts=True)
    n, chances = best.shape[1], []
    for layer in best:
        ids, counts = np.unique(layer, return_counts=True)
        _, here, there = np.intersect1d(ids, final_ids, return_indices=True)
        pairs = float((counts[here] * final_counts[there]).sum()) - float((layer == best[-1]).sum())
        chances.append(pairs / (n * (n - 1)) if n > 1 else float("nan"))
    return chances


def _informative_from(logprob: np.ndarray, uniform: float) -> int:
    """First layer from which on every layer beats a uniform guess; the number of layers if none does."""
    better = np.append(logprob > uniform, True)
    return int(len(better) - np.argmax(~better[::-1])) if not better.all() else 0

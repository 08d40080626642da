"""A small made-up analysis with every kind of drawing, for tests of plots and report."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Measure, Params, Result, Results, param, register

PROSE = (
    "When the tide went out, the harbour looked like a page that someone had forgotten to finish. Boats leaned on "
    "their keels, gulls argued over nothing in particular, and the old crane, which nobody had moved since 1987, "
    'stood exactly where it had always stood. "It will come back," said the harbour master, folding his newspaper '
    "into a smaller and smaller square. He meant the water, although his daughter thought he meant the ferry.\n\n"
    "The ferry had been promised for March; then for the first week of June; then, in a letter that was signed by "
    "three people and read by one, for an unspecified date after the elections. In the meantime the island learned "
    "to count differently. A loaf of bread was two favours, a sack of cement was nine, and a tooth, if it had to be "
    "pulled, was worth whatever the dentist's cousin happened to need.\n"
)
NASTY = (
    "<b>bold</b>",
    '<a href="javascript:window.__pwned=1">link</a>',
    "&amp;",
    "&#60;i&#62;",
    "<img src=x onerror=window.__pwned=1>",
    "<script>window.__pwned=1</script>",
    "</script><script>window.__pwned=1</script>",
    "%{x} %{customdata}",
    "$x^2$",
    "<br>",
    "{{ 7*7 }}",
    "<!--",
    "\u202eevil\u2066",
    "\\udc80",
    "\x00\x1b[31m",
    "\u2028",
    "\t",
    "        ",
    "日本",
    "",
)
N_LAYERS, N_RANKS = 30, 4
WORDS = {"caption": "SmolModel, 2 texts. Made-up numbers.", "alt": "Made-up numbers."}


@dataclass(frozen=True)
class FakeParams(Params):
    """Parameters of the made-up analysis."""

    threshold: float = param(0.3, help="Share above which a token counts as a sink.", unit="share", low=0, high=1)
    top_k: int = param(5, help="Alternatives per token.", low=1)


class Tides(Analysis):
    """Where in depth the model makes up its mind.

    Question:
        At which layer does the residual stream come to hold the token that the model will predict?
        Tokens that settle early need little context; tokens that settle late are decided by the last blocks.

    Method:
        The residual stream after block `l` is read through the final norm and the unembedding. A token is
        `settled` at the first layer from which the most likely token stays the same:

        - the entropy of each readout, in nats;
        - the layer from which the readout stays.

    Null:
        The same readout with the unembedding's rows permuted, so that norms and frequencies are kept.

    Known failure modes:
        Early layers read out in a basis that the unembedding does not share, so a late settling layer can mean
        a rotated basis rather than late knowledge.

    References:
        - nostalgebraist (2020), https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru.
        - Belrose et al. (2023), Eliciting latent predictions, https://arxiv.org/abs/2303.08112.
    """

    name = "tides"
    title = "Tides of certainty"
    Params = FakeParams
    measures: ClassVar = {
        "entropy_nats": Measure(("layer", "token"), "nats", "Entropy of the readout at each layer."),
        "norm": Measure(("layer", "rank"), "× median", "Largest magnitudes of each layer."),
        "surprisal_nats": Measure(("token",), "nats", "Surprisal of the token given the tokens before it."),
    }

    def findings(self, result: Result) -> list[Finding]:
        """Two claims, one with a token in it."""
        return [
            Finding(
                "The readout settles 6.2 layers before the end, on <b>average</b> over tokens.",
                6.2, "layers", 0.4, "unembedding rows permuted", (5.1, 7.3), 8, "blocks of 32 tokens", {"layer": 23},
            ),
            Finding(
                "The largest magnitude is 21,998 × the median.", 21998.0, "× median", 1000.0, "threshold of the claim",
                None, 1, "text", {"layer": 11, "dim": 507},
            ),
        ]  # fmt: skip

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Every shape there is."""
        return draw(result)


def draw(result: Result) -> dict[str, plots.Drawing]:
    """One drawing of every shape."""
    entropy, norm, surprisal = result["entropy_nats"], result["norm"], result["surprisal_nats"]
    mean = entropy.mean("token")
    spread = entropy.std("token") / 4
    hover = np.asarray(
        [[f"layer {i}\n{s}" for s in entropy["token_str"].values] for i in range(N_LAYERS)], dtype=object
    )
    drawings: dict[str, plots.Drawing] = {
        "strip": _strip(result),
        "map": plots.heatmap(
            entropy, unit="nats", hover=hover, **words("Entropy falls in the last third of the network, token by token")
        ),
        "rank": plots.heatmap(np.exp(entropy).rename("rank"), unit="1", scale="log", **words("Ranks fall by decades")),
        "delta": plots.heatmap(
            (entropy - 5)[:, :24].rename("change"), unit="nats", scale="diverging", **words("Changes lie around zero")
        ),
        "depth": plots.lines(
            {"all tokens": mean, "without position 0": mean * 0.9, "the token <b>the</b>": mean * 0.85 + 0.1},
            unit="nats",
            bands={"all tokens": (mean - spread, mean + spread)},
            reference=(math.log(49152), "uniform over the vocabulary"),
            quantity="mean entropy",
            **words("The readout becomes sharp only in the last third"),
        ),
        "one": plots.lines({"mean entropy": mean}, unit="nats", log_y=True, **words("One curve needs no legend")),
        "magnitudes": plots.dots(
            norm, unit="× median", log_y=True, reference=(1000.0, "1000 × median"), hover=_dims(norm),
            **words("Block 11 writes one magnitude near 22,000"),
        ),
        "kinds": plots.bars(
            {"␣word": 4.1, "<b>": 2.0, "punctuation": 1.2},
            unit="nats",
            intervals={"␣word": (3.5, 4.6), "<b>": (1.2, 2.9), "punctuation": (1.0, 1.5)},
            reference=(3.0, "all tokens"),
            quantity="surprisal",
            **words("Words that begin with a blank surprise most"),
        ),
        "layers": plots.bars(mean.rename("entropy_nats"), unit="nats", intervals=(mean - spread, mean + spread),
                             **words("Standing bars over layers")),
        "counts": plots.histogram(
            *np.histogram(surprisal.values[np.isfinite(surprisal.values)], 24), unit="nats", quantity="surprisal",
            **words("Most tokens surprise little"),
        ),
    }  # fmt: skip
    return drawings


def words(title: str) -> dict[str, str]:
    """Title, caption and alternative text."""
    return {"title": title, **WORDS}


def _dims(norm: xr.DataArray) -> np.ndarray:
    return np.asarray([[f"dimension {507 + r}\nat (0)<b>" for r in range(norm.sizes["rank"])] for _ in norm["layer"]])


def _strip(result: Result) -> plots.TokenStrip:
    surprisal = result["surprisal_nats"]
    tokens = tuple(surprisal["token_str"].values)
    values = surprisal.values
    return plots.TokenStrip(
        title="Rare words and the first words of a sentence surprise the model",
        tokens=tokens,
        texts=surprisal["text"].values,
        quantities=(
            plots.Quantity("surprisal", "nats", values, low=0, high=12),
            plots.Quantity("change of log-probability", "nats", values - 4, scale="diverging"),
            plots.Quantity("rank of the token", "1", np.floor(np.exp(np.nan_to_num(values))), scale="log"),
            plots.Quantity("share of attention", "share", np.clip(values / 20, 0, 1), low=0, high=1),
        ),
        notes=tuple(f"next: {t} 0.31\nthen: <b> 0.12" for t in tokens),
        **WORDS,
    )


def fake_dataset(n_repeat: int = 1, nasty: bool = True) -> xr.Dataset:
    """Two texts, English and hostile, with made-up numbers."""
    rng = np.random.default_rng(0)
    english = re.findall(r"\n|\s?[A-Za-z']+|\s?\d|\s?[^\sA-Za-z\d]", PROSE) * n_repeat
    strings = [*english, *(NASTY if nasty else ())]
    text = [0] * len(english) + [3] * (len(strings) - len(english))
    pos = [*range(len(english)), *range(len(strings) - len(english))]
    depth = np.linspace(0, 1, N_LAYERS)[:, None]
    difficulty = rng.gamma(2.0, 1.6, len(strings))
    entropy = 10.8 / (1 + np.exp((depth - 0.72 - 0.02 * difficulty) * 14)) + 0.5 * difficulty * depth
    surprisal = difficulty + rng.normal(0, 0.4, len(strings)).clip(-0.5)
    surprisal[[0, len(english) % len(strings)]] = np.nan
    norm = np.outer(
        np.where((np.arange(N_LAYERS) > 10) & (np.arange(N_LAYERS) < 28), 21998, 40), 0.4 ** np.arange(N_RANKS)
    )
    return xr.Dataset(
        {
            "entropy_nats": (("layer", "token"), entropy),
            "norm": (("layer", "rank"), norm * rng.uniform(0.8, 1, norm.shape)),
            "surprisal_nats": (("token",), np.abs(surprisal)),
        },
        coords={
            "layer": np.arange(N_LAYERS),
            "rank": np.arange(N_RANKS),
            "text": ("token", text),
            "pos": ("token", pos),
            "token_id": ("token", np.arange(len(strings))),
            "token_str": ("token", np.asarray(strings, dtype=object)),
        },
    )


def fake_results(n_repeat: int = 1, nasty: bool = True) -> Results:
    """Results of the made-up analysis; call it inside `temporary_registrations`."""
    register(Tides)
    analysis = Tides()
    dataset = analysis.check(fake_dataset(n_repeat, nasty))
    return Results({"tides": Result(analysis, FakeParams(), dataset, {"model": "smolmodel"})})


def fake_manifest() -> dict[str, Any]:
    """Provenance as a run writes it."""
    return {
        "created": "2026-01-05T10:00:00Z",
        "corpus": "harbour.txt <i>",
        "model": {"name": "smolmodel-135m-instruct", "revision": "3f1c0b6e" * 5, "dtype": "float32", "n_layers": 30},
        "bos": "model",
        "packages": {"numpy": "2.4.6", "xarray": "2026.9.0"},
        "parameters": {"tides": {"threshold": 0.3, "top_k": 5}},
        "plan": {"memory_gb": 0.61, "lengths": list(range(100))},
    }

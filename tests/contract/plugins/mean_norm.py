"""Mean norm: how long the token embeddings are. A whole phenomenon in one file."""

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Measure, Params, Result, register
from probekit.core import Capture, Forward, ModelInfo, Trace
from probekit.reduce import Norm
from probekit.stats import token_mean

SEEN = Capture("resid_pre.0", Norm())


@register
class MeanNorm(Analysis):
    """How long are the token embeddings?"""

    name, title = "mean-norm", "Mean norm"
    measures = {"norm": Measure(("token",), "activation", "norm of the stream entering block 0")}

    def observe(self, params: Params, info: ModelInfo) -> Forward:
        return Forward((SEEN,))

    def compute(self, trace: Trace, params: Params) -> xr.Dataset:
        return xr.Dataset({"norm": trace[SEEN]["norm"].isel(layer=0, drop=True)})

    def findings(self, result: Result) -> list[Finding]:
        mean = token_mean(result["norm"].values, result["text"].values, result["pos"].values)
        claim = f"Embeddings are {mean.value:.2f} long on average."
        return [Finding(claim, mean.value, "activation", 0.0, "no embedding", mean.ci95, mean.n, mean.n_unit)]

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        tokens, texts = tuple(map(str, result["token_str"].values)), result["text"].values
        norm = plots.Quantity("norm", "activation", np.asarray(result["norm"]))
        return {"strip": plots.TokenStrip(result.findings[0].claim, tokens, texts, (norm,), result.about, "Norms.")}

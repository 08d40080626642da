"""The results of a sweep over layers: what their numbers mean, what they claim, how they are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from probekit import plots
from probekit.analysis import Analysis, Finding, Measure, Params, Result, fmt, param
from probekit.core import Batch, InputError

if TYPE_CHECKING:
    import xarray as xr

CL, C = ("case", "layer"), ("case",)
ENDS = "95 % interval over prompts (bootstrap of held-out groups, √2 wider)"


@dataclass(frozen=True)
class SweepParams(Params):
    """Parameters of a sweep."""

    n_folds: int = param(5, low=2, high=50, unit="folds", help="Outer folds; each keeps every prompt whole")
    n_permutations: int = param(1000, low=20, high=100_000, help="Permutations of the labels between prompts")
    seed: int = param(0, low=0, help="Seed of splits, resampling and controls")


class Collectable(Analysis):
    """An analysis of collected rows: it has results as others do, and nothing runs it by its name."""

    intervenes = True  # not part of "all"
    how: ClassVar[str]

    def check_texts(self, params: Any, batch: Batch) -> None:
        """Say how such a result comes about."""
        raise InputError(f"{self.name} does not run on texts alone: {self.how}.")


class Sweep(Collectable):
    """What sweeps over layers have in common."""

    Params = SweepParams
    how = "collect rows with pk.collect, then call pk.probing.sweep"
    value: ClassVar[str]
    words: ClassVar[str]
    unit: ClassVar[str]
    nothing: ClassVar[float]
    draws_level: ClassVar[str]

    def findings(self, result: Result) -> list[Finding]:
        """What a probe finds at the layer chosen inside the folds, and by how much that beats its baselines."""
        found = []
        for case in result["case"].values.tolist():
            at = result.dataset.sel(case=case)
            found += [self._main(at, result), self._against(at, "bag", "a bag of token ids")]
            if np.isfinite(float(at["over_embedding"])):
                found.append(self._against(at, "embedding", "the token embedding (layer 0)"))
        return found

    def _main(self, at: xr.Dataset, result: Result) -> Finding:
        value, ends = float(at[f"chosen_{self.value}"]), (float(at["chosen_low"]), float(at["chosen_high"]))
        layer, n = int(at["chosen_layer"]), int(at["n_groups"])
        best = at.sel(layer=layer)
        p, bh = float(best["p_bonferroni"]), at["p_bh"].values
        n_below = int((bh[np.isfinite(bh)] < 0.05).sum())
        shuffled = float(best[f"shuffled_{self.value}"])
        place = f"{at['case'].item()}, layer {layer}"
        claim = (
            f"A linear probe {self._tells(result)} at {place}, a layer chosen inside the folds: {self.words} {fmt(value)} "
            f"on held-out prompts, {fmt(shuffled)} with shuffled labels; {n_below} of {int(np.isfinite(bh).sum())} layers "
            "at a false discovery rate of 5 %."
        )
        return Finding(
            claim, value, self.unit, self.nothing, "labels that have nothing to do with the rows", ends, n, "prompts",
            {"case": at["case"].item(), "layer": layer, "p_bonferroni": p},
            quantity=f"{self.words} of the probe, layer chosen inside folds",
        )  # fmt: skip

    def _tells(self, result: Result) -> str:
        attrs = result.dataset.attrs
        return f"tells {attrs.get('positive')!r} from {attrs.get('negative')!r}"

    def _against(self, at: xr.Dataset, name: str, words: str) -> Finding:
        value = float(at[f"over_{name}"])
        ends = float(at[f"over_{name}_low"]), float(at[f"over_{name}_high"])
        claim = (
            f"At {at['case'].item()} the probe has {fmt(value)} more {self.words} than a probe of {words}, which has "
            f"{fmt(float(at[f'{name}_{self.value}']))}."
        )
        where = {"case": at["case"].item(), "baseline": name}
        beyond = {"bag": "a bag of token ids", "embedding": "the token embedding"}[name]
        return Finding(
            claim, value, self.unit, 0.0, "no better than it", ends, int(at["n_groups"]), "prompts", where,
            quantity=f"{self.words} of the probe beyond {beyond}",
        )  # fmt: skip

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Held-out figures over layers with their baselines."""
        figures: dict[str, plots.Drawing] = {}
        cases = result["case"].values.tolist()
        for i, case in enumerate(cases):
            ending = "" if len(cases) == 1 else f"_{i}"
            at = result.dataset.sel(case=case).dropna("layer", subset=[self.value])
            if at.sizes["layer"] > 1:
                figures[f"layers{ending}"] = self._curves(at, result)
            else:
                figures[f"baselines{ending}"] = self._bars(at, result)
            figures |= {f"{name}{ending}": d for name, d in self._more(at, result).items()}
        return figures

    def _more(self, at: xr.Dataset, result: Result) -> Mapping[str, plots.Drawing]:
        return {}

    def _about(self, at: xr.Dataset, result: Result) -> str:
        n, rows = int(at["n_groups"]), int(at["n_rows"])
        return f"{result.about} {rows:,} rows of {n:,} prompts, {getattr(result.params, 'n_folds', 0)} folds by prompt."

    def _level(self, at: xr.Dataset, name: str) -> xr.DataArray:
        return at[self.value].copy(data=np.full(at.sizes["layer"], float(at[name])))

    def _baseline_curves(self, at: xr.Dataset) -> dict[str, xr.DataArray]:
        curves = {"bag of token ids": self._level(at, f"bag_{self.value}")}
        if np.isfinite(float(at[f"embedding_{self.value}"])):
            curves["token embedding"] = self._level(at, f"embedding_{self.value}")
        return curves | {
            "shuffled labels": at[f"shuffled_{self.value}"],
            "random directions, best of 20": at[f"random_{self.value}_high"],
        }

    def _curves(self, at: xr.Dataset, result: Result) -> plots.Figure:
        value, layer = float(at[f"chosen_{self.value}"]), int(at["chosen_layer"])
        curves = {"probe": at[self.value]} | self._baseline_curves(at)
        title = (
            f"{at['case'].item()}: a linear probe {self._tells(result)} with {self.words} {fmt(value)} at the layer that "
            f"the folds choose, mostly {layer}."
        )
        return plots.lines(
            curves,
            bands={"probe": (at[f"{self.value}_low"], at[f"{self.value}_high"])},
            title=title,
            unit="1",
            quantity=f"held-out {self.words}",
            reference=(self.nothing, self.draws_level),
            caption=f"{self._about(at, result)} Band: {ENDS}.",
            alt=f"Held-out {self.words} of the probe at every layer with a band, and of its baselines.",
        )

    def _bars(self, at: xr.Dataset, result: Result) -> plots.Figure:
        one = at.isel(layer=0)
        values = {"probe": float(one[self.value])}
        values |= {name: float(c.values[0]) for name, c in self._baseline_curves(at).items()}
        ends = {"probe": (float(one[f"{self.value}_low"]), float(one[f"{self.value}_high"]))}
        for label, name in (("bag of token ids", "bag"), ("token embedding", "embedding")):
            if label in values:
                ends[label] = (float(at[f"{name}_low"]), float(at[f"{name}_high"]))
        ends |= {label: (np.nan, np.nan) for label in values if label not in ends}
        return plots.bars(
            values,
            intervals=ends,
            title=f"{at['case'].item()}: a linear probe {self._tells(result)} with {self.words} {fmt(values['probe'])}.",
            unit="1",
            quantity=f"held-out {self.words}",
            reference=(self.nothing, self.draws_level),
            caption=f"{self._about(at, result)} Lines: {ENDS}; controls without a line have none.",
            alt=f"Held-out {self.words} of the probe and its baselines.",
        )


def _interval(name: str, dims: tuple[str, ...], what: str) -> dict[str, Measure]:
    return {
        f"{name}_low": Measure(dims, "1", f"lower end of {what}: {ENDS}; NaN where it is"),
        f"{name}_high": Measure(dims, "1", f"upper end of {what}: {ENDS}; NaN where it is"),
    }


def _compared(value: str, words: str) -> dict[str, Measure]:
    """Figures of a case that both sweeps have."""
    bag = f"held-out {words} of a probe of token ids: those read so far, or the row's own where labels belong to tokens"
    embedding = f"held-out {words} of a probe of the token embedding of the row; NaN where the model does not show it"
    chosen = f"held-out {words} of the layer that the inner loss chooses in each outer fold"
    measures = {
        f"chosen_{value}": Measure(C, "1", chosen),
        **_interval("chosen", C, f"chosen_{value}"),
        "chosen_layer": Measure(C, "layer", "the layer chosen by most folds"),
        f"bag_{value}": Measure(C, "1", bag),
        **_interval("bag", C, f"bag_{value}"),
        f"embedding_{value}": Measure(C, "1", embedding),
        **_interval("embedding", C, f"embedding_{value}"),
        "n_rows": Measure(C, "rows", "rows that are probed"),
        "n_groups": Measure(C, "prompts", "prompts they belong to"),
    }
    for name, what in (("bag", "the probe of token ids"), ("embedding", "the probe of the token embedding")):
        words_of = f"chosen_{value} minus that of {what}, on the same rows; NaN where there is none"
        measures[f"over_{name}"] = Measure(C, "1", words_of)
        measures |= _interval(f"over_{name}", C, f"over_{name}")
    return measures


TESTED = {
    "p_value": Measure(
        CL, "1", "one-sided permutation test of a least-squares probe refitted to labels exchanged between prompts; NaN "
        "where the point has no such layer",
    ),
    "p_bonferroni": Measure(CL, "1", "p_value times the number of layers of all cases, at most 1; NaN where it is"),
    "p_bh": Measure(CL, "1", "p_value adjusted by Benjamini and Hochberg over layers of all cases; NaN where it is"),
}  # fmt: skip
NO_LAYER = "NaN where the point has no such layer"


class LinearProbes(Sweep):
    """Where in the model can a linear probe tell two classes, and by how much does it beat its controls?

    Question:
        At which layers is a concept linearly readable from the activations of held-out prompts, and is that more than
        token ids, the embedding, memory and chance give?

    Method:
        Rows are split by prompt into outer folds that know nothing of labels; texts that are alike are one prompt. In each
        training part features are standardised, L2 logistic regression is fitted, C from 1e-4 to 100 has the least log-loss
        over five inner folds by prompt, and the temperature is fitted to these inner held-out rows. AUROC compares
        pairs of one test fold. Balanced accuracy calls a row positive whose probability exceeds the training share.
        Calibration: 15 bins of equal width, Brier score, before and after temperature, on outer test rows. A point that
        exists once stands at the layer it comes before or after. Description length: the online code over whole
        prompts, in bits. The layer reported first is chosen inside each outer fold, so that choosing it does not
        flatter it.

    Null:
        p-values: a least-squares probe with a penalty that knows no labels is refitted to labels exchanged between
        prompts; Bonferroni and Benjamini-Hochberg over all layers. Beside them: the same logistic probe on labels
        exchanged between prompts (mean of 3), random directions, a probe of token ids, one of the embedding, and a
        control task with a random label for each token id (held-out rows) or, where labels belong to texts, for each
        text (rows of the fit). Intervals resample prompts of the held-out scores and are widened by √2, because every
        label also serves in the other folds' training; where there is nothing to find they then cover 0.5 at about
        their nominal rate, and where there is much they are somewhat too wide.

    Known failure modes:
        What a probe reads the model need not use: steer along it. Prompts made from one template are told apart by the
        template; give such prompts a common group. With few prompts of a class a fold may hold none of it, and the
        interval is wide. AUROC near 1 over a bag of token ids that also is near 1 says nothing about the model.

    References:
        Alain and Bengio 2016, Understanding Intermediate Layers Using Linear Classifier Probes, arXiv 1610.01644.
        Hewitt and Liang 2019, Designing and Interpreting Probes with Control Tasks, arXiv 1909.03368.
        Voita and Titov 2020, Information-Theoretic Probing with Minimum Description Length, arXiv 2003.12298.
        Marks and Tegmark 2023, The Geometry of Truth, arXiv 2310.06824.
        Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv 1706.04599.
    """

    name = "linear-probes"
    title = "Linear probes"
    value, words, unit, nothing, draws_level = "auroc", "AUROC", "AUROC", 0.5, "chance"
    measures = {
        "auroc": Measure(CL, "1", f"share of pairs of held-out rows of one fold that are ranked right; {NO_LAYER}"),
        **_interval("auroc", CL, "auroc"),
        "balanced_accuracy": Measure(
            CL, "1", f"mean over classes of the share of held-out rows told right; {NO_LAYER}"
        ),
        **_interval("balanced_accuracy", CL, "balanced_accuracy"),
        **TESTED,
        "ece": Measure(CL, "1", f"expected calibration error, 15 equal bins, held-out rows; {NO_LAYER}"),
        "ece_calibrated": Measure(CL, "1", f"the same after temperature; {NO_LAYER}"),
        "brier": Measure(CL, "1", f"mean squared difference of probability and outcome, held-out rows; {NO_LAYER}"),
        "brier_calibrated": Measure(CL, "1", f"the same after temperature; {NO_LAYER}"),
        "mass_mean_auroc": Measure(CL, "1", f"held-out AUROC of the difference of means; {NO_LAYER}"),
        "shuffled_auroc": Measure(
            CL, "1", f"held-out AUROC on labels exchanged between prompts, mean of 3; {NO_LAYER}"
        ),
        "random_auroc": Measure(CL, "1", f"held-out AUROC of random directions, mean of 20; {NO_LAYER}"),
        "random_auroc_high": Measure(CL, "1", f"the largest of them; {NO_LAYER}"),
        "task_accuracy": Measure(
            CL,
            "1",
            f"balanced accuracy in the task: held-out rows for token labels, rows of the fit for text labels; {NO_LAYER}",
        ),
        "control_accuracy": Measure(
            CL, "1", f"balanced accuracy in the control task, on the same kind of rows; {NO_LAYER}"
        ),
        "selectivity": Measure(CL, "1", f"task_accuracy minus control_accuracy; {NO_LAYER}"),
        "codelength_bits": Measure(CL, "bits", f"online code of the labels given the rows; {NO_LAYER}"),
        "compression": Measure(CL, "1", f"number of rows (one bit each) over codelength_bits; {NO_LAYER}"),
        "strength": Measure(CL, "1", f"C of the probe, median over folds; {NO_LAYER}"),
        **_compared("auroc", "AUROC"),
        "base_rate": Measure(C, "share of rows", "rows of the positive class"),
        "predicted": Measure((*CL, "bin"), "1", "mean probability of a bin; NaN for an empty one"),
        "observed": Measure((*CL, "bin"), "1", "share of positive rows of a bin; NaN for an empty one"),
        "count": Measure((*CL, "bin"), "rows", f"rows of a bin; {NO_LAYER}"),
        "predicted_calibrated": Measure((*CL, "bin"), "1", "`predicted` after temperature; NaN for an empty bin"),
        "observed_calibrated": Measure((*CL, "bin"), "1", "`observed` after temperature; NaN for an empty bin"),
    }

    def _more(self, at: xr.Dataset, result: Result) -> Mapping[str, plots.Drawing]:
        best = at.sel(layer=int(at["chosen_layer"]))
        about, where = self._about(at, result), f"{at['case'].item()}, layer {int(best['layer'])}"
        before, after = round(float(best["ece"]), 4), round(float(best["ece_calibrated"]), 4)
        pairs = {
            "as fitted": (best["predicted"].values, best["observed"].values),
            "after temperature": (best["predicted_calibrated"].values, best["observed_calibrated"].values),
        }
        figures: dict[str, plots.Drawing] = {
            "calibration": plots.scatter(
                pairs,
                title=f"{where}: probabilities are off by {fmt(before)} on average, by {fmt(after)} after temperature.",
                unit="1",
                x_quantity="mean probability of the positive class",
                y_quantity="share of positive rows",
                diagonal="calibrated",
                caption=f"{about} A point is one of 15 bins of equal width; empty bins are left out. Held-out rows.",
                alt="Share of positive rows against mean probability in 15 bins, before and after temperature.",
            )
        }
        if at.sizes["layer"] > 1:
            figures["codelength"] = plots.lines(
                {"compression": at["compression"]},
                title=f"{where}: the rows compress the labels {fmt(float(best['compression']))} times.",
                unit="1",
                quantity="compression",
                reference=(1.0, "no gain"),
                caption=f"{about} One bit for each row, over the length of the online code in bits.",
                alt="Compression of the labels by the online code at every layer.",
            )
        return figures


class NumberProbes(Sweep):
    """Where in the model can a linear probe read a number?

    Question:
        At which layers is a number linearly readable from the activations of held-out prompts, and is that more than token
        ids, the embedding and chance give?

    Method:
        Rows are split by prompt into outer folds. In each training part features are standardised and ridge regression is
        fitted, alpha from 0.1 to 1e5 having the least squared error over five inner folds by prompt. R² = 1 − squared
        error / squared error of the training part's mean, over all held-out rows; below 0 where the probe is worse than
        that mean. The layer reported first is chosen inside each outer fold.

    Null:
        As for linear-probes: a permutation test of a least-squares probe with labels exchanged between prompts, shuffled
        labels (mean of 3), random directions, a probe of token ids, one of the embedding.

    Known failure modes:
        A few extreme numbers carry R²; look at ranks or logarithms too. What a probe reads the model need not use.

    References:
        Gurnee and Tegmark 2023, Language Models Represent Space and Time, arXiv 2310.02207.
    """

    name = "linear-probes-of-numbers"
    title = "Linear probes of numbers"
    value, words, unit, nothing, draws_level = "r2", "R²", "R²", 0.0, "the mean"
    measures = {
        "r2": Measure(CL, "1", f"1 − squared error over that of the training mean, held-out rows; {NO_LAYER}"),
        **_interval("r2", CL, "r2"),
        **TESTED,
        "shuffled_r2": Measure(CL, "1", f"R² with numbers exchanged between prompts, mean of 3; {NO_LAYER}"),
        "random_r2": Measure(CL, "1", f"R² of a line through one random direction, mean of 20; {NO_LAYER}"),
        "random_r2_high": Measure(CL, "1", f"the largest of them; {NO_LAYER}"),
        "strength": Measure(CL, "1", f"alpha of the probe, median over folds; {NO_LAYER}"),
        **_compared("r2", "R²"),
        "spread": Measure(C, "units of the number", "standard deviation of the numbers"),
    }

    def _tells(self, result: Result) -> str:
        return "reads the number"

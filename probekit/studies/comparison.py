"""What runs have in common and in what they differ, as a result like any other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Measure, Result, fmt

NAME = "comparison"
_WORDS = ("row_analysis", "row_title", "quantity", "unit", "facet", "held", "run", "n_unit", "null_meaning", "side")
_NUMBERS = {"value": "the number", "low": "lower end of its 95 % interval; NaN if it has none",
            "high": "upper end of its 95 % interval; NaN if it has none", "null": "its null", "n": "resampled units"}  # fmt: skip


class Comparison(Analysis):
    """What do several runs find, side by side, and where do they differ?

    Question:
        Which numbers change with the model, with the texts or with a parameter, by more than their intervals?

    Method:
        Two runs are compared where they differ in one facet of their manifests alone: model, texts, a
        parameter, chat template, dtype. Another model may bring its own tokenizer, dtype and attention
        kernel. Findings are about the same quantity where analysis, unit, null and quantity are the same.
        Each run of a group is held against the first. The interval of a difference adds the variances that
        the two 95 % intervals imply, and is widened to hold for all differences of the page together
        (Bonferroni). Numbers whose unit is not the same for both models are shown without a difference:
        nats where the tokenizers differ, blocks where depths differ, raw activations.

    Null:
        No difference.

    Known failure modes:
        Both runs are taken as independent. Where they read the same texts they usually are not, and the
        interval of the difference is then too wide rather than too narrow for positively related numbers.
        Intervals of shares near 0 or 1 are not symmetric; the variance is that of half their width.
        A place that a run chose for itself, such as its strongest head, need not be the other's.

    References:
        None; each quantity has that of its analysis.
    """

    name, title = NAME, "Runs side by side"
    measures = {
        **{word: Measure(("case",), "1", f"{word.replace('_', ' ')} of each row, in words") for word in _WORDS},
        **{name: Measure(("case",), "unit of the row", text) for name, text in _NUMBERS.items()},
        "group": Measure(("case",), "1", "rows of one group are of the same quantity; the first is what others are held against"),
    }  # fmt: skip

    def remarks(self, result: Result) -> Sequence[str]:
        """What else agrees, what differs along with what was compared, and what was not compared and why."""
        told, others = _told(result.dataset), dict.fromkeys(g.name for g in _groups(result.dataset) if not g.side)
        quiet = [name for name in others if name not in {g.name for g, _ in told}]
        agree = [f"No difference beyond the intervals either in: {'; '.join(quiet)}."] if quiet else []
        return [*agree, *json.loads(result.dataset.attrs.get("remarks", "[]"))]

    def findings(self, result: Result) -> list[Finding]:
        """The main quantity of every analysis, and each in which runs differ: every run against the first."""
        found = [f for _, differences in _told(result.dataset) for f in differences]
        return sorted(found, key=lambda f: not _beyond(f))

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Bars with intervals of what the findings are about, and of main quantities without a difference."""
        return {f"group_{g.number}": g.draw() for g, _ in _told(result.dataset)}


@dataclass(frozen=True)
class _Rows:
    """One quantity in several runs."""

    number: int
    title: str
    quantity: str
    unit: str
    facet: str
    held: str
    side: str
    runs: list[str]
    table: np.ndarray  # value, low, high, null, n by run
    n_unit: str
    null_meaning: str

    @property
    def name(self) -> str:
        return self.quantity or f"{self.unit}, against {self.null_meaning}"

    def differences(self, count: int) -> Iterator[Finding]:
        """Every run against the first, with intervals that hold for `count` differences together."""
        if self.side:
            return
        value, low, high, _, n = self.table
        z = NormalDist().inv_cdf(1 - 0.025 / max(1, count))
        for i in range(1, len(self.runs)):
            change = float(value[i] - value[0])
            spread = np.hypot(high[i] - low[i], high[0] - low[0]) / (2 * NormalDist().inv_cdf(0.975))
            known = bool(np.isfinite(spread))
            ends = (change - z * float(spread), change + z * float(spread)) if known else None
            verdict = "no interval" if ends is None else "beyond" if ends[0] > 0 or ends[1] < 0 else "within"
            said = {
                "no interval": "; one of them has no interval",
                "beyond": "",
                "within": "; the intervals allow for no difference",
            }[verdict]
            claim = (
                f"{self.title} ({self.held}), {self.name}: {fmt(float(value[i]))} with {self.runs[i]}, "
                f"{fmt(float(value[0]))} with {self.runs[0]}{said}."
            )
            yield Finding(
                claim, change, self.unit, 0.0, f"no difference; interval for {count} differences together",
                ends, int(min(n[0], n[i])) if known else 1, self.n_unit,
                {"runs": [self.runs[i], self.runs[0]], "by": self.facet}, quantity=f"difference of {self.name}",
            )  # fmt: skip

    def draw(self) -> plots.Figure:
        value, low, high, null, n = self.table
        known = {run: (float(a), float(b)) for run, a, b in zip(self.runs, low, high, strict=True) if np.isfinite(a)}
        same_null = np.isfinite(null[0]) and np.allclose(null, null[0])
        return plots.bars(
            dict(zip(self.runs, map(float, value), strict=True)),
            title=f"{self.title}: {self.name}",
            unit=self.unit,
            by=self.facet,
            quantity=self.quantity or None,
            intervals=known if len(known) == len(self.runs) else None,
            reference=(float(null[0]), f"null: {self.null_meaning}") if same_null and null[0] else None,
            caption=f"{self.held}. Whiskers: 95 % intervals of each run by itself; n = "
            f"{', '.join(f'{int(k):,}' for k in n)} {self.n_unit}."
            + (f" Null: 0 ({self.null_meaning})." if same_null and not null[0] else "")
            + ("" if same_null else f" Nulls ({self.null_meaning}): {', '.join(map(fmt, map(float, null)))}.")
            + (f" No difference is stated: {self.side}." if self.side else ""),
            alt=f"Bars of {self.name} by {self.facet}.",
        )


def _told(data: xr.Dataset) -> list[tuple[_Rows, list[Finding]]]:
    """The quantities that a report speaks of, with their differences; intervals hold for all, told or not."""
    groups = list(_groups(data))
    count = sum(len(g.runs) - 1 for g in groups if not g.side)
    found, seen = [], set()
    for g in groups:
        differences, kind = list(g.differences(count)), (g.title, g.facet, g.held)
        if kind not in seen or any(map(_beyond, differences)):
            found.append((g, differences))
        seen.add(kind)
    return found


def _beyond(finding: Finding) -> bool:
    """Whether the interval of a difference leaves out zero."""
    return finding.ci95 is not None and (finding.ci95[0] > 0 or finding.ci95[1] < 0)


def _groups(data: xr.Dataset) -> Iterator[_Rows]:
    group = data["group"].values
    for number in dict.fromkeys(group.tolist()):
        rows = data.isel(case=group == number)
        word = {name: str(rows[name].values[0]) for name in _WORDS}
        yield _Rows(
            int(number), word["row_title"], word["quantity"], word["unit"], word["facet"], word["held"], word["side"],
            [str(r) for r in rows["run"].values], np.stack([rows[n].values.astype(float) for n in _NUMBERS]),
            word["n_unit"], word["null_meaning"],
        )  # fmt: skip


def table_of(rows: Sequence[dict[str, object]], remarks: Sequence[str]) -> xr.Dataset:
    """The dataset of `comparison`: a row for each quantity of each run."""
    words = {w: ("case", np.array([str(r[w]) for r in rows], dtype=object)) for w in _WORDS}
    numbers = {n: ("case", np.array([r[n] for r in rows], dtype=float)) for n in _NUMBERS}
    group = {"group": ("case", np.array([r["group"] for r in rows], dtype=np.int64))}
    return xr.Dataset({**words, **numbers, **group}, attrs={"remarks": json.dumps(list(remarks), ensure_ascii=False)})

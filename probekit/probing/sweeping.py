"""Linear probes at every layer, with every control beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from probekit.analysis import Result
from probekit.core import InputError, Point
from probekit.engine import Step

from .baselines import bag_of_tokens
from .collected import Collected
from .measuring import N_BINS, adjusted
from .study import LinearProbes, NumberProbes
from .targets import Case, Target, cases_of, target_of
from .tasks import Classes, Fitted, Numbers, Settings, Task, chosen_inside

if TYPE_CHECKING:
    import xarray as xr

    from probekit.engine import Listener


def sweep(
    collected: Collected,
    labels: Sequence[Any] | None = None,
    *,
    points: Any = None,
    positive: Any = None,
    by_position: bool = False,
    n_folds: int = 5,
    n_permutations: int = 1000,
    seed: int = 0,
    progress: bool | Listener = True,
) -> Result:
    """Probe every layer of a collection, with splits by prompt and every control beside the figures.

    Two classes are told apart by `LogisticProbe`, numbers are predicted by `RidgeProbe`; strength and temperature are
    chosen inside the training prompts. Prompts are those of the collection: there is no other split. Thirty layers of
    400 rows and 576 features take about half a minute on one processor.

    Args:
        collected: the rows.
        labels: one for each text or for each row; those that came with the texts if None.
        points: which points; every one but the token embedding if None.
        positive: the class that is told from the rest; the second in ascending order if None. Numbers with more than
            two values are regressed on if it is None.
        by_position: probe each position that was collected by itself.
        n_folds: outer folds.
        n_permutations: of the labels, for p-values; Bonferroni's correction over n tests cannot go below n / (1 + this).
        seed: of splits, resampling and controls.
        progress: show a bar where standard error is a terminal; or a function that is told of every `Step`.

    Returns:
        A result of `linear-probes`, or of `linear-probes-of-numbers`.

    Raises:
        InputError: labels do not fit, there is one class, or there are fewer prompts than folds.

    Example:
        >>> result = sweep(collect("smollm2-135m-instruct", texts, labels=labels))  # doctest: +SKIP
        >>> result["auroc"].sel(case="resid_post").values  # doctest: +SKIP
    """
    target = target_of(collected, labels, positive)
    analysis: Any = LinearProbes() if target.classes else NumberProbes()
    values = {"n_folds": n_folds, "n_permutations": n_permutations, "seed": seed}
    params = analysis.Params.parse(values, analysis.name)
    settings = Settings(n_folds=n_folds, n_permutations=n_permutations, seed=seed)
    cases = cases_of(collected, points, by_position=by_position)
    tasks = [_task(collected, case, target, settings) for case in cases]  # refuses before anything is fitted
    total = sum(len(case.layers) for case in cases)
    layers = sorted({layer for case in cases for layer in case.layers})
    found = _empty(analysis.measures, len(cases), len(layers))
    with _Ticks(total, progress) as ticks:
        for c, (case, task) in enumerate(zip(cases, tasks, strict=True)):
            fitted = []
            for layer in case.layers:
                fitted.append(task.examine(case.matrix(collected, layer)))
                _put(found, (c, layers.index(layer)), fitted[-1])
                ticks()
            _put_case(found, c, _baselines(collected, case, target, task, fitted))
    found["p_bonferroni"], found["p_bh"] = adjusted(found["p_value"])
    data = _dataset(found, analysis, cases, layers)
    data.attrs |= {"positive": target.positive, "negative": target.negative, "of_text": int(target.of_text)}
    return Result(analysis, params, analysis.check(data), provenance_of(collected))


def _task(collected: Collected, case: Case, target: Target, settings: Settings) -> Task:
    numbers, rows = collected.about.numbers, case.rows
    y = target.values[rows]
    if len(np.unique(y)) < 2:
        raise InputError(f"{case.name}: all its {len(rows)} rows have the label {y[0]!r}.")
    keys = numbers["text" if target.of_text else "token_id"][rows]
    kind = Classes if target.classes else Numbers
    return kind(
        y,
        collected.groups[rows],
        numbers["text"][rows],
        keys,
        of_text=target.of_text,
        settings=settings,
        name=case.name,
    )


def _baselines(
    collected: Collected, case: Case, target: Target, task: Task, fitted: Sequence[Fitted]
) -> dict[str, float]:
    """Figures of a case: the layer chosen inside the folds, and it against what sees no layer."""
    scores, place = chosen_inside(fitted, task.tests)
    value = task.value
    seen = {"chosen": scores, "bag": task.fit(bag_of_tokens(collected, case.rows, own_token=not target.of_text)).scores}
    if "embed" in collected.arrays:
        seen["embedding"] = task.fit(collected.matrix(Point("embed"))[case.rows]).scores
    figures: dict[str, float] = {
        "chosen_layer": float(case.layers[int(np.bincount(place).argmax())]),
        "n_rows": float(len(case.rows)),
        "n_groups": float(len(np.unique(task.groups))),
        "base_rate" if target.classes else "spread": float(task.y.mean() if target.classes else task.y.std()),
    }
    for name, own in seen.items():
        it = task.bounds(own)
        figures |= {f"{name}_{value}": it.value, f"{name}_low": it.low, f"{name}_high": it.high}
        if name != "chosen":
            it = task.beyond(scores, own)
            figures |= {f"over_{name}": it.value, f"over_{name}_low": it.low, f"over_{name}_high": it.high}
    return figures


def _empty(measures: Any, n_cases: int, n_layers: int) -> dict[str, np.ndarray]:
    sizes = {"case": n_cases, "layer": n_layers, "bin": N_BINS}
    return {name: np.full([sizes[d] for d in m.dims], np.nan) for name, m in measures.items()}


def _put(found: dict[str, np.ndarray], place: tuple[int, int], fitted: Fitted) -> None:
    for name, value in (fitted.figures | fitted.curves).items():
        if name in found:
            found[name][place] = value


def _put_case(found: dict[str, np.ndarray], case: int, figures: dict[str, float]) -> None:
    for name, value in figures.items():
        found[name][case] = value


def _dataset(found: dict[str, np.ndarray], analysis: Any, cases: Sequence[Case], layers: Sequence[int]) -> xr.Dataset:
    import xarray as xr

    coords: dict[str, Any] = {"case": np.asarray([c.name for c in cases], dtype=object), "layer": list(layers)}
    if any("bin" in m.dims for m in analysis.measures.values()):
        coords["bin"] = (np.arange(N_BINS) + 0.5) / N_BINS
    return xr.Dataset({n: (m.dims, found[n]) for n, m in analysis.measures.items()}, coords=coords)


def provenance_of(collected: Collected) -> dict[str, Any]:
    """What fixes the numbers of a result: model, texts, positions."""
    left_out = ("format", "version", "complete", "sites")
    return {k: v for k, v in collected.manifest.items() if k not in left_out}


class _Ticks:
    """A bar, or a listener, that is told of each probe."""

    def __init__(self, total: int, progress: bool | Listener) -> None:
        self._total, self._done = total, 0
        self._listener: Callable[[Step], None] | None = progress if callable(progress) else None
        self._bar: Any = tqdm(total=total, desc="probes", unit="layer", disable=None if progress is True else True)

    def __call__(self) -> None:
        self._done += 1
        self._bar.update()
        if self._listener is not None:
            self._listener(Step("probing layers", self._done, self._total, "layers"))

    def __enter__(self) -> _Ticks:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

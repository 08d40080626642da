"""Laying results side by side, where their manifests allow it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from probekit.analysis import Finding, Result, load_results
from probekit.core import InputError

from .comparison import Comparison, table_of
from .facets import MODEL, TEXTS, TOKENIZER, Group, Run, differing, groups_of, not_compared, run_of

Key = tuple[str, str, str, str, int]


def compare(runs: Mapping[str, Any] | Iterable[Any]) -> Result:
    """Several runs side by side: the same quantities in each, the differences, and what may not be compared and why.

    Two runs are compared where they differ in one thing alone, as their manifests tell: model, texts, a parameter, chat
    template, dtype. All others are named in `Result.analysis.remarks(result)`, which reports and notebooks show.

    Args:
        runs: results of `run` or `load_result`, or folders that `report` or `probekit run --out` wrote; a mapping
            names the corpus of each.

    Returns:
        A result with findings, figures and `dataset` as any other; `report` takes it.

    Raises:
        InputError: fewer than two runs that differ.
        StoreError: a folder holds no results.

    Example:
        >>> compare([run_on_gpt2, run_on_smollm2]).findings  # doctest: +SKIP
    """
    named = runs.items() if isinstance(runs, Mapping) else [("", r) for r in runs]
    found = [run_of(result, corpus=str(name)) for name, given in named for result in _results(given)]
    return comparison_of(found)


def _results(given: Any) -> list[Result]:
    if isinstance(given, Result):
        return [given]
    if isinstance(given, Mapping):
        return list(given.values())
    if isinstance(given, (str, Path)):
        return list(load_results(given).values())
    raise InputError(
        f"Found {type(given).__name__} where a result is needed. Give results of run or load_result, or their folders."
    )


def comparison_of(runs: Sequence[Run], remarks: Iterable[str] = ()) -> Result:
    """The comparison of runs whose labels and facets are known.

    Raises:
        InputError: fewer than two runs that differ.
    """
    runs = _distinct(runs)
    if len(runs) < 2:
        raise InputError(f"A comparison needs at least two runs that differ; found {len(runs)}.")
    notes, rows = list(remarks), list[dict[str, Any]]()
    for group in groups_of(runs):
        keyed = [_by_quantity(run.result.findings) for run in group.runs]
        common = [key for key in keyed[0] if all(key in other for other in keyed)]
        for key in common:
            side = _not_the_same_unit(group, key)
            number = rows[-1]["group"] + 1 if rows else 0
            rows += [_row(group, run, number, side, own[key]) for run, own in zip(group.runs, keyed, strict=True)]
        notes += [f"{group.runs[0].result.analysis.title}, {group.held}: {note}." for note in group.notes()]
        lacking = sum(len(own) - len(common) for own in keyed)
        if lacking:
            title = group.runs[0].result.analysis.title
            notes.append(
                f"{title}, {group.held}: {lacking} finding{'s' * (lacking != 1)} of some of the runs "
                f"{'have' if lacking > 1 else 'has'} no counterpart in the others, and {'are' if lacking > 1 else 'is'} "
                "in their own reports."
            )
    notes += not_compared(runs)
    return Result(Comparison(), Comparison.Params(), _checked(rows, notes), _provenance(runs))


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """Runs without repeats, such as those of an analysis that does not have the parameter that a study varies."""
    kept: list[Run] = []
    for run in runs:
        if not any(k.result.name == run.result.name and not differing(k, run) for k in kept):
            kept.append(run)
    return kept


def _checked(rows: Sequence[dict[str, Any]], notes: Sequence[str]) -> Any:
    return Comparison().check(table_of(rows, list(dict.fromkeys(notes))))


def _by_quantity(findings: Sequence[Finding]) -> dict[Key, Finding]:
    """Findings by what they are about; several of the same kind are told apart by their order."""
    seen: Counter[tuple[str, ...]] = Counter()
    found = {}
    for f in findings:
        kind = (f.quantity, f.unit, "" if f.quantity else f.null_meaning, str(f.where.get("case", "")))
        found[(*kind, seen[kind])] = f
        seen[kind] += 1
    return found


def _not_the_same_unit(group: Group, key: Key) -> str:
    """Why numbers of this unit have no difference between the models of a group; "" if they have."""
    if group.facet != MODEL:
        return ""
    unit = key[1]
    tokenizers = {r.facet(TOKENIZER).key for r in group.runs}
    depths = {r.result.provenance.get("model", {}).get("n_layers") for r in group.runs}
    if len(tokenizers) > 1 and ("nats" in unit or "bits" in unit or "perplexity" in unit):
        return "it is per token, and the tokenizers cut the same text differently"
    if len(depths) > 1 and unit.split(" ")[0] in ("layer", "layers", "block", "blocks", "heads"):
        return f"the models have {' and '.join(map(str, sorted(depths, key=str)))} blocks"
    if unit.split(" ")[0] == "activation":
        return "the scale of activations is each model's own"
    return ""


def _row(group: Group, run: Run, number: int, side: str, finding: Finding) -> dict[str, Any]:
    low, high = finding.ci95 or (np.nan, np.nan)
    return {
        "row_analysis": run.result.name,
        "row_title": run.result.analysis.title,
        "quantity": finding.quantity,
        "unit": finding.unit,
        "facet": group.facet,
        "held": group.held,
        "run": group.label(run),
        "n_unit": finding.n_unit,
        "null_meaning": finding.null_meaning,
        "side": side,
        "value": finding.value,
        "low": low,
        "high": high,
        "null": finding.null,
        "n": finding.n,
        "group": number,
    }


def _provenance(runs: Sequence[Run]) -> dict[str, Any]:
    """What fixes each run, in a line; the whole is in its own manifest."""
    return {"runs": {label: _line(run) for label, run in {run.label: run for run in runs}.items()}}


def _line(run: Run) -> str:
    weights = run.result.provenance.get("weights_hash", "")
    parts = [f"weights {str(weights).removeprefix('sha256:')[:12]}"] if weights else []
    parts += [f"{name} {run.facet(name).shown}" for name in ("dtype", "device", "backend") if run.facet(name).key]
    parts += [f"texts {run.facet(TEXTS).key.removeprefix('sha256:')[:12]}"] if run.facet(TEXTS).key else []
    return ", ".join([*parts, f"probekit {run.facet('version of probekit').shown}"])

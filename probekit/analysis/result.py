"""What an analysis found: labelled numbers, claims, figures; saves to and loads from Zarr."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.core import InputError, ProbekitError, StoreError, unknown
from probekit.core.storage import groups, read_group, replacing, write_group

from .contract import Analysis
from .finding import Finding
from .params import Params
from .registry import get_analysis

if TYPE_CHECKING:
    import xarray as xr

    from probekit.plots import Drawings


_SUMMARY = "summary"  # the part of a result that a streamed corpus adds


@dataclass(frozen=True)
class Result:
    """The outcome of one analysis on one model and some texts.

    Args:
        analysis: the analysis that computed it.
        params: the parameters it ran with.
        dataset: its variables, as declared in `analysis.measures`, with units in their attributes.
        provenance: model, tokens, versions, plan.
        merged: statistics of a corpus that was streamed. Token and text axes of the dataset are then those of the
            texts that are shown; what has neither is about the whole corpus.
    """

    analysis: Analysis
    params: Params
    dataset: xr.Dataset
    provenance: Mapping[str, Any] = field(default_factory=dict)
    merged: xr.Dataset | None = None

    @property
    def name(self) -> str:
        """The analysis' name."""
        return self.analysis.name

    def __getitem__(self, variable: str) -> xr.DataArray:
        """One variable of the dataset.

        Raises:
            UnknownName: the analysis measures nothing of this name.
        """
        if variable not in self.dataset:
            raise unknown(f"variable of {self.name}", variable, map(str, self.dataset.variables))
        return self.dataset[variable]

    @property
    def about(self) -> str:
        """Model and corpus in one line, for captions."""
        texts, model = self.provenance.get("texts", {}), self.provenance.get("model", {})
        n_texts, n_tokens = texts.get("n_texts", 0), texts.get("n_tokens", 0)
        if not n_texts:
            return f"{model.get('name', 'model')}."
        chat = " in the chat template" if texts.get("chat_template") else ""
        return f"{model.get('name', 'model')}, {n_texts} text{'s' * (n_texts != 1)}{chat}, {n_tokens:,} tokens."

    @property
    def about_shown(self) -> str:
        """`about`, and how many of the texts are shown where it is not all of them."""
        shown = self.provenance.get("texts", {}).get("shown") if self.merged is not None else None
        return f"{self.about} Shown: the first {shown} texts." if shown else self.about

    @cached_property
    def summary(self) -> xr.Dataset:
        """The analysis' `statistics` of all texts: merged over a streamed corpus, else made of the dataset."""
        return self.merged if self.merged is not None else self.analysis.summarise(self.dataset, self.params)

    @property
    def findings(self) -> list[Finding]:
        """Claims with value, unit, null, interval and n; most important first."""
        found = self.analysis.findings(self)
        return [Finding.from_dict(f.as_dict() | {"analysis": self.name}) for f in found]

    def figures(self) -> Drawings:
        """Figures (and token strips) by name; each renders itself in Jupyter, and saves itself for a paper."""
        from probekit.plots import Drawings

        return Drawings(self.analysis.draw(self))

    def save(self, path: str | Path) -> Path:
        """Write the result to a Zarr store at `path`, replacing a probekit result that is there.

        Raises:
            StoreError: `path` holds something else, or cannot be written.
        """
        return save_results({self.name: self}, path)

    def _repr_html_(self) -> str:
        from probekit.reporting import findings_html

        variables = ", ".join(
            f"<code>{html.escape(str(n))}</code> ({', '.join(map(str, a.dims))})"
            for n, a in self.dataset.data_vars.items()
        )
        return (
            f"<h3>{html.escape(self.analysis.heading(self))}</h3>{findings_html(self.findings)}"
            f"{self._remarks_html()}<p>variables of <code>.dataset</code>: {variables}</p>"
        )

    def _remarks_html(self) -> str:
        remarks = self.analysis.remarks(self)
        return f"<ul>{''.join(f'<li>{html.escape(r)}</li>' for r in remarks)}</ul>" if remarks else ""

    def __repr__(self) -> str:
        lines = [f"Result of {self.name} ({dict(self.dataset.sizes)})"]
        return "\n".join(
            [*lines, *(f"  {f.claim} [{f.evidence}]" for f in self.findings), *self.analysis.remarks(self)]
        )


class Results(Mapping[str, Result]):
    """Results of one run, by analysis name; shows every result in Jupyter."""

    def __init__(self, results: Mapping[str, Result]) -> None:
        self._results = dict(results)

    def __getitem__(self, name: str) -> Result:
        if name not in self._results:
            raise unknown("result", name, self._results)
        return self._results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    @property
    def findings(self) -> list[Finding]:
        """The findings of every result, in order."""
        return [f for r in self.values() for f in r.findings]

    def save(self, path: str | Path) -> Path:
        """Write every result to one Zarr store, a group each."""
        return save_results(self, path)

    def _repr_html_(self) -> str:
        return "".join(r._repr_html_() for r in self.values())

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.values()))


def save_results(results: Mapping[str, Result], path: str | Path) -> Path:
    """Write results to a Zarr store, one group each; nothing is left behind if it fails.

    Raises:
        StoreError: the path holds something that probekit did not write, or cannot be written.
    """
    with replacing(Path(path)) as folder:
        for name, result in results.items():
            attrs = {
                "analysis": result.name,
                "params": json.dumps(result.params.as_dict()),
                "provenance": json.dumps(dict(result.provenance), sort_keys=True),
            }
            write_group(result.dataset, folder, name, attrs)
            if result.merged is not None:
                write_group(result.merged, folder, f"{name}/{_SUMMARY}", {})
    return Path(path)


def load_results(path: str | Path) -> Results:
    """Every result of a Zarr store or of a run's folder.

    Raises:
        StoreError: there is no probekit result at this path, it is of a newer format, or damaged.
    """
    store, names = _store(Path(path))
    return Results({name: _read(store, name) for name in names})


def _store(path: Path) -> tuple[Path, list[str]]:
    """The Zarr store at a path, and the names of its results."""
    store = path / "results.zarr" if (path / "results.zarr").is_dir() else path
    names = groups(store)
    if not names:
        raise StoreError(
            f"No probekit results at {path}. Give the folder of a run (the one with report.html), "
            "its results.zarr, or a path that Result.save wrote."
        )
    return store, names


def load_result(path: str | Path, name: str | None = None) -> Result:
    """One saved result, with its figures and findings; needs no model and loads no torch.

    Args:
        path: what `Result.save` or `probekit run --out` wrote.
        name: the analysis, where the store holds several.

    Raises:
        StoreError: there is no probekit result at this path, or it is damaged.
        InputError: the store holds several results and `name` is missing, or it holds no such result.
    """
    store, names = _store(Path(path))
    if name is None:
        if len(names) > 1:
            raise InputError(f"{path} holds {len(names)} results; name one of: {', '.join(names)}.")
        name = names[0]
    if name not in names:
        raise unknown("result", name, names)
    return _read(store, name)


def _read(store: Path, group: str) -> Result:
    try:
        dataset, attrs = read_group(store, group)
        analysis = get_analysis(attrs["analysis"])
        ordered = dataset[list(analysis.measures)]
        params = analysis.Params.parse(json.loads(attrs["params"]), analysis.name)
        streamed = (store / group / _SUMMARY).is_dir()
        merged = read_group(store, f"{group}/{_SUMMARY}")[0] if streamed else None
        return Result(analysis, params, analysis.check(ordered), json.loads(attrs["provenance"]), merged)
    except ProbekitError:
        raise
    except Exception as error:  # whatever a library makes of missing or changed bytes
        raise StoreError(
            f"{store} is damaged, or of another version of probekit: its part {group!r} cannot be read "
            f"({type(error).__name__}: {str(error)[:200]}). Run the analysis again, or restore the folder."
        ) from error

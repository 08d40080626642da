"""Models × corpora × parameters: one run for each combination, then one report of them all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from probekit.analysis import Result, Results, load_results
from probekit.api import make_jobs, plan, report, run
from probekit.batches import source_digest
from probekit.core import Cancelled, InputError, Model, ProbekitError, StoreError
from probekit.engine import Plan
from probekit.texts import read_texts

from .comparing import comparison_of
from .facets import run_of

_FINGERPRINT = "study"  # the key of a run's manifest under which its cell is spelled


@dataclass(frozen=True)
class Cell:
    """One combination of a study.

    Args:
        model: the name that a table gives the model.
        corpus: the name of the corpus; "" in a study without texts.
        params: values of what is varied.
    """

    model: str
    corpus: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(self.label)

    @property
    def label(self) -> str:
        """Its name in tables."""
        varied = [f"{name} = {value}" for name, value in self.params.items()]
        return ", ".join([self.model, *([self.corpus] if self.corpus else []), *varied])

    @property
    def folder(self) -> str:
        """Its name as a folder."""
        return re.sub(r"[^A-Za-z0-9.=_-]+", "-", self.label.replace(" = ", "=")).strip("-.") or "run"


@dataclass(frozen=True)
class StudyPlan:
    """What a study would do.

    Args:
        name: of the study.
        cells: every combination, with the plans of its first round; None where it is done already, an error where it cannot run.
    """

    name: str
    cells: Mapping[Cell, Sequence[Plan] | ProbekitError | None]

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.cells)} run{'s' * (len(self.cells) != 1)}"]
        for cell, found in self.cells.items():
            if found is None:
                said = "done already"
            elif isinstance(found, ProbekitError):
                said = f"cannot run: {found}"
            else:
                said = _cost(found)
            lines.append(f"  {cell.label:<40} {said}")
        return "\n".join(lines)


def _cost(plans: Sequence[Plan]) -> str:
    if not plans:
        return "no pass that can be planned beforehand"
    most, passes = max(plans, key=lambda p: p.peak_bytes), sum(p.passes for p in plans)
    return (
        f"{most.n_texts:,} texts, {most.n_tokens:,} tokens, {'1 pass' if passes == 1 else f'about {passes:,} passes'}, "
        f"{most.peak_bytes / 2**20:,.0f} MiB above the model, {most.gflop:,.0f} GFLOP in the first pass"
    )


@dataclass(frozen=True)
class Study:
    """A grid of runs with one report.

    Every combination of model, corpus and varied parameters is one run: all analyses in the same passes. Runs are kept
    in the study's folder as they end, so that a study that broke off goes on with those that are missing, and one that
    was widened runs only what is new.

    Args:
        name: of the study and its report.
        analyses: names of analyses.
        models: what `open_model` takes, by the name a table gives it; or a list of names.
        corpora: texts as `run` takes them, or a .txt, .jsonl or .csv file, by the name a table gives them; empty for
            analyses that need no texts.
        params: parameters that are the same in every run, as `run` takes them.
        vary: values of parameters that are varied, by name.
        how: `bos`, `chat`, `window`, `opening`, `memory_limit` and `models` (further models by role), as `run` takes them.

    Example:
        >>> study = Study("sinks", ["attention-sinks"], ["gpt2", "owner/model"], {"news": "news.jsonl"})
        >>> print(study.plan())  # doctest: +SKIP
        >>> study.run("reports/sinks")  # doctest: +SKIP
    """

    name: str
    analyses: Sequence[str]
    models: Mapping[str, Any] | Sequence[Any]
    corpora: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    vary: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    how: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.models, str) or not len(self.models):
            raise InputError(f"A study needs a list of models, or models by name; found {self.models!r}.")
        for name, values in self.vary.items():
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise InputError(f"vary has a list of values for each parameter; found {name}={values!r}.")
        both = sorted(set(self.vary) & set(self.params))
        if both:
            raise InputError(f"{', '.join(both)} is varied and given a value; leave it out of one of them.")
        folders = [cell.folder.lower() for cell in self.cells]
        twice = next((c.label for c in self.cells if folders.count(c.folder.lower()) > 1), None)
        if twice:
            raise InputError(f"Two runs of the study would be called {twice!r}. Give models and corpora other names.")
        for cell in self.cells:
            make_jobs(list(self.analyses), {**self.params, **cell.params})

    @property
    def named_models(self) -> dict[str, Any]:
        """What `open_model` takes, by name."""
        if isinstance(self.models, Mapping):
            return dict(self.models)
        return {str(getattr(getattr(m, "info", None), "name", m)): m for m in self.models}

    @property
    def cells(self) -> list[Cell]:
        """Every combination, model by model."""
        varied = [dict(zip(self.vary, values, strict=True)) for values in product(*self.vary.values())]
        return [Cell(m, c, v) for m in self.named_models for c in (self.corpora or ("",)) for v in varied]

    def plan(self, folder: str | Path | None = None) -> StudyPlan:
        """What every run would cost; loads tokenizers but no weights.

        Args:
            folder: of the study, if some of it has been run already.
        """
        found: dict[Cell, Sequence[Plan] | ProbekitError | None] = {}
        for cell, model in self._opened():
            try:
                if folder is not None and self._kept(Path(folder), cell, model) is not None:
                    found[cell] = None
                    continue
                how = {k: v for k, v in self.how.items() if k != "models"}
                plans = plan(list(self.analyses), model, self._texts(cell), **how, **{**self.params, **cell.params})
                found[cell] = plans
            except ProbekitError as error:
                found[cell] = error
        return StudyPlan(self.name, found)

    def run(self, folder: str | Path, *, progress: Any = True) -> StudyRun:
        """Run what is missing, and keep each run as it ends.

        A run that cannot be made is told of at the end, and does not keep the others from running.

        Args:
            folder: where runs and report go.
            progress: as in `run`.

        Raises:
            ProbekitError: not one of the runs could be made; the first error.
        """
        root, done, failed = Path(folder), {}, {}
        for cell, model in self._opened():
            try:
                kept = self._kept(root, cell, model)
                if kept is None:
                    kept = self._made(root, cell, model, progress)
                done[cell] = kept
            except Cancelled:
                raise
            except ProbekitError as error:
                failed[cell] = error
        if failed and not done:
            raise next(iter(failed.values()))
        return StudyRun(self, root, done, failed)

    def _opened(self) -> Iterator[tuple[Cell, Any]]:
        """Every combination with its model, which is opened once; what cannot be opened is given as it was."""
        from probekit.models import open_model

        opened: tuple[str, Any] = ("", None)
        for cell in self.cells:
            if opened[0] != cell.model:
                spec = self.named_models[cell.model]
                try:
                    opened = (cell.model, open_model(spec, lazy=True))
                except ProbekitError:
                    opened = (cell.model, spec)
            yield cell, opened[1]

    def _texts(self, cell: Cell) -> Any:
        texts = self.corpora.get(cell.corpus)
        return read_texts(texts) if isinstance(texts, (str, Path)) else texts

    def _spelled(self, cell: Cell, model: Model) -> dict[str, Any]:
        """What must be the same for a kept run to stand for this combination."""
        jobs = make_jobs(list(self.analyses), {**self.params, **cell.params})
        told = {k: v for k, v in self.how.items() if k not in ("memory_limit", "models")}
        spelled = {
            "analyses": {job.analysis.name: job.params.as_dict() for job in jobs},
            "source": source_digest(self._texts(cell)),
            "how": told | {"models": {r: str(m) for r, m in dict(self.how.get("models") or {}).items()}},
            "model": [model.info.name, model.info.dtype, model.info.revision or _stamp(model)],
        }
        return json.loads(json.dumps(spelled, default=str))

    def _kept(self, root: Path, cell: Cell, model: Any) -> Results | None:
        """The run of this combination, if the folder holds it."""
        from probekit._version import __version__
        from probekit.models import open_model

        place = root / "runs" / cell.folder
        if not (place / "manifest.json").is_file():
            return None
        results = load_results(place)
        told = next(iter(results.values())).provenance
        same = told.get(_FINGERPRINT) == self._spelled(cell, open_model(model, lazy=True))
        return results if same and told.get("probekit") == __version__ else None

    def _made(self, root: Path, cell: Cell, model: Any, progress: Any) -> Results:
        from probekit.models import open_model

        opened = open_model(model, lazy=True)
        how = dict(self.how)
        if any(job.analysis.writes for job in make_jobs(list(self.analyses), {**self.params, **cell.params})):
            root.mkdir(parents=True, exist_ok=True)
            how.setdefault("journal", root / f"{cell.folder}.jsonl")
        results = run(
            list(self.analyses), opened, self._texts(cell), progress=progress, **how, **{**self.params, **cell.params}
        )
        spelled = {_FINGERPRINT: self._spelled(cell, opened)}
        named = Results(
            {
                n: Result(r.analysis, r.params, r.dataset, {**r.provenance, **spelled}, r.merged)
                for n, r in results.items()
            }
        )
        report(named, root / "runs" / cell.folder)
        return named


def _stamp(model: Any) -> Any:
    """What tells the weights of a model without revision from others: its files, or, in memory, their hash."""
    folder = getattr(model, "folder", None)
    if folder is None:
        return model.provenance().get("weights_hash", "")
    files = sorted(p for p in Path(folder).iterdir() if p.is_file()) if Path(folder).is_dir() else [Path(folder)]
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]


@dataclass(frozen=True)
class StudyRun:
    """What a study found.

    Args:
        study: the study.
        folder: where its runs are kept.
        results: of each combination that ran.
        failed: why the others did not.
    """

    study: Study
    folder: Path
    results: Mapping[Cell, Results]
    failed: Mapping[Cell, ProbekitError]

    @property
    def comparison(self) -> Result | None:
        """All runs side by side; None where there is one."""
        runs = [
            run_of(result, label=cell.label, corpus=cell.corpus)
            for cell, results in self.results.items()
            for result in results.values()
        ]
        gone = [f"{cell.label}: not run. {error}" for cell, error in self.failed.items()]
        return comparison_of(runs, gone) if len(runs) > 1 else None

    def report(self, *tables: Result, shown: int = 1) -> Path:
        """Write the study's report: tables of its own first, then the comparison, then the first runs themselves.

        Args:
            tables: results that the study made of its runs, such as one with published numbers beside them.
            shown: how many of the runs are shown in full; all are in their own folders, under `runs`.

        Raises:
            StoreError: the folder cannot be written.
        """
        side = self.comparison
        parts = [*tables, *([side] if side is not None else [])]
        for results in list(self.results.values())[:shown]:
            parts += [r for r in results.values() if r.name not in {p.name for p in parts}]
        if not parts:
            raise StoreError("The study has no results to report.")
        return report(parts, self.folder, title=self.study.name, subtitle=self._about())

    def _about(self) -> str:
        """How many runs there are, and of what."""
        counts = {"model": len(self.study.named_models), "corpus": len(self.study.corpora)}
        counts |= {f"value of {name}": len(values) for name, values in self.study.vary.items()}
        said = " × ".join(f"{n} {_plural(what, n)}" for what, n in counts.items() if n)
        failed = f", {len(self.failed)} of which could not be made" if self.failed else ""
        n = len(self.results) + len(self.failed)
        shown = next(iter(self.results)).label
        where = f" In full below: {shown}. All are in the folder runs." if n > 1 else ""
        return f"{n} {_plural('run', n)}: {said}{failed}.{where}"


def _plural(what: str, n: int) -> str:
    if n == 1:
        return what
    return (
        "corpora"
        if what == "corpus"
        else what.replace("value", "values", 1)
        if what.startswith("value")
        else f"{what}s"
    )

"""The contract of an analysis: say what to see, be sent what was seen, return labelled numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from probekit.core import Batch, ModelInfo, Request, Trace, check_axes

from .finding import Finding
from .params import Params

if TYPE_CHECKING:
    import xarray as xr

    from probekit.plots import Drawing

    from .result import Result

P = TypeVar("P", bound=Params)
Flow = Generator[Request, Any, "xr.Dataset"]  # is sent a Trace for a Forward, Branches for a Branch


@dataclass(frozen=True)
class Measure:
    """What one variable of a result means.

    Args:
        dims: its axes, from `probekit.core.AXES`.
        unit: its unit, such as "nats"; "1" for a pure number.
        help: what it answers, in one sentence, weighting and masking included.
    """

    dims: tuple[str, ...]
    unit: str
    help: str

    def __post_init__(self) -> None:
        check_axes(self.dims, f"the measure {self.help!r}")


Combine = Literal["sum", "max", "tally", "best"]


@dataclass(frozen=True)
class Statistic:
    """A number of some texts that, combined with that of other texts, is the number of all of them.

    Args:
        dims: its axes, from `probekit.core.AXES`; neither token nor text, so that it is as large for any number of texts.
        help: what it is, in one sentence.
        combine: how two become one: "sum" or "max" of arrays; "tally" adds the counts of a dictionary; "best" keeps the
            dictionary with the larger `value`, the earlier one where they tie.
    """

    dims: tuple[str, ...]
    help: str
    combine: Combine = "sum"

    def __post_init__(self) -> None:
        check_axes(self.dims, f"the statistic {self.help!r}")
        if {"token", "text"} & set(self.dims):
            raise ValueError(f"the statistic {self.help!r} grows with the texts: {self.dims}")


class Analysis:
    """One phenomenon. Subclass it in one file of `probekit/phenomena`, decorate it with `register`.

    The common case overrides `observe` and `compute`. An analysis that needs a second look at the
    model overrides `flow` instead: a generator that yields requests and is sent traces. An analysis
    never touches a model, keeps no state, and gives the same answer for the same traces.

    The docstring of a subclass has the sections Question, Method, Null, Known failure modes and
    References.

    Attributes:
        name: kebab-case name, for the command line and the report.
        title: the same in words.
        measures: every variable that `compute` returns, with axes, unit and meaning.
        Params: a frozen dataclass of parameters.
        intervenes: whether it changes activations, in many passes and on texts chosen for it; such an
            analysis runs when it is named, not as part of "all".
        writes: whether it lets the model write on, which takes minutes; its texts are prompts, and it runs when it is
            named, too.
        roles: further models that it needs beside the one under study, such as ("base",).
        reads_texts: whether it looks at texts; one that looks at weights, vocabularies or sentences of its own runs
            when it is named, and needs none.
        statistics: what `summarise` returns. An analysis that has some makes its findings of nothing else, and can
            therefore be run over a corpus of any size, shard by shard.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    measures: ClassVar[Mapping[str, Measure]]
    intervenes: ClassVar[bool] = False
    writes: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = ()
    reads_texts: ClassVar[bool] = True
    statistics: ClassVar[Mapping[str, Statistic]] = {}
    Params: ClassVar[type[Params]] = Params

    def min_tokens(self, params: Any) -> int:
        """The shortest text, in tokens, on which this analysis means something."""
        return 2

    def check_texts(self, params: Any, batch: Batch) -> None:
        """Refuse, before anything runs, texts that this analysis cannot read, such as an odd one among pairs.

        Raises:
            TextError: says which text, what was found and what was expected.
        """

    def check_model(self, params: Any, info: ModelInfo, weights_hash: Callable[[], str]) -> None:
        """Refuse, before anything runs, a model that does not fit a parameter, such as a lens made for another one.

        Args:
            params: the parameters.
            info: the model that is read.
            weights_hash: its hash, "" if it has none; takes seconds for a large model, so it is asked for only if needed.

        Raises:
            InputError: says what was found and what was expected.
        """

    def passes(self, params: Any, info: ModelInfo, batch: Batch) -> int:
        """About how many passes the conversation takes, for plans and progress bars."""
        return 1

    def runs_model(self, params: Any) -> bool:
        """Whether it makes any pass through the model; the weights of one that nobody runs are not loaded."""
        return True

    def observe(self, params: Any, info: ModelInfo) -> Request:
        """What to look at: the request for the only pass."""
        raise NotImplementedError(f"{type(self).__name__} must define observe and compute, or flow")

    def compute(self, trace: Trace, params: Any) -> xr.Dataset:
        """The result's variables, from what was seen."""
        raise NotImplementedError(f"{type(self).__name__} must define observe and compute, or flow")

    def flow(self, params: Any, info: ModelInfo) -> Flow:
        """The whole conversation; override for more than one look at the model."""
        trace = yield self.observe(params, info)
        return self.compute(trace, params)

    def heading(self, result: Result) -> str:
        """What a result is called in a report; says more than `title` where a parameter changes what was measured."""
        return self.title

    def remarks(self, result: Result) -> Sequence[str]:
        """What a reader has to know about this result beside its findings, such as what was left out; may be nothing."""
        return ()

    def cannot_stream(self, params: Any) -> str:
        """Why it cannot run over a corpus shard by shard with these parameters, in words; "" if it can."""
        return "" if self.statistics else "its result needs all texts at once"

    def summarise(self, dataset: xr.Dataset, params: Any) -> xr.Dataset:
        """`statistics` of the texts that a dataset of `compute` is about."""
        raise NotImplementedError(f"{type(self).__name__} declares statistics and must define summarise")

    def totals(self, summary: xr.Dataset, params: Any) -> dict[str, xr.DataArray]:
        """The measures with neither a token nor a text axis, of all texts that a summary is about.

        What is left out does not depend on the texts, or is about those that are shown.
        """
        return {}

    def findings(self, result: Result) -> list[Finding]:
        """Claims with their evidence, most important first."""
        raise NotImplementedError(f"{type(self).__name__} must define findings")

    def draw(self, result: Result) -> dict[str, Drawing]:
        """Figures and token strips, by a short name. Draws what the result holds and computes nothing new."""
        raise NotImplementedError(f"{type(self).__name__} must define draw")

    @classmethod
    def only_looks(cls) -> bool:
        """Whether it does no more than look at the run's texts in one model, and so is part of "all"."""
        return cls.reads_texts and not (cls.intervenes or cls.writes or cls.roles)

    @classmethod
    def section(cls, heading: str) -> str:
        """The paragraph of the class docstring under `heading`, "" if there is none."""
        lines = inspect.cleandoc(cls.__doc__ or "").splitlines()
        if f"{heading}:" not in lines:
            return ""
        body = []
        for line in lines[lines.index(f"{heading}:") + 1 :]:
            if line and not line.startswith(" "):
                break
            body.append(line.strip())
        return "\n".join(body).strip()

    @classmethod
    def summary(cls) -> str:
        """First line of the class docstring."""
        return inspect.cleandoc(cls.__doc__ or cls.title).splitlines()[0]

    def check(self, dataset: xr.Dataset) -> xr.Dataset:
        """`dataset`, with units attached, after checking it against `measures`.

        Raises:
            ValueError: a variable is missing, undeclared, or has other axes than declared.
        """
        found, declared = set(map(str, dataset.data_vars)), set(self.measures)
        if found != declared:
            raise ValueError(
                f"{self.name} returned variables that differ from its measures: "
                f"missing {sorted(declared - found)}, undeclared {sorted(found - declared)}"
            )
        for name, measure in self.measures.items():
            if dataset[name].dims != measure.dims:
                raise ValueError(f"{self.name}: {name} has axes {dataset[name].dims}, declared {measure.dims}")
            dataset[name].attrs.update(units=measure.unit, long_name=measure.help)
        return dataset

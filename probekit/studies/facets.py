"""What fixes a run's numbers, facet by facet, and which runs may therefore be laid side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from probekit.analysis import Result

# What may differ along with a facet that is compared: another model brings its own tokenizer, and often another dtype.
_ALONG: Mapping[str, frozenset[str]] = {
    "model": frozenset({"tokenizer", "dtype", "attention", "backend", "beginning of texts"}),
    "dtype": frozenset({"attention"}),
    "backend": frozenset({"attention"}),
    "beginning-of-sequence policy": frozenset({"beginning of texts"}),
    "chat template": frozenset({"beginning of texts"}),
}
_NOTED = frozenset({"device", "libraries"})  # never kept two runs from being compared, and are told
MODEL, TEXTS, TOKENIZER, PARAMETER = "model", "texts", "tokenizer", "parameter "


@dataclass(frozen=True)
class Facet:
    """One thing that fixes a run's numbers.

    Args:
        key: equal where two runs have it in common.
        shown: the same in words.
    """

    key: str
    shown: str


@dataclass(frozen=True)
class Run:
    """A result with the name that a table gives it, and what fixes its numbers."""

    label: str
    result: Result
    facets: Mapping[str, Facet]

    def facet(self, name: str) -> Facet:
        """One facet; a run that lacks it has it empty."""
        return self.facets.get(name, _NOTHING)


_NOTHING = Facet("", "none")


def run_of(result: Result, label: str = "", corpus: str = "") -> Run:
    """A result as a run that can be compared.

    Args:
        result: of `run` or `load_result`.
        label: its name in tables; made of model and corpus if "".
        corpus: what its texts are called.
    """
    facets = facets_of(result, corpus)
    return Run(label or f"{facets[MODEL].shown}, {facets[TEXTS].shown}", result, facets)


def facets_of(result: Result, corpus: str = "") -> dict[str, Facet]:
    """Every facet that the provenance of a result tells of, by name."""
    told = result.provenance
    model, texts = dict(told.get("model") or {}), dict(told.get("texts") or {})
    name, revision = str(model.get("name", "model")), str(model.get("revision") or "")
    weights = revision or str(told.get("weights_hash", ""))
    count = f"{texts.get('n_texts', 0):,} text{'s' * (texts.get('n_texts', 0) != 1)}"
    digest = str(texts.get("source") or texts.get("digest") or "")
    shown = corpus or f"{count} ({digest.removeprefix('sha256:')[:8]})"
    found = {
        MODEL: Facet(f"{name}@{weights}", name),
        TOKENIZER: _plain(told.get("tokenizer_hash")),
        "dtype": _plain(model.get("dtype")),
        "device": _plain(model.get("device")),
        "backend": _plain(told.get("backend")),
        "attention": _plain(told.get("attention")),
        "libraries": _plain(told.get("versions")),
        "version of probekit": _plain(told.get("probekit")),
        TEXTS: Facet(digest, shown),
        "beginning-of-sequence policy": _plain(texts.get("bos")),
        "beginning of texts": _plain(texts.get("beginning_of_sequence")),
        "chat template": _plain(bool(texts.get("chat_template"))),
        "window": _plain(texts.get("window")),
        "opening": _plain(texts.get("opening")),
    }
    for role, other in dict(told.get("other models") or {}).items():
        theirs = dict(other.get("model") or {})
        key = f"{theirs.get('name')}@{theirs.get('revision') or other.get('weights_hash', '')}"
        found[f"model in the role {role!r}"] = Facet(key, str(theirs.get("name")))
    for parameter, value in result.params.as_dict().items():
        found[f"{PARAMETER}{parameter}"] = _plain(value)
    return found


def _plain(value: Any) -> Facet:
    if value is None or value == "":
        return _NOTHING
    return Facet(json.dumps(value, sort_keys=True, default=str), str(value))


def differing(one: Run, other: Run) -> list[str]:
    """The facets in which two runs differ."""
    names = dict.fromkeys((*one.facets, *other.facets))
    return [n for n in names if one.facet(n).key != other.facet(n).key]


def compared_by(one: Run, other: Run) -> str:
    """The one facet in which two runs differ, what may differ along with it aside; "" if they may not be compared."""
    apart = set(differing(one, other)) - _NOTED
    return next((f for f in differing(one, other) if f in apart and apart <= {f} | _ALONG.get(f, frozenset())), "")


@dataclass(frozen=True)
class Group:
    """Runs of one analysis that differ in one facet.

    Args:
        facet: that facet.
        runs: two or more, each with another value of it.
    """

    facet: str
    runs: tuple[Run, ...]

    @property
    def held(self) -> str:
        """What they have in common, in words: the model, the texts, and what is compared is left out."""
        first = self.runs[0]
        return ", ".join(first.facet(f).shown for f in (MODEL, TEXTS) if f != self.facet)

    def label(self, run: Run) -> str:
        """What tells a run from the others of the group."""
        shown = run.facet(self.facet).shown
        return f"{self.facet.removeprefix(PARAMETER)} = {shown}" if self.facet not in (MODEL, TEXTS) else shown

    def notes(self) -> list[str]:
        """What differs along with the facet, and what a reader has to know of it."""
        along = dict.fromkeys(n for a, b in combinations(self.runs, 2) for n in differing(a, b) if n != self.facet)
        return [f"{name}: " + "; ".join(f"{self.label(r)} has {r.facet(name).shown}" for r in self.runs)
                for name in along if name not in (TOKENIZER, "libraries")]  # fmt: skip


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """Every largest set of runs of one analysis that differ in one facet alone, in order of their first run."""
    found: list[Group] = []
    for i, first in enumerate(runs):
        later = [r for r in runs[i + 1 :] if r.result.name == first.result.name]
        for facet in dict.fromkeys(filter(None, (compared_by(first, r) for r in later))):
            members = [first]
            for run in later:
                if all(compared_by(m, run) == facet for m in members):
                    members.append(run)
            group = Group(facet, tuple(members))
            if len(members) > 1 and not any(g.facet == facet and set(_labels(group)) <= set(_labels(g)) for g in found):
                found.append(group)
    return found


def _labels(group: Group) -> Iterable[tuple[str, str]]:
    return [(r.result.name, r.label) for r in group.runs]


def not_compared(runs: Sequence[Run]) -> list[str]:
    """Which runs of one analysis may not be compared, and why, in a line for each reason."""
    reasons: dict[tuple[str, str], list[tuple[Run, Run]]] = {}
    for one, other in combinations(runs, 2):
        if one.result.name == other.result.name and not compared_by(one, other):
            apart = [f for f in differing(one, other) if f not in _NOTED]
            along = {f for facet in apart for f in _ALONG.get(facet, ())}
            why = ", ".join(f for f in apart if f not in along)
            reasons.setdefault((one.result.analysis.title, why), []).append((one, other))
    return [_refusal(title, why, pairs) for (title, why), pairs in reasons.items()]


def _refusal(title: str, why: str, pairs: Sequence[tuple[Run, Run]]) -> str:
    (one, other), more = pairs[0], len(pairs) - 1
    values = "; ".join(f"{f}: {one.facet(f).shown[:60]} / {other.facet(f).shown[:60]}" for f in why.split(", "))
    others = f" So do {more} more pair{'s' * (more != 1)}." if more else ""
    several = "more than one thing" if ", " in why else "what does not let their numbers be compared"
    return f"{title}: not compared are {one.label} and {other.label}, which differ in {several} ({values}).{others}"

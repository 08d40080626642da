"""A claim with its evidence."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Finding:
    """One statement that a study found, and what it rests on.

    Args:
        claim: a full sentence with the number in it, in words a reader of the paper would use.
        value: the number.
        unit: unit of `value`, `null` and `ci95`, such as "nats", "share" or "× median".
        null: what `value` would be if the effect were absent, under the same weighting.
        null_meaning: how the null comes about, in a few words.
        ci95: 95 % interval of `value`; None only where `n` is 1, since one unit carries no interval.
        n: number of resampled units.
        n_unit: what was resampled, such as "texts" or "blocks of 32 tokens".
        where: the place, such as {"layer": 11, "dim": 507}.
        analysis: name of the analysis; filled in by the engine.
        quantity: what was measured, in a few words that are the same for every model and text, such as "heads with a
            sink at position 0": results of several runs are laid side by side by it.
    """

    claim: str
    value: float
    unit: str
    null: float
    null_meaning: str
    ci95: tuple[float, float] | None
    n: int
    n_unit: str
    where: dict[str, Any] = field(default_factory=dict)
    analysis: str = ""
    quantity: str = ""

    def __post_init__(self) -> None:
        if not self.claim or not self.unit or not self.null_meaning or not self.n_unit:
            raise ValueError(f"a finding needs claim, unit, null_meaning and n_unit: {self}")
        if self.ci95 is None and self.n > 1:
            raise ValueError(f"a finding over {self.n} {self.n_unit} needs an interval: {self.claim}")

    @property
    def z(self) -> float:
        """How many standard errors lie between value and null; 0 where there is no interval."""
        if self.ci95 is None or not all(math.isfinite(x) for x in (*self.ci95, self.value, self.null)):
            return 0.0
        standard_error = (self.ci95[1] - self.ci95[0]) / (2 * Z95)
        distance = abs(self.value - self.null)
        return distance / standard_error if standard_error > 0 else (math.inf if distance else 0.0)

    @property
    def units(self) -> str:
        """What was resampled, in the singular where it is one."""
        first, _, rest = self.n_unit.partition(" ")
        return f"{first.removesuffix('s') if self.n == 1 else first} {rest}".strip()

    @property
    def evidence(self) -> str:
        """Interval, null and n in one line of text."""
        interval = (
            f"no interval from one {self.units}"
            if self.ci95 is None
            else f"95 % interval {fmt(self.ci95[0])} to {fmt(self.ci95[1])}"
        )
        return f"{interval}; null {fmt(self.null)} ({self.null_meaning}); n = {self.n} {self.units}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Finding:
        """The finding that `as_dict` described."""
        ci95 = data["ci95"]
        return cls(**(data | {"ci95": None if ci95 is None else (float(ci95[0]), float(ci95[1]))}))


def fmt(x: float) -> str:
    """A number as a reader wants it: three significant digits, thousands separated."""
    if not math.isfinite(x):
        return str(x)
    if x == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(x))))
    return f"{x:.2e}" if abs(x) < 1e-4 else f"{round(x, digits):,.{digits}f}" if digits else f"{round(x):,}"


def strongest(findings: list[Finding], n: int) -> list[Finding]:
    """The main (first) finding of each analysis, farthest from its null in standard errors first; at most `n`."""
    main: dict[str, Finding] = {}
    for f in findings:
        main.setdefault(f.analysis, f)
    return sorted(main.values(), key=lambda f: -f.z)[:n]

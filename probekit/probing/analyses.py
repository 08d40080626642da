"""The analyses whose results come from collected rows, by name."""

from __future__ import annotations

from probekit.analysis import Analysis

from .study import LinearProbes, NumberProbes

ANALYSES: dict[str, Analysis] = {a.name: a for a in (LinearProbes(), NumberProbes())}

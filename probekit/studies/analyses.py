"""The analyses whose results come from other results, by name."""

from __future__ import annotations

from probekit.analysis import Analysis

from .comparison import Comparison

ANALYSES: dict[str, Analysis] = {Comparison.name: Comparison()}

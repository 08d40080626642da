"""The analyses whose results come from collected rows, by name."""

from __future__ import annotations

from probekit.analysis import Analysis

from .causal_study import ConceptErasure, ProbeSteering
from .study import LinearProbes, NumberProbes

ANALYSES: dict[str, Analysis] = {
    analysis.name: analysis for analysis in (LinearProbes(), NumberProbes(), ConceptErasure(), ProbeSteering())
}

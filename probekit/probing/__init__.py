"""Linear probes with their controls: `pk.collect` rows, fit probes, sweep over layers, erase, steer."""

from .collect import CollectPlan, collect, plan
from .collected import Collected
from .estimators import DifferenceOfMeans, LogisticProbe, MassMeanProbe, RidgeProbe
from .leace import LeaceEraser
from .sweeping import sweep

__all__ = [
    "CollectPlan",
    "Collected",
    "DifferenceOfMeans",
    "LeaceEraser",
    "LogisticProbe",
    "MassMeanProbe",
    "RidgeProbe",
    "collect",
    "plan",
    "sweep",
]

"""Linear probes with their controls.

    rows = pk.collect(model, texts, "resid_post", labels=labels)    # activations, with the prompt of every row
    result = pk.probing.sweep(rows)                                 # every layer, with every control beside it
    probe = pk.probing.LogisticProbe().fit(rows.matrix("resid_post.12"), rows.labels, groups=rows.groups)
    pk.probing.erase(rows)                                          # is it gone after LEACE?
    pk.probing.steer(model, probe, "resid_post.12", prompts, (" yes", " no"))    # does the model use it?

Probes are scikit-learn estimators, with `save` and `load` without pickle.
"""

from .collected import Collected
from .collecting import CollectPlan, collect, plan
from .erasing import erase
from .estimators import DifferenceOfMeans, MassMeanProbe, RidgeProbe
from .leace import LeaceEraser
from .logistic import LogisticProbe
from .steering import steer
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
    "erase",
    "plan",
    "steer",
    "sweep",
]

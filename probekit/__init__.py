"""probekit: a workbench for mechanistic interpretability at the level of single tokens.

    import probekit as pk

    model = pk.open_model("smollm2-135m-instruct")
    result = pk.run("logit-lens", model, "The capital of France is Paris. The capital of Italy is Rome.")
    result.dataset      # xarray, axes named
    result.findings     # claims with unit, null, interval and n
    result.figures()    # Plotly

Importing probekit is light: torch, transformers and Plotly load when they are first needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .activation_cache import ActivationCache as ActivationCache
    from .activation_cache import cache as cache
    from .analysis import Analysis as Analysis
    from .analysis import Finding as Finding
    from .analysis import Measure as Measure
    from .analysis import Params as Params
    from .analysis import Result as Result
    from .analysis import Results as Results
    from .analysis import Statistic as Statistic
    from .analysis import get_analysis as get_analysis
    from .analysis import load_result as load_result
    from .analysis import load_results as load_results
    from .analysis import param as param
    from .analysis import register as register
    from .api import branch as branch
    from .api import generate as generate
    from .api import list_analyses as list_analyses
    from .api import list_models as list_models
    from .api import plan as plan
    from .api import report as report
    from .api import result_of as result_of
    from .api import run as run
    from .cards import TokenBook as TokenBook
    from .cards import TokenCard as TokenCard
    from .cards import TokenCards as TokenCards
    from .cards import token_card as token_card
    from .core import Add as Add
    from .core import Base as Base
    from .core import Branch as Branch
    from .core import Cancelled as Cancelled
    from .core import Capture as Capture
    from .core import Fork as Fork
    from .core import Forward as Forward
    from .core import KnockOut as KnockOut
    from .core import LogitDifference as LogitDifference
    from .core import NextTokenEntropy as NextTokenEntropy
    from .core import Patch as Patch
    from .core import Point as Point
    from .core import ProbekitError as ProbekitError
    from .core import ProjectOut as ProjectOut
    from .core import Replace as Replace
    from .core import Sampling as Sampling
    from .core import Scale as Scale
    from .core import Written as Written
    from .demo import demo_texts as demo_texts
    from .effects import Effect as Effect
    from .effects import difference_of_means as difference_of_means
    from .effects import effect as effect
    from .engine import Step as Step
    from .engine import share_tokenizer as share_tokenizer
    from .lenses import TrainedLens as TrainedLens
    from .lenses import train_lens as train_lens
    from .models import open_model as open_model
    from .probing import collect as collect
    from .reduce import open_lens as open_lens
    from .shifts import Shift as Shift
    from .shifts import shift as shift
    from .streaming import StreamPlan as StreamPlan
    from .streaming import load_rows as load_rows
    from .streaming import plan_stream as plan_stream
    from .streaming import stream as stream
    from .studies import Study as Study
    from .studies import compare as compare
    from .tuning import Pair as Pair
    from .tuning import tune_pair as tune_pair
    from .writes import Writes as Writes
    from .writes import sublayer_writes as sublayer_writes

_WHERE = {
    "ActivationCache": "activation_cache",
    "Add": "core",
    "Analysis": "analysis",
    "Base": "core",
    "Branch": "core",
    "Cancelled": "core",
    "Capture": "core",
    "Effect": "effects",
    "Finding": "analysis",
    "Fork": "core",
    "Forward": "core",
    "KnockOut": "core",
    "LogitDifference": "core",
    "Measure": "analysis",
    "NextTokenEntropy": "core",
    "Pair": "tuning",
    "Params": "analysis",
    "Patch": "core",
    "Point": "core",
    "ProbekitError": "core",
    "ProjectOut": "core",
    "Replace": "core",
    "Result": "analysis",
    "Results": "analysis",
    "Sampling": "core",
    "Scale": "core",
    "Shift": "shifts",
    "Step": "engine",
    "Statistic": "analysis",
    "StreamPlan": "streaming",
    "Study": "studies",
    "TokenBook": "cards",
    "TokenCard": "cards",
    "TokenCards": "cards",
    "TrainedLens": "lenses",
    "Writes": "writes",
    "Written": "core",
    "branch": "api",
    "cache": "activation_cache",
    "collect": "probing",
    "compare": "studies",
    "demo_texts": "demo",
    "difference_of_means": "effects",
    "effect": "effects",
    "generate": "api",
    "get_analysis": "analysis",
    "list_analyses": "api",
    "list_models": "api",
    "load_result": "analysis",
    "load_results": "analysis",
    "load_rows": "streaming",
    "open_lens": "reduce",
    "open_model": "models",
    "param": "analysis",
    "plan": "api",
    "plan_stream": "streaming",
    "register": "analysis",
    "report": "api",
    "result_of": "api",
    "run": "api",
    "share_tokenizer": "engine",
    "shift": "shifts",
    "stream": "streaming",
    "sublayer_writes": "writes",
    "token_card": "cards",
    "train_lens": "lenses",
    "tune_pair": "tuning",
}
_MODULES = ("lenses", "plots", "probing", "reduce", "sampling", "stats", "toys")
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])

"""The analysis contract: parameters, measures, findings, results and the registry."""

from .contract import Analysis, Flow, Measure
from .finding import Finding, fmt, strongest
from .params import Params, ParamSpec, param
from .registry import analyses, get_analyses, get_analysis, load_file, register, temporary_registrations
from .result import Result, Results, load_result, load_results, save_results

__all__ = [
    "Analysis",
    "Finding",
    "Flow",
    "Measure",
    "ParamSpec",
    "Params",
    "Result",
    "Results",
    "analyses",
    "fmt",
    "get_analyses",
    "get_analysis",
    "load_file",
    "load_result",
    "load_results",
    "param",
    "register",
    "save_results",
    "strongest",
    "temporary_registrations",
]

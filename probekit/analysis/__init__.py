"""The analysis contract: parameters, measures, findings, results and the registry."""

from .contract import Analysis, Flow, Measure, Statistic
from .finding import Finding, fmt, strongest
from .merging import check_summary, merge_summaries
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
    "Statistic",
    "analyses",
    "check_summary",
    "fmt",
    "get_analyses",
    "get_analysis",
    "load_file",
    "load_result",
    "load_results",
    "merge_summaries",
    "param",
    "register",
    "save_results",
    "strongest",
    "temporary_registrations",
]

"""The engine: plans a pass, runs it once for all analyses, hands each its share."""

from .branches import run_branch
from .journal import Journal
from .lockstep import run_flows, union
from .plan import Plan, available_memory, human, make_plan
from .progress import Listener, Progress, Step, told
from .run import Job, check_texts, first_plan, run_jobs, run_pass, share_tokenizer
from .store import load_trace, save_trace

__all__ = [
    "Job",
    "Journal",
    "Listener",
    "Plan",
    "Progress",
    "Step",
    "available_memory",
    "check_texts",
    "first_plan",
    "human",
    "load_trace",
    "make_plan",
    "run_branch",
    "run_flows",
    "run_jobs",
    "run_pass",
    "save_trace",
    "share_tokenizer",
    "told",
    "union",
]

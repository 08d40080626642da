"""The vocabulary: points, axes, texts, requests, traces, the model protocol, errors. Knows no model library."""

from .axes import AXES, check_axes
from .branching import Base, Branch, Branches, Continuation, Fork, Outcome, Sampling, joined
from .edits import Add, Edit, KnockOut, Patch, ProjectOut, Replace, Scale, Values, check_patch
from .errors import (
    CapabilityError,
    ChecksumError,
    InputError,
    ModelError,
    ModelNotFound,
    PlanError,
    ProbekitError,
    SelfCheckError,
    StoreError,
    TextError,
    UnknownName,
    unknown,
)
from .generated import Generated
from .model import Model, ModelInfo, Progress
from .points import SITES, Point, Site
from .requests import Capture, Embed, Forward, LogitDifference, ReducerSpec, Reference, Request
from .text import Batch, BosPolicy, Chat, TokenText
from .trace import Trace, token_coords

__all__ = [
    "AXES",
    "SITES",
    "Add",
    "Base",
    "Batch",
    "BosPolicy",
    "Branch",
    "Branches",
    "CapabilityError",
    "Capture",
    "Chat",
    "ChecksumError",
    "Continuation",
    "Edit",
    "Embed",
    "Fork",
    "Forward",
    "Generated",
    "InputError",
    "KnockOut",
    "LogitDifference",
    "Model",
    "ModelError",
    "ModelInfo",
    "ModelNotFound",
    "Outcome",
    "Patch",
    "PlanError",
    "Point",
    "ProbekitError",
    "Progress",
    "ProjectOut",
    "ReducerSpec",
    "Reference",
    "Replace",
    "Request",
    "Sampling",
    "Scale",
    "SelfCheckError",
    "Site",
    "StoreError",
    "TextError",
    "TokenText",
    "Trace",
    "UnknownName",
    "Values",
    "check_axes",
    "check_patch",
    "joined",
    "token_coords",
    "unknown",
]

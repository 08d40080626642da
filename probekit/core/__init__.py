"""The vocabulary: points, axes, texts, requests, traces, the model protocol, errors. Knows no model library."""

from .axes import AXES, check_axes
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
from .model import Model, ModelInfo, Progress
from .points import SITES, Point, Site
from .requests import Capture, Embed, Forward, Patch, ReducerSpec, Request
from .text import Batch, BosPolicy, TokenText
from .trace import Trace, token_coords

__all__ = [
    "AXES",
    "SITES",
    "Batch",
    "BosPolicy",
    "CapabilityError",
    "Capture",
    "ChecksumError",
    "Embed",
    "Forward",
    "InputError",
    "Model",
    "ModelError",
    "ModelInfo",
    "ModelNotFound",
    "Patch",
    "PlanError",
    "Point",
    "ProbekitError",
    "Progress",
    "ReducerSpec",
    "Request",
    "SelfCheckError",
    "Site",
    "StoreError",
    "TextError",
    "TokenText",
    "Trace",
    "UnknownName",
    "check_axes",
    "token_coords",
    "unknown",
]

"""Reducers: what leaves the forward pass is the statistic, not the tensor."""

from .attention import AttentionStats, ReceivedWithin
from .base import Field, Partial, Recorder, Reducer, Rows
from .readout import NextToken, Readout
from .rows import Keep, MedianMagnitude, Norm, TopMagnitudes

__all__ = [
    "AttentionStats",
    "Field",
    "Keep",
    "MedianMagnitude",
    "NextToken",
    "Norm",
    "Partial",
    "Readout",
    "ReceivedWithin",
    "Recorder",
    "Reducer",
    "Rows",
    "TopMagnitudes",
]

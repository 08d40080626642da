"""Reducers: what leaves the forward pass is the statistic, not the tensor."""

from .attention import AttentionStats, Maps, ReceivedWithin
from .base import Field, Partial, Recorder, Reducer, Rows
from .direct import DirectRows, LogitDirection, Pair, pair_ids
from .local_attention import LocalAttention
from .positions import AtPosition, log_softmax, read_answers
from .readout import NextToken, Readout
from .rows import Keep, MedianMagnitude, Norm, TopMagnitudes

__all__ = [
    "AtPosition",
    "AttentionStats",
    "DirectRows",
    "Field",
    "Keep",
    "LocalAttention",
    "LogitDirection",
    "Maps",
    "MedianMagnitude",
    "NextToken",
    "Norm",
    "Pair",
    "Partial",
    "Readout",
    "ReceivedWithin",
    "Recorder",
    "Reducer",
    "Rows",
    "TopMagnitudes",
    "log_softmax",
    "pair_ids",
    "read_answers",
]

"""Reducers: what leaves the forward pass is the statistic, not the tensor."""

from .attention import AttentionStats, Maps, ReceivedWithin
from .base import Field, Partial, Recorder, Reducer, Rows
from .direct import DirectRows, LogitDirection, Pair, pair_ids
from .lens import LensRef, open_lens
from .local_attention import LocalAttention
from .nucleus import Nucleus, Tempered
from .positions import AtPosition, log_softmax, read_answers
from .readout import NextToken, Readout
from .relations import BlockNorms, BlockRows, CosineTo, MlpAlignment, OutputNorm, ValueRows
from .rows import Keep, MedianMagnitude, Norm, TopMagnitudes
from .sink_gap import SinkLogitGap

__all__ = [
    "AtPosition",
    "AttentionStats",
    "BlockNorms",
    "BlockRows",
    "CosineTo",
    "DirectRows",
    "Field",
    "Keep",
    "LensRef",
    "LocalAttention",
    "LogitDirection",
    "Maps",
    "MedianMagnitude",
    "MlpAlignment",
    "NextToken",
    "Norm",
    "Nucleus",
    "OutputNorm",
    "Pair",
    "Partial",
    "Readout",
    "ReceivedWithin",
    "Recorder",
    "Reducer",
    "Rows",
    "SinkLogitGap",
    "Tempered",
    "TopMagnitudes",
    "ValueRows",
    "log_softmax",
    "open_lens",
    "pair_ids",
    "read_answers",
]

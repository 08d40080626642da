"""Analyses over a corpus of any size: shards, one Zarr store, statistics that add up, and going on after a kill."""

from .plan import StreamPlan, plan_stream
from .run import stream
from .store import load_rows

__all__ = ["StreamPlan", "load_rows", "plan_stream", "stream"]

"""Timing as ratios: two things that run in turn in one process."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def paired(
    ours: Callable[[], Any], base: Callable[[], Any], n: int, *, warm: bool = True
) -> tuple[list[float], float, float]:
    """Ratios ours / base of `n` pairs that run in turn, after one of each if `warm`; and both medians in seconds."""
    if warm:
        base(), ours()
    pairs = []
    for i in range(n):
        order = (base, ours) if i % 2 else (ours, base)
        seconds = {}
        for run in order:
            begin = time.perf_counter()
            run()
            seconds[run] = time.perf_counter() - begin
        pairs.append((seconds[ours], seconds[base]))
    a, b = np.array(pairs).T
    return (a / b).tolist(), float(np.median(a)), float(np.median(b))


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()

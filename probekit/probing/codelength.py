"""Minimum description length by the online code."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .logistic import STRENGTHS, LogisticProbe, log_loss

# Shares of the rows after which the probe is trained anew.
CUTS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
LEAST = 10  # prompts from which a penalty is chosen


@dataclass(frozen=True)
class Codelength:
    """What it takes to send the labels to someone who has the rows.

    Args:
        bits: L = n₁ log₂ K + Σ_i cost of block i + 1 under a probe trained on all before.
        compression: n log₂ K / L; above 1 where rows help.
        blocks: rows of each block; the first is sent with the uniform code.
        block_bits: cost of each block.
    """

    bits: float
    compression: float
    blocks: tuple[int, ...]
    block_bits: tuple[float, ...]


def block_ends(sizes: np.ndarray, cuts: tuple[float, ...] = CUTS) -> list[int]:
    """After how many groups each block ends: the first group with which the share of rows is reached.

    Args:
        sizes: rows of each group, in the order in which they are sent.
        cuts: shares of the rows.
    """
    cumulative = np.cumsum(sizes)
    ends = np.searchsorted(cumulative, np.asarray(cuts) * cumulative[-1] * (1 - 1e-12)) + 1
    return sorted(set(int(e) for e in ends))


def online_code(X: np.ndarray, y: np.ndarray, groups: np.ndarray, *, seed: int = 0) -> Codelength:
    """The online code of Voita and Titov (2020, arXiv 2003.12298), blocks being whole prompts.

    Prompts are shuffled. Blocks end after 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.25, 12.5, 25, 50 and 100 % of the rows, rounded
    up to whole prompts; cuts that fall on the same prompt count once. The first block costs log₂ K bits a row, as does any
    block until the rows before it have both classes. A fresh `LogisticProbe` is trained before every other block, its
    strength chosen among the prompts before the block; with fewer than ten of them, which can choose nothing, the
    strongest penalty is used.

    Args:
        X: rows, axes row, feature.
        y: class number of each row, 0 or 1.
        groups: prompt of each row.
        seed: of the shuffle.
    """
    distinct, member = np.unique(groups, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(distinct))
    rank = np.empty(len(distinct), dtype=np.int64)
    rank[order] = np.arange(len(distinct))
    turn = rank[member]
    ends = block_ends(np.bincount(turn))
    bits, blocks, start = [], [], 0
    for end in ends:
        block, before = (turn >= start) & (turn < end), turn < start
        if len(np.unique(y[before])) < 2:
            cost = float(block.sum())  # log2 of 2 classes
        else:
            Cs = STRENGTHS if start >= LEAST else STRENGTHS[:1]
            probe = LogisticProbe(Cs=Cs, random_state=seed).fit(X[before], y[before], groups=groups[before])
            cost = log_loss(probe.decision_function(X[block]), y[block]) * int(block.sum()) / np.log(2)
        bits.append(cost)
        blocks.append(int(block.sum()))
        start = end
    total = float(sum(bits))
    return Codelength(total, len(y) / total if total else float("inf"), tuple(blocks), tuple(bits))

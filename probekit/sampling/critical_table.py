"""Wrong answers, what their prefixes lead to and what replacing their tokens does, as one labelled table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from probekit.core import Batch, Trace, token_coords
from probekit.stats import text_mean

from .critical import Scanned, WrongAnswer
from .inside import answers_only, inside_measures
from .replacing import pass_at_k
from .wrong_answers import Tried

STATUS = ("with a critical token", "never wrong", "too rarely right", "lost from the start", "never lost")
FOUND, NONE_WRONG, RARELY_RIGHT, LOST, NEVER_LOST = range(5)
GROUPS = ("critical", "free", "any")
CASES = tuple(f"{group}, {what}" for group in GROUPS for what in ("kept", "replaced"))


@dataclass(frozen=True)
class Replaced:
    """What became of one token, kept and replaced.

    Args:
        text: number of the prompt.
        at: place of the token within the answer.
        group: 0 for the critical token, 1 for a free one, 2 for any.
        kept: whether each continuation with it is right; axis sample.
        others: ids of the tokens drawn in its place; axis sample.
        replaced: whether the continuation after each of them is right; axis sample.
    """

    text: int
    at: int
    group: int
    kept: np.ndarray
    others: np.ndarray
    replaced: np.ndarray


@dataclass(frozen=True)
class Study:
    """Everything that was found.

    Args:
        tried: first answers to the prompts.
        alive: by number, success rates of the prompts whose wrong answers were scanned.
        rights: what a right answer to each prompt says.
        status: of each prompt, a place in `STATUS`.
        answers: by number of the prompt, the wrong answers that were scanned, and what came of it.
        words: by number of the prompt, first and last token with which it says what it says.
        replaced: tokens that were kept and replaced.
    """

    tried: Tried
    alive: Mapping[int, float]
    rights: Sequence[str]
    status: np.ndarray
    answers: Mapping[int, tuple[WrongAnswer, Scanned]]
    words: Mapping[int, tuple[int, int]]
    replaced: Sequence[Replaced]


def critical_table(study: Study, inside: Trace, n: int) -> xr.Dataset:
    """Everything that critical-tokens measures, on a token axis that holds the wrong answers only.

    Args:
        study: what was found; at least one wrong answer.
        inside: a pass over the wrong answers with the captures of `inside.py`.
        n: continuations of each token that was kept or replaced.
    """
    texts = list(study.answers)
    batch, rows = answers_only([answer.base for answer, _ in study.answers.values()], inside)
    batch = replace(batch, index=tuple(texts))
    ks = np.array(sorted({*(2**i for i in range(n.bit_length())), n}))
    variables = {
        **_along(study, batch),
        **inside_measures(inside, rows),
        **_per_text(study),
        **_replaced(study, batch, n),
        **pass_curves(study.replaced, ks),
    }
    coords = token_coords(batch) | {"case": np.array(CASES, dtype=object), "threshold": ks}
    return xr.Dataset(variables, coords=coords).assign_coords(layer=np.arange(inside.info.n_layers))


def _along(study: Study, batch: Batch) -> dict[str, object]:
    scans = [scanned for _, scanned in study.answers.values()]
    critical = np.zeros(batch.n_tokens, dtype=np.int64)
    for start, scanned in zip(batch.starts, scans, strict=True):
        if scanned.critical is not None:
            critical[start + scanned.critical] = 1
    return {
        "success_share": ("token", np.concatenate([s.share for s in scans])),
        "drawn": ("token", np.concatenate([s.drawn for s in scans])),
        "how": ("token", np.concatenate([s.how for s in scans])),
        "critical": ("token", critical),
    }


def _per_text(study: Study) -> dict[str, object]:
    n = len(study.rights)
    place, words = np.full(n, -1), np.full((2, n), -1)
    says = np.full(n, "", dtype=object)
    for i, (_, scanned) in study.answers.items():
        place[i] = -1 if scanned.critical is None else scanned.critical
        words[:, i] = study.words[i]
        says[i] = study.tried.wrong[i].outcome or ""
    greedy = np.array([i in study.answers and i in study.tried.greedy for i in range(n)], dtype=np.int64)
    return {
        "status": ("text", study.status),
        "tried_success": ("text", study.tried.success),
        "prompt_success": ("text", np.array([study.alive.get(i, np.nan) for i in range(n)])),
        "critical_place": ("text", place),
        "greedy": ("text", greedy),
        "says": ("text", says),
        "right_answer": ("text", np.array(study.rights, dtype=object)),
        "words_from": ("text", words[0]),
        "words_to": ("text", words[1]),
    }


def _replaced(study: Study, batch: Batch, n: int) -> dict[str, object]:
    starts = dict(zip(study.answers, batch.starts, strict=True))
    found = study.replaced
    rows = {
        "kept_right": [r.kept for r in found],
        "replaced_right": [r.replaced for r in found],
        "replaced_id": [r.others for r in found],
    }
    tables = {name: np.array(values, dtype=np.int64).reshape(len(found), n) for name, values in rows.items()}
    return {
        "branch_place": ("branch", np.array([starts[r.text] + r.at for r in found], dtype=np.int64)),
        "branch_group": ("branch", np.array([r.group for r in found], dtype=np.int64)),
        **{name: (("branch", "sample"), values) for name, values in tables.items()},
        "gain": ("branch", (tables["replaced_right"] - tables["kept_right"]).mean(axis=1)),
    }


def pass_curves(replaced: Sequence[Replaced], ks: np.ndarray) -> dict[str, object]:
    """Pass@k of each group of tokens, kept and replaced: places of an answer are averaged, then answers.

    Args:
        replaced: tokens that were kept and replaced.
        ks: how many continuations.

    Returns:
        Means over answers with their 95 % intervals, from the spread between answers; NaN without answers, and the
        mean for both ends with a single one.
    """
    shares = np.full((3, len(CASES), len(ks)), np.nan)
    for case in range(len(CASES)):
        mine = [r for r in replaced if r.group == case // 2]
        right = [int((r.replaced if case % 2 else r.kept).sum()) for r in mine]
        for j, k in enumerate(ks):
            each = pass_at_k(right, len(mine[0].kept), int(k)) if mine else np.array([])
            texts = np.array([r.text for r in mine])
            means = np.array([each[texts == t].mean() for t in np.unique(texts)])
            found = text_mean(means, "answers").within(0, 1)
            shares[:, case, j] = found.value, *(found.ci95 or (found.value, found.value))
    return {
        name: (("case", "threshold"), values)
        for name, values in zip(("pass_share", "pass_low", "pass_high"), shares, strict=True)
    }

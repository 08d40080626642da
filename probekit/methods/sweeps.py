"""Patching one place at a time in pairs of texts: requests out, traces in, labelled numbers at the end."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr

from probekit.core import (
    Batch,
    Capture,
    Forward,
    InputError,
    LogitDifference,
    ModelInfo,
    Patch,
    Replace,
    Request,
    Trace,
    token_coords,
)
from probekit.core.pairs import first_differences, partners
from probekit.reduce import AtPosition, Keep, NextToken, log_softmax, read_answers
from probekit.stats import rank_correlation

TOKENS, MOST_ROWS = 1024, 64  # what runs in one pass; more gains nothing on a CPU, and every row brings its logits
STREAMS = {"resid_pre": "residual stream", "attn_out": "attention output", "mlp_out": "MLP output"}
SITES = (*STREAMS, "z")
DIRECTIONS = {"denoising": 1, "noising": 0}  # which text of a pair is patched: the corrupted or the clean one
METRICS = {
    "logit_diff": ("logits", "logit of the right minus logit of the wrong answer"),
    "logprob_nats": ("nats", "log-probability of the right answer"),
    "prob": ("share", "probability of the right answer; hides what lowers it"),
    "kl_nats": ("nats", "KL(clean run ‖ this run) of the next-token distribution"),
}


@dataclass(frozen=True)
class SweepSpec:
    """What a sweep patches and what it reads.

    Args:
        answers: "text" if each text ends with its answer, "predicted" if the model's top tokens are the answers.
        directions: names from `DIRECTIONS`.
        sites: names from `SITES`.
        window: neighbouring blocks whose outputs are patched together.
        min_gap: pairs whose two logit differences are closer than this, in logits, are left out.
    """

    answers: str
    directions: tuple[str, ...]
    sites: tuple[str, ...]
    window: int
    min_gap: float

    @property
    def position(self) -> int:
        """Where the logits are read, negative from the end."""
        return -2 if self.answers == "text" else -1

    @property
    def looks(self) -> tuple[Capture, ...]:
        """What is seen of both runs before anything is patched."""
        words = (Capture("logits", NextToken(1)),) if self.answers == "predicted" else ()
        return (*self.keeps, self.answer, *words)

    @property
    def keeps(self) -> tuple[Capture, ...]:
        """The activations themselves."""
        return tuple(Capture(site, Keep()) for site in self.sites)

    @property
    def answer(self) -> Capture:
        """The logits at the measured position."""
        return Capture("logits", AtPosition(self.position))

    def passes(self, info: ModelInfo, batch: Batch) -> int:
        """About how many passes the sweep takes."""
        firsts, ends = first_differences(batch), [n + self.position for n in batch.lengths[::2]]
        spans = sum(end - first + 1 for first, end in zip(firsts, ends, strict=True))
        heads = info.n_heads * len(firsts) if "z" in self.sites else 0
        cells = info.n_layers * len(self.directions) * (len(set(self.sites) & set(STREAMS)) * spans + heads)
        return -(-cells // _rows_per_pass(batch))


def _rows_per_pass(batch: Batch) -> int:
    return max(1, min(MOST_ROWS, TOKENS // max(batch.lengths)))


@dataclass(frozen=True)
class _Cell:
    """One place of one run that is patched: in a row of its own, whose answer goes into one entry of a grid."""

    text: int
    patches: tuple[Patch, ...]
    grid: dict[str, np.ndarray]
    at: tuple[int, ...]


class PairSweep:
    """Both runs of every pair as they were first seen, and what patching makes of them.

    Args:
        spec: what to patch and what to read.
        seen: the trace of `spec.looks` over all texts, unpatched; clean, corrupted, clean, corrupted, …

    Raises:
        InputError: both runs of a pair predict the same answer, or no pair has a gap that can be divided by.
    """

    def __init__(self, spec: SweepSpec, seen: Trace) -> None:
        self.spec, self.batch, self.info, self.partner = spec, seen.batch, seen.info, partners(seen.batch)
        self.values = {site: seen[Capture(site, Keep())]["value"].values for site in spec.sites}
        self.row = np.repeat(np.arange(len(self.batch)), self.batch.lengths)  # text of each token
        self.ends = np.array(self.batch.lengths) + spec.position  # the measured position of each text
        self.firsts = np.repeat(first_differences(self.batch), 2)
        self.right, self.wrong = self._answers(seen)
        logits = seen[spec.answer]["value"].values
        self.reference = log_softmax(logits[::2])  # the clean runs; axes pair, vocab
        self.own = self._read(logits, np.arange(len(self.batch)))
        gap = self.own["logit_diff"][::2] - self.own["logit_diff"][1::2]
        self.other = np.arange(len(self.batch)) ^ 1
        self.used = np.repeat(np.abs(gap) >= spec.min_gap, 2)
        if not self.used.any():
            raise InputError(
                f"The two runs of every pair differ by less than min_gap={spec.min_gap:g} logits (found "
                f"{', '.join(f'{g:.2g}' for g in gap[:6])}): there is no effect to divide by. Choose prompts whose answers "
                "the model tells apart, or lower min_gap."
            )
        rows = [DIRECTIONS[d] for d in spec.directions]
        self.runs = [i for i in range(len(self.batch)) if self.used[i] and i % 2 in rows]
        n_layers, n_heads = self.info.n_layers, self.info.n_heads
        self.stream = {k: np.full((len(STREAMS), n_layers, self.batch.n_tokens), np.nan) for k in METRICS}
        self.head = {k: np.full((n_layers, n_heads, len(self.batch)), np.nan) for k in METRICS}
        self.stream_estimate, self.head_estimate = self.stream["prob"].copy(), self.head["prob"].copy()

    def _answers(self, seen: Trace) -> tuple[np.ndarray, np.ndarray]:
        if self.spec.answers == "text":
            own = np.array([t.ids[-1] for t in self.batch])
        else:
            top = seen[Capture("logits", NextToken(1))]["top_id"].values[:, 0]
            own = top[np.cumsum(self.batch.lengths) - 1]
        same = np.flatnonzero(own[::2] == own[1::2])
        if same.size:
            pair, token = self.batch.index[2 * same[0]], int(own[2 * same[0]])
            raise InputError(
                f"The model predicts {seen.vocab.get(token, str(token))!r} after text {pair} and after its corrupted twin: "
                "there is no wrong answer to compare with. Change more of the prompt, or end each text with its answer "
                "and set answers='text'."
            )
        return np.repeat(own[::2], 2), np.repeat(own[1::2], 2)

    def _read(self, logits: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        return read_answers(logits, self.right[rows], self.wrong[rows], self.reference[rows // 2])

    def _tokens(self, row: int) -> range:
        """Places of a text's tokens from the first difference to the measured position."""
        start = self.batch.starts[row]
        return range(start + int(self.firsts[row]), start + self.ends[row] + 1)

    def run(self) -> Generator[Request, Trace, None]:
        """Patch every place, many of them in one pass: each in a row of its own, a copy of its text."""
        cells = itertools.chain(self._stream_cells(), self._head_cells())
        while some := list(itertools.islice(cells, _rows_per_pass(self.batch))):
            patches = tuple(
                Patch(p.point, p.edit, p.positions, heads=p.heads, texts=(row,))
                for row, cell in enumerate(some)
                for p in cell.patches
            )
            rows = tuple(self.batch.index[cell.text] for cell in some)
            trace = yield Forward(
                (self.spec.answer,), patches, rows=rows, why="activations of the other run patched in"
            )
            found = self._read(trace[self.spec.answer]["value"].values, np.array([cell.text for cell in some]))
            for row, cell in enumerate(some):
                for name, grid in cell.grid.items():
                    grid[cell.at] = found[name][row]

    def _stream_cells(self) -> Iterator[_Cell]:
        """One site, block and token at a time; where both runs agree, nothing has to run."""
        for case, site in enumerate(STREAMS):
            if site not in self.spec.sites:
                continue
            for row in self.runs:
                start, stop = self.batch.starts[row], self._tokens(row).stop
                for name, grid in self.stream.items():
                    grid[case, :, start:stop] = self.own[name][row]
                for layer in range(self.info.n_layers):
                    for place in self._tokens(row):
                        patches = self._swap(site, layer, row, place)
                        if patches:
                            yield _Cell(row, patches, self.stream, (case, layer, place))

    def _swap(self, site: str, layer: int, row: int, place: int) -> tuple[Patch, ...]:
        """The other run's activation at one token, in a window of blocks; none where both runs agree."""
        first = max(0, layer - (self._window(site) - 1) // 2)
        layers = range(first, min(first + self._window(site), self.info.n_layers))
        values, other = self.values[site], self.partner[place]
        if all(np.array_equal(values[at, place], values[at, other]) for at in layers):
            return ()
        position = place - self.batch.starts[row]
        return tuple(Patch((site, at), Replace(values[at, other]), (position,)) for at in layers)

    def _window(self, site: str) -> int:
        return 1 if site == "resid_pre" else self.spec.window  # a later stream would overwrite an earlier one

    def _head_cells(self) -> Iterator[_Cell]:
        """One head at a time, at every token from the first difference on."""
        for layer in range(self.info.n_layers if "z" in self.spec.sites else 0):
            for row in self.runs:
                places = np.array(self._tokens(row))
                where = (places - self.batch.starts[row]).tolist()
                for head in range(self.info.n_heads):
                    edit = Replace(self.values["z"][layer, self.partner[places], head][:, None])
                    yield _Cell(row, (Patch(("z", layer), edit, where, heads=(head,)),), self.head, (layer, head, row))

    def attribution(self) -> Generator[Request, Trace, None]:
        """Every effect to first order: how far the activation would move, times the metric's slope there."""
        right, wrong = (tuple(map(int, ids)) for ids in (self.right, self.wrong))
        metric = LogitDifference(right, wrong, self.spec.position)
        slopes = yield Forward(self.spec.keeps, texts=self.batch.index, gradient_of=metric, why="slopes of the answer")
        swept = np.isin(self.row, self.runs) & (self.batch.pos <= self.ends[self.row])
        for capture in self.spec.keeps:
            site = capture.point.site
            moved = (self.values[site][:, self.partner] - self.values[site]).astype(np.float64)
            share = (moved * slopes[capture]["value"].values).sum(-1)[:, swept]  # layer, token (, head)
            share = self._share(share, self.row[swept], share.ndim - 2)
            if site != "z":
                self.stream_estimate[list(STREAMS).index(site)][:, swept] = share
                continue
            every = np.full((*share.shape[:1], self.batch.n_tokens, share.shape[-1]), np.nan)
            every[:, swept] = share
            for row in self.runs:
                self.head_estimate[:, :, row] = every[:, list(self._tokens(row))].sum(axis=1)

    def _share(self, moved: np.ndarray, rows: np.ndarray, more: int = 0) -> np.ndarray:
        """Logits as a share of the way to the other run; `rows` are the texts along the axis before `more` others."""
        own = self.own["logit_diff"]
        gap = np.where(self.used, own[self.other] - own, np.nan)[rows]
        return moved / gap.reshape(-1, *(1,) * more) + 0.0  # no negative zero

    def _role(self) -> np.ndarray:
        pos, first, end = self.batch.pos, self.firsts[self.row], self.ends[self.row]
        changed = self.batch.ids != self.batch.ids[self.partner]
        cases = [pos > end, pos == end, changed, pos < first]
        return np.select(cases, ["answer", "last", "changed", "before"], "after").astype(object)

    def dataset(self) -> xr.Dataset:
        """Every number with its axes; coordinates `pair`, `run` and `role` say what each token is.

        `run` is "clean" or "corrupted": effects at its tokens are those of patching this run. `role` is "before" the first difference, "changed", "after" it, the "last" (measured) token, or the "answer".
        """
        stream, head = ("case", "layer", "token"), ("layer", "head", "text")
        own, texts = self.own["logit_diff"], np.arange(len(self.batch))
        effect = self._share(self.stream["logit_diff"] - own[self.row], self.row)
        head_effect = self._share(self.head["logit_diff"] - own, texts)
        agreement, head_agreement = self._agreement(effect, head_effect)
        data = {
            "effect": (stream, effect),
            "attributed": (stream, self.stream_estimate),
            **{name: (stream, grid) for name, grid in self.stream.items()},
            "head_effect": (head, head_effect),
            "head_attributed": (head, self.head_estimate),
            **{f"head_{name}": (head, grid) for name, grid in self.head.items()},
            **{f"run_{name}": ("text", self.own[name]) for name in METRICS},
            "right_id": ("text", self.right),
            "wrong_id": ("text", self.wrong),
            "rank_correlation": (("case", "text"), agreement),
            "head_rank_correlation": ("text", head_agreement),
        }
        run = np.where(self.row % 2, "corrupted", "clean").astype(object)
        coords = token_coords(self.batch) | {"pair": ("token", self.row // 2), "run": ("token", run)}
        coords |= {"role": ("token", self._role())}
        return xr.Dataset(
            data, coords | {"case": np.array(list(STREAMS), dtype=object), "layer": np.arange(self.info.n_layers)}
        )

    def _agreement(self, effect: np.ndarray, head_effect: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rank correlation of estimated and exact effects; axes case, text, and text for heads."""
        streams, heads = np.full((len(STREAMS), len(self.batch)), np.nan), np.full(len(self.batch), np.nan)
        for row in self.runs:
            here = list(self._tokens(row))
            for case, site in enumerate(STREAMS):
                if self._window(site) == 1:  # the estimate is of single blocks
                    streams[case, row] = rank_correlation(
                        effect[case][:, here].ravel(), self.stream_estimate[case][:, here].ravel()
                    )
            heads[row] = rank_correlation(head_effect[..., row].ravel(), self.head_estimate[..., row].ravel())
        return streams, heads

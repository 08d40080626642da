"""The causal step: adding a probe's direction, and seeing whether the answers follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probekit._version import __version__
from probekit.analysis import Result
from probekit.batches import make_batch
from probekit.core import SITES, Add, Batch, BosPolicy, Capture, Chat, Forward, InputError, Patch, Point
from probekit.engine import Listener, Progress, run_pass, told
from probekit.reduce import AtPosition, Norm, log_softmax

from .causal_study import ProbeSteering

if TYPE_CHECKING:
    from probekit.core import Model

    from .collected import Collected

DOSES = (-0.4, -0.2, -0.1, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class _Answers:
    """Token ids of both answers to each prompt."""

    positive: np.ndarray
    negative: np.ndarray

    def read(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logit difference and probability of the positive answer, axis text; log-probabilities, axes text, vocab."""
        rows = np.arange(len(logits))
        logp = log_softmax(logits)
        difference = logp[rows, self.positive] - logp[rows, self.negative]
        return difference, np.exp(logp[rows, self.positive]), logp


def steer(
    model: Any,
    direction: Any,
    point: str | tuple[str, int] | Point,
    prompts: Any,
    answers: tuple[str, str] | Sequence[tuple[str, str]],
    *,
    doses: Sequence[float] = DOSES,
    positions: Sequence[int] | None = None,
    n_random: int = 10,
    fitted_on: Collected | None = None,
    seed: int = 0,
    bos: BosPolicy = "model",
    chat: Chat = False,
    memory_limit: int | None = None,
    progress: bool | Listener = True,
) -> Result:
    """Add a direction with both signs to prompts, and see whether the preferred answer follows, beside random ones.

    Args:
        model: an opened model, or anything that `open_model` takes.
        direction: a fitted probe, eraser-free (its `direction_`), or a vector; scaled to unit length.
        point: where it is added, with a layer: the one that the probe was fitted on.
        prompts: texts that the model would answer next; not those of the fit.
        answers: the answer of the positive class and that of the negative one, as they follow the prompt (mind the
            blank in front); or a pair for each prompt. The first token of each counts.
        doses: lengths of what is added, in median norms of the activation at the point; 0 is always part of them.
        positions: tokens of each prompt that it is added to, negative from the end; None for all.
        n_random: random directions of the same lengths.
        fitted_on: the collection that the probe was fitted on; prompts that are among its texts are refused.
        seed: of the random directions.
        bos: as in `run`.
        chat: as in `run`.
        memory_limit: as in `run`.
        progress: as in `run`.

    Returns:
        A result of `probe-steering`.

    Raises:
        InputError: the direction does not fit the point, answers begin with the same token, or a prompt was part of the
            fit.

    Example:
        >>> probe = LogisticProbe().fit(X, y, groups=g)  # doctest: +SKIP
        >>> steer(model, probe, "resid_post.12", prompts, (" yes", " no"))  # doctest: +SKIP
    """
    from probekit.models import open_model

    opened: Model = open_model(model, lazy=True)
    analysis = ProbeSteering()
    params = analysis.Params.parse({"n_random": n_random, "seed": seed}, analysis.name)
    where = _layered(point)
    opened.info.require(where)
    batch = make_batch(opened, (), prompts, bos, None, chat)
    if fitted_on is not None:
        _refuse_seen(batch, fitted_on)
    said = _answer_ids(opened, answers, len(batch))
    unit = _unit_direction(direction, opened, where)
    amounts = sorted({0.0, *map(float, doses)})
    if len(amounts) < 2 or not np.isfinite(amounts).all():
        raise InputError(f"Found doses {list(doses)}; expected at least one that is finite and not 0.")
    if hasattr(opened, "load"):
        opened.load()
    random = np.random.default_rng(seed).normal(size=(n_random, len(unit)))
    directions = np.concatenate([unit[None], random / np.linalg.norm(random, axis=1, keepdims=True)])
    end = Capture("logits", AtPosition(-1))
    norms = Capture(where, Norm())
    shape = (len(directions), len(amounts), len(batch))
    seen = {name: np.zeros(shape) for name in ("difference", "probability", "kl_nats")}
    with Progress(1 + len(directions) * (len(amounts) - 1), **told(progress)) as bar:
        trace, _ = run_pass(opened, Forward((end, norms)), batch, memory_limit=memory_limit, progress=bar)
        difference, probability, logp = said.read(trace[end]["value"].values)
        median = float(np.median(trace[norms]["norm"].values))
        seen["difference"][:], seen["probability"][:] = difference, probability
        for k, d in np.ndindex(shape[:2]):
            if amounts[d] == 0:
                continue
            patch = Patch(where, Add(directions[k] * median, amounts[d]), positions)
            request = Forward((end,), (patch,), why="a direction added to the stream")
            after, _ = run_pass(opened, request, batch, memory_limit=memory_limit, progress=bar)
            moved, p, logq = said.read(after[end]["value"].values)
            seen["difference"][k, d], seen["probability"][k, d] = moved, p
            seen["kl_nats"][k, d] = np.maximum((np.exp(logp) * (logp - logq)).sum(axis=1), 0.0)
    data = _dataset(seen, amounts, median, batch)
    data.attrs |= {"point": str(where), "answers": _words(answers)}
    provenance = {
        "probekit": __version__,
        **opened.provenance(),
        "texts": {
            "n_texts": len(batch),
            "n_tokens": batch.n_tokens,
            "bos": batch.bos,
            "digest": f"sha256:{batch.digest}",
        },
    }
    return Result(analysis, params, analysis.check(data), provenance)


def _dataset(seen: dict[str, np.ndarray], amounts: list[float], median: float, batch: Batch) -> Any:
    import xarray as xr

    x = np.array(amounts)
    change = seen["difference"] - seen["difference"][:, amounts.index(0.0)][:, None]
    slope = np.einsum("d,kdt->kt", x, change) / (x**2).sum()
    return xr.Dataset(
        {
            "change": (("dose", "text"), change[0]),
            "probability": (("dose", "text"), seen["probability"][0]),
            "kl_nats": (("dose", "text"), seen["kl_nats"][0]),
            "slope": ("text", slope[0]),
            "difference": ("text", seen["difference"][0, amounts.index(0.0)]),
            "control_change": (("dose", "sample"), change[1:].mean(axis=2).T),
            "control_probability": (("dose", "sample"), seen["probability"][1:].mean(axis=2).T),
            "control_kl_nats": (("dose", "sample"), seen["kl_nats"][1:].mean(axis=2).T),
            "control_slope": ("sample", slope[1:].mean(axis=1)),
            "median_norm": ((), np.float64(median)),
        },
        coords={"dose": x, "text": list(batch.index)},
    )


def _layered(point: str | tuple[str, int] | Point) -> Point:
    where = Point.of(point)
    site = SITES[where.site]
    if site.dims != ("token", "d_model") or (site.layered and where.layer is None):
        raise InputError(
            f"Found the point {where}; expected one of the residual stream's width in one layer (resid_post.12)."
        )
    return where


def _unit_direction(direction: Any, model: Model, where: Point) -> np.ndarray:
    values = np.asarray(getattr(direction, "direction_", direction), dtype=np.float64)
    if values.shape != (model.info.d_model,) or not np.isfinite(values).all() or not values.any():
        raise InputError(
            f"Found a direction of shape {values.shape}; at {where} it is {model.info.d_model} finite numbers, not all 0."
        )
    return values / np.linalg.norm(values)


def _refuse_seen(batch: Batch, fitted_on: Collected) -> None:
    about = fitted_on.about
    ends = np.cumsum(about.lengths)
    known = {tuple(about.text_ids[e - n : e].tolist()) for e, n in zip(ends, about.lengths, strict=True)}
    for i, text in enumerate(batch.texts):
        if tuple(text.ids) in known:
            raise InputError(
                f"Prompt {i} is among the texts that the probe was fitted on. Steer prompts it has not seen."
            )


def _answer_ids(model: Model, answers: Any, n: int) -> _Answers:
    one = len(answers) == 2 and all(isinstance(a, str) for a in answers)
    pairs = [tuple(answers)] * n if one else [() if isinstance(a, str) else tuple(a) for a in answers]
    if len(pairs) != n or not all(len(p) == 2 and all(isinstance(a, str) and a for a in p) for p in pairs):
        raise InputError(f"Expected two answers, or a pair for each of {n} prompts; found {str(answers)[:120]}.")
    ids: dict[str, int] = {}
    for text in dict.fromkeys(a for pair in pairs for a in pair):
        ids[text] = model.tokenize([text], "never").texts[0].ids[0]
    for first, second in pairs:
        if ids[first] == ids[second]:
            raise InputError(
                f"The answers {first!r} and {second!r} begin with the same token; they cannot be told apart."
            )
    return _Answers(*(np.array([ids[p[k]] for p in pairs]) for k in (0, 1)))


def _words(answers: Any) -> str:
    if all(isinstance(a, str) for a in answers):
        return f"{answers[0]!r} against {answers[1]!r}"
    return "a pair of answers for each prompt"

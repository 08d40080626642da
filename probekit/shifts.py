"""Two models on the same text: how far their next-token distributions are apart after each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probekit.core import Batch, BosPolicy, Capture, Forward, InputError, TextError, token_coords
from probekit.engine import Listener, Progress, run_pass, share_tokenizer, told
from probekit.methods.divergences import entropy, jensen_shannon, kullback_leibler
from probekit.methods.two_models import log_softmax
from probekit.reduce import Keep

if TYPE_CHECKING:
    import xarray as xr

    from probekit.core import Model

CASES = ("model", "other")
_LOGITS = Capture("logits", Keep())
_ROWS = 16  # at a time; a row is as long as the vocabulary
_FLOAT = 4  # bytes


@dataclass(frozen=True, repr=False, eq=False)
class Shift:
    """What two models with one tokenizer predict along one text. Build it with `probekit.shift`.

    Row t of `data` is about the distributions after token t, which predict token t + 1; both models read the same ids,
    at temperature 1. Logarithms are natural.

    Args:
        model: name of the first model, whose distribution is p.
        other: name of the other, whose distribution is q.
        data: `js_nats` (axis token): ½ KL(p‖m) + ½ KL(q‖m) with m = (p + q) / 2, from 0 (equal) to ln 2 = 0.693 (no
            token in common); `kl_nats` (token): KL(p ‖ q); `delta_logprob_nats` (token): ln q - ln p of the token that
            follows, NaN at the end of the text; `argmax_changed` (token): 1 where the likeliest token is another;
            `logprob_nats` (case, token): of the token that follows, NaN at the end; `entropy_nats` (case, token);
            `top_id` and `top_logprob` (case, token, rank): the likeliest tokens; `vocab_str` (vocab): what these show
            as. case is model, other.
    """

    model: str
    other: str
    data: xr.Dataset

    @property
    def nbytes(self) -> int:
        """Memory that the arrays take."""
        return int(self.data.nbytes)

    @staticmethod
    def size(n_tokens: int, d_vocab: int) -> int:
        """Memory in bytes that the distributions of both models take while they are compared.

        Args:
            n_tokens: of the text.
            d_vocab: entries of a distribution.
        """
        return 2 * _FLOAT * n_tokens * d_vocab

    def __repr__(self) -> str:
        js, changed = self.data["js_nats"].values, self.data["argmax_changed"].values
        return (
            f"Shift from {self.model} to {self.other} after {len(js):,} tokens: mean JS {js.mean():.4g} nats, at most "
            f"{js.max():.4g}; another likeliest token after {int(changed.sum()):,}"
        )


def shift(
    model: Any,
    other: Any,
    text: str | Batch,
    *,
    top_k: int = 5,
    bos: BosPolicy = "model",
    memory_limit: int | None = None,
    progress: bool | Listener = True,
) -> Shift:
    """How far two models' predictions are apart along a text; one pass of each.

    For shifts along answers that one of the models writes, with a null and what the shifted tokens decide, run
    `model-shift`.

    Args:
        model: an opened model, or anything that `open_model` takes.
        other: the model to set beside it, with the same tokenizer.
        text: one text, or a `Batch` that holds one; `model` cuts it into tokens.
        top_k: how many of the likeliest tokens of each distribution are kept.
        bos: as in `run`.
        memory_limit: bytes that may be used above the loaded models; most of the free memory if None. Whole
            distributions of both models are held: 8 bytes × tokens × vocabulary.
        progress: as in `run`.

    Raises:
        InputError: the models have different tokenizers, or `top_k` is below 1.
        TextError: there is not exactly one text, or it is too long for one of the models.
        CapabilityError: one of them predicts no tokens.
        PlanError: it does not fit in memory.

    Example:
        >>> shift("smollm2-135m-instruct", open_model("smollm2-135m-instruct", dtype="bfloat16"), "One")  # doctest: +SKIP
    """
    from probekit.models import open_model

    models: list[Any] = [open_model(model, lazy=True), open_model(other, lazy=True)]
    if top_k < 1:
        raise InputError(f"Found top_k={top_k}; expected at least 1.")
    names = [m.info.name for m in models]
    for m in models:
        m.info.require(_LOGITS.point)
    if not share_tokenizer(*models):
        raise InputError(
            f"The models {names[0]!r} and {names[1]!r} have different tokenizers, so that their predictions are about "
            "different tokens. Compare models that share one."
        )
    batch = _one_text(models, text, bos)
    logits = []
    with Progress(2, **told(progress)) as bar:
        for m in models:
            if hasattr(m, "load"):
                m.load()
            trace, _ = run_pass(m, Forward((_LOGITS,)), batch, memory_limit=memory_limit, progress=bar)
            logits.append(trace[_LOGITS]["value"].values)
            if memory_limit is not None:
                memory_limit -= logits[-1].nbytes
    return Shift(names[0], names[1], _compared(models[0], batch, logits, top_k))


def _one_text(models: list[Any], text: str | Batch, bos: BosPolicy) -> Batch:
    batch: Batch = (
        text if isinstance(text, Batch) else models[0].tokenize([text] if isinstance(text, str) else text, bos)
    )
    if len(batch) != 1:
        raise TextError(f"Two models are compared on one text; found {len(batch)}. Take one at a time.")
    for m in models:
        limit = m.info.context_length
        if limit is not None and batch.n_tokens > limit:
            raise TextError(f"The text has {batch.n_tokens:,} tokens; {m.info.name!r} reads at most {limit:,}.")
    return batch


def _compared(model: Model, batch: Batch, logits: list[np.ndarray], top_k: int) -> xr.Dataset:
    import xarray as xr

    n, following = len(logits[0]), np.asarray(batch.next_ids)
    parts = []
    for a in range(0, n, _ROWS):
        here = slice(a, a + _ROWS)
        parts.append(_some(log_softmax(logits[0][here]), log_softmax(logits[1][here]), following[here], top_k))
    found = {name: np.concatenate([p[name] for p in parts], axis=axis) for name, (axis, *_) in _VARIABLES.items()}
    ids = np.unique(found["top_id"])
    variables: dict[str, Any] = {
        name: (dims, found[name], {"units": unit, "long_name": words})
        for name, (_, dims, unit, words) in _VARIABLES.items()
    }
    variables["vocab_str"] = ("vocab", np.asarray(model.decode(ids.tolist()), dtype=object))
    return xr.Dataset(variables, coords=token_coords(batch) | {"case": list(CASES), "vocab": ids})


_BOTH = ("case", "token")
# Where rows are joined, axes, unit, words.
_VARIABLES: dict[str, tuple[int, tuple[str, ...], str, str]] = {
    "js_nats": (0, ("token",), "nats", "Jensen-Shannon divergence of both distributions after the token"),
    "kl_nats": (0, ("token",), "nats", "KL(model ‖ other)"),
    "delta_logprob_nats": (0, ("token",), "nats", "log-probability of the token that follows, other minus model"),
    "argmax_changed": (0, ("token",), "1", "1 where the likeliest token is another"),
    "logprob_nats": (1, _BOTH, "nats", "log-probability of the token that follows"),
    "entropy_nats": (1, _BOTH, "nats", "entropy of the distribution after the token"),
    "top_id": (1, (*_BOTH, "rank"), "1", "ids of the likeliest tokens"),
    "top_logprob": (1, (*_BOTH, "rank"), "nats", "their log-probabilities"),
}


def _some(log_p: np.ndarray, log_q: np.ndarray, following: np.ndarray, top_k: int) -> dict[str, np.ndarray]:
    """A few rows; `following` is negative where no token follows."""
    both, known = (log_p, log_q), following >= 0
    rows = np.arange(len(following))
    own = np.stack([np.where(known, one[rows, np.maximum(following, 0)], np.nan) for one in both])
    top = np.stack([_likeliest(one, top_k) for one in both])
    return {
        "js_nats": jensen_shannon(log_p, log_q),
        "kl_nats": kullback_leibler(log_p, log_q),
        "delta_logprob_nats": own[1] - own[0],
        "argmax_changed": (top[0, :, 0] != top[1, :, 0]).astype(np.int64),
        "logprob_nats": own,
        "entropy_nats": np.stack([entropy(one) for one in both]),
        "top_id": top,
        "top_logprob": np.stack([np.take_along_axis(one, ids, axis=-1) for one, ids in zip(both, top, strict=True)]),
    }


def _likeliest(log_p: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k likeliest tokens, likeliest first, of equal ones those with the smaller ids; axes token, rank."""
    k = min(k, log_p.shape[-1])
    least = -np.partition(-log_p, k - 1, axis=-1)[:, k - 1]
    found = np.empty((len(log_p), k), dtype=np.int64)
    for row, (values, cut) in enumerate(zip(log_p, least, strict=True)):
        some = np.flatnonzero(values >= cut)
        found[row] = some[np.argsort(-values[some], kind="stable")][:k]
    return found

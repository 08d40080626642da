"""What attention and MLP of each block add to the residual stream of each token, read out as tokens on demand."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probekit.core import Batch, BosPolicy, CapabilityError, Capture, Forward, InputError, TextError
from probekit.engine import Listener, Progress, human, run_pass, told
from probekit.reduce import Keep

if TYPE_CHECKING:
    import xarray as xr

    from probekit.core import Model, ModelInfo, Trace
    from probekit.reduce.frozen_reader import FrozenReader

PARTS = ("attention", "mlp")
_FLOAT = 4  # bytes


def sublayer_writes(
    model: Any,
    text: str | Batch,
    *,
    layers: Sequence[int] | None = None,
    bos: BosPolicy = "model",
    memory_limit: int | None = None,
    progress: bool | Listener = True,
) -> Writes:
    """Run one text once, and keep what attention and MLP of each block add to the stream of each token.

    What a sub-layer adds is what the stream gains across it: after a post-norm and a residual multiplier, where the
    family has them. Afterwards, which tokens it promotes is a matrix product away; the model is not run again.

    Args:
        model: an opened model, or anything that `open_model` takes.
        text: one text, or a `Batch` that holds one.
        layers: blocks that are kept, counted from 0 or, if negative, from the end; all if None.
        bos: as in `run`.
        memory_limit: bytes that may be used above the loaded model; most of the free memory if None.
        progress: as in `run`: a bar, or a function that is told of every `Step`, and ends the run by raising.

    Returns:
        `Writes`, of three arrays of layers × tokens × d_model in float32.

    Raises:
        PlanError: it does not fit in memory; nothing has run then.
        TextError: there is not exactly one text, or it is too long for the model.
        InputError: there is no such layer.
        CapabilityError: the model does not show its unembedding or its sub-layers.
        SelfCheckError: the model's final norm is no LayerNorm or RMSNorm.

    Example:
        >>> writes = sublayer_writes("smollm2-135m-instruct", "The capital of France is")  # doctest: +SKIP
        >>> writes.at(layer=20, token=-1)["promoted_str"].sel(case="mlp").values  # doctest: +SKIP
    """
    from probekit.models import open_model
    from probekit.reduce.frozen_reader import FrozenReader

    opened: Any = open_model(model, lazy=True)
    info: ModelInfo = opened.info
    batch: Batch = text if isinstance(text, Batch) else opened.tokenize([text] if isinstance(text, str) else text, bos)
    if len(batch) != 1:
        raise TextError(f"Writes are kept of one text; found {len(batch)}. Take one for each text.")
    if info.context_length is not None and batch.n_tokens > info.context_length:
        raise TextError(f"The text has {batch.n_tokens:,} tokens; the model reads at most {info.context_length:,}.")
    kept = _layers(layers, info.n_layers)
    captures = {s: _captures(s, None if layers is None else kept) for s in _sites(info)}
    if hasattr(opened, "load"):
        opened.load()
    unembed = getattr(opened, "unembed", None)
    if unembed is None:
        raise CapabilityError(f"{info.name!r} ({type(opened).__name__}) does not show its unembedding.")
    request = Forward(tuple(c for some in captures.values() for c in some))
    with Progress(**told(progress)) as bar:
        trace, _ = run_pass(opened, request, batch, memory_limit=memory_limit, progress=bar)
    seen = {s: _rows(trace, some) for s, some in captures.items()}
    del trace
    after = seen["resid_post"]
    if "resid_mid" in seen:
        attention, mlp = seen["resid_mid"], after - seen["resid_mid"]
        attention -= seen.pop("resid_pre")
    else:
        attention, mlp = seen["attn_out"], seen["mlp_out"]
    added = {"attention": attention, "mlp": mlp}
    return Writes(batch, opened, kept, added, after, FrozenReader(unembed, list(after)))


def _sites(info: ModelInfo) -> tuple[str, ...]:
    # What a sub-layer adds is the difference of the stream around it; where both run side by side, its own output.
    if "resid_mid" in info.sites:
        return "resid_pre", "resid_mid", "resid_post"
    return "attn_out", "mlp_out", "resid_post"


def _captures(site: str, layers: Sequence[int] | None) -> list[Capture]:
    return [Capture(site, Keep())] if layers is None else [Capture(f"{site}.{i}", Keep()) for i in layers]


def _rows(trace: Trace, captures: Sequence[Capture]) -> np.ndarray:
    """Axes layer, token, d_model."""
    found = [np.asarray(trace[c]["value"].transpose("layer", ...).values) for c in captures]
    return found[0] if len(found) == 1 else np.concatenate(found)


def _layers(wanted: Sequence[int] | None, n_layers: int) -> tuple[int, ...]:
    if wanted is None:
        return tuple(range(n_layers))
    strange = [i for i in wanted if not -n_layers <= i < n_layers]
    if strange or not wanted:
        raise InputError(f"The blocks are 0 to {n_layers - 1}; found {strange or 'none'}.")
    return tuple(sorted({i % n_layers for i in wanted}))


@dataclass(frozen=True, repr=False, eq=False)
class Writes:
    """What attention and MLP of each block wrote, of one text. Build it with `probekit.sublayer_writes`.

    Logit changes are read through the final norm, its scale frozen at that of the stream that leaves the block, and the
    unembedding. Under that scale, the logits of the stream that enters the block, the change by attention and the change
    by the MLP sum to the lens' logits of the stream that leaves it. A factor after the unembedding is part of this; a
    soft-cap is not: where the family has one, changes are of the logits before it.

    It holds the model's unembedding, and with it the memory that this takes, for as long as it lives.

    Args:
        batch: the text that ran.
        model: shows what ids are.
        layers: the blocks that are kept.
        added: by "attention" and "mlp", what was added; axes layer, token, d_model.
        after: the stream that leaves each block; axes layer, token, d_model.
        reader: turns rows into logits.
    """

    batch: Batch
    model: Model
    layers: tuple[int, ...]
    added: dict[str, np.ndarray]
    after: np.ndarray
    reader: FrozenReader

    @property
    def nbytes(self) -> int:
        """Memory that the arrays take, without the model's unembedding."""
        return self.after.nbytes + sum(a.nbytes for a in self.added.values()) + self.reader.scale.nbytes

    @staticmethod
    def size(info: ModelInfo, n_tokens: int, n_layers: int | None = None) -> int:
        """What `nbytes` will be, before anything runs.

        Args:
            info: the model.
            n_tokens: of the text.
            n_layers: how many blocks are kept; all if None.
        """
        rows = n_tokens * (info.n_layers if n_layers is None else n_layers)
        return rows * (3 * _FLOAT * info.d_model + 2 * _FLOAT)

    def at(self, layer: int, token: int, k: int = 10) -> xr.Dataset:
        """The tokens that attention and MLP of a block promote and suppress most, at one token of the text.

        Args:
            layer: the block; negative from the end of the model.
            token: position in the text; negative from the end. What follows it is predicted here.
            k: how many tokens each way; at most the vocabulary.

        Returns:
            Axes `case` (attention, mlp) and `rank`: `promoted_id`, `promoted_str`, `promoted_logits` (largest change
            first) and `suppressed_…` (smallest first). `mean_logits`, axis `case`: the mean change over the vocabulary,
            which moves no probability; changes are not relative to it. `norm`, axis `case`: length of what was added.
            Attribute `softcap`: whether a soft-cap follows, which the changes leave out.

        Raises:
            InputError: this block was not kept, there is no such token, or k is below 1.
        """
        import xarray as xr

        if k < 1:
            raise InputError(f"At least one token has to be asked for; found k={k}.")
        row, place = self._row(layer), self._token(token)
        added = np.stack([self.added[part][row, place] for part in PARTS])
        change = self.reader.logits(added, [row] * 2, place)
        k = min(k, change.shape[-1])
        variables: dict[str, Any] = {
            "mean_logits": ("case", change.mean(-1)),
            "norm": ("case", np.linalg.norm(added, axis=-1)),
        }
        for name, ids in (("promoted", _largest(change, k)), ("suppressed", _largest(-change, k))):
            shown = [self.model.decode(some.tolist()) for some in ids]
            variables |= {
                f"{name}_id": (("case", "rank"), ids),
                f"{name}_str": (("case", "rank"), np.asarray(shown, dtype=object)),
                f"{name}_logits": (("case", "rank"), np.take_along_axis(change, ids, -1)),
            }
        found = xr.Dataset(variables, {"case": list(PARTS), "rank": np.arange(k)})
        for name in map(str, found.data_vars):
            found[name].attrs["units"] = (
                "logits" if name.endswith("logits") else "activation" if name == "norm" else "1"
            )
        return found.assign_attrs(layer=self.layers[row], token=place, softcap=self.reader.capped)

    def logits(self, layer: int, token: int) -> xr.DataArray:
        """The whole sum at one token and block, before a soft-cap; axes case (entering, attention, mlp, leaving), vocab.

        `entering` is the stream that enters the block, read under the scale of the one that leaves it, biases included;
        `leaving` the lens' logits after the block.

        Args:
            layer: as in `at`.
            token: as in `at`.
        """
        import xarray as xr

        row, place = self._row(layer), self._token(token)
        after, (attention, mlp) = self.after[row, place], (self.added[part][row, place] for part in PARTS)
        rows = np.stack([after.astype(np.float64) - attention - mlp, attention, mlp, after])
        values = self.reader.logits(rows, [row] * 4, place)
        values[[0, 3]] += self.reader.offset()
        cases = ["entering", *PARTS, "leaving"]
        return xr.DataArray(values, {"case": cases}, ("case", "vocab"), attrs={"units": "logits"})

    def follow(self, token: int, ids: Sequence[int]) -> xr.Dataset:
        """Chosen tokens through the layers, as the lens reads them at one token of the text; exact at any rank.

        Args:
            token: as in `at`.
            ids: tokens of the vocabulary.

        Returns:
            Axes `layer` (the blocks that are kept) and `vocab` (the ids): `logprob_nats`, normalised over the whole
            vocabulary, and `rank`, the number of tokens that are likelier.

        Raises:
            InputError: there is no such token or id.
        """
        import xarray as xr

        place, wanted = self._token(token), list(ids)
        offset, d_vocab = self.reader.offset(), self.model.info.d_vocab
        if not wanted or not all(0 <= i < d_vocab for i in wanted):
            raise InputError(f"Token ids are 0 to {d_vocab - 1:,}; found {wanted or 'none'}.")
        raw = self.reader.logits(self.after[:, place], range(len(self.layers)), place) + offset
        values = self.reader.capped_logits(raw)
        top = values.max(axis=1, keepdims=True)
        total = np.log(np.exp(values - top).sum(axis=1, keepdims=True, dtype=np.float64))
        logprob = values[:, wanted] - top - total
        rank = np.stack([(values > values[:, [i]]).sum(axis=1) for i in wanted], axis=1)
        axes = ("layer", "vocab")
        found = xr.Dataset(
            {"logprob_nats": (axes, logprob), "rank": (axes, rank)},
            {"layer": list(self.layers), "vocab": wanted},
        )
        found["logprob_nats"].attrs["units"], found["rank"].attrs["units"] = "nats", "1"
        return found

    def _row(self, layer: int) -> int:
        n = self.model.info.n_layers
        place = operator.index(layer) + (n if layer < 0 else 0)
        if place not in self.layers:
            raise InputError(f"Block {layer} is not among those kept: {', '.join(map(str, self.layers))}.")
        return self.layers.index(place)

    def _token(self, token: int) -> int:
        n = self.batch.n_tokens
        if not -n <= token < n:
            raise InputError(f"The text has the tokens 0 to {n - 1}; found {token}.")
        return operator.index(token) % n

    def __repr__(self) -> str:
        n = len(self.layers)
        return (
            f"Writes of {self.model.info.name}: attention and MLP of {n} block{'s' * (n != 1)}, "
            f"{self.batch.n_tokens:,} tokens, {human(self.nbytes)}"
        )


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Places of the k largest, in order, equal ones by place; axes case, rank."""
    some = np.argpartition(-values, k - 1, axis=-1)[:, :k]
    some.sort(axis=-1)
    order = np.argsort(-np.take_along_axis(values, some, -1), axis=-1, kind="stable")
    return np.take_along_axis(some, order, -1)

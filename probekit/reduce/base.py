"""What a reducer is: a rule that shrinks one point, the same for chunks, batches and machines.

A backend shows a reducer the activations of one micro-batch, piece by piece. `measure` turns a
piece into a few numbers; a `Recorder` puts them where they belong; what leaves is a `Partial`.
Partials of different micro-batches merge, in any order, and finish as an `xarray.Dataset`.

Reducers are frozen, hashable data and import no torch until they measure.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from probekit.core import SITES, Batch, InputError, Point, check_axes, token_coords

if TYPE_CHECKING:
    import torch
    import xarray as xr

    from .attention_blocks import AttentionBlock
    from .direct import DirectRows
    from .relations import BlockRows, ValueRows
    from .vocab_rows import VocabRows
    from .vocab_tiles import VocabNumbers

Reads = Literal["rows", "attention", "vocab", "direct", "block", "values"]


@dataclass(frozen=True)
class Field:
    """One array that a reducer makes.

    Args:
        dims: its axes without `layer`, which the point adds.
        unit: its unit, "1" for a pure number.
        help: what it is, in one sentence.
        per: for attention, whether a number belongs to the query or to the key of a pair. What
            belongs to a key adds up over blocks of queries.
    """

    dims: tuple[str, ...]
    unit: str
    help: str
    per: Literal["query", "key"] = "query"

    def __post_init__(self) -> None:
        check_axes(self.dims, self.help)


@dataclass(frozen=True)
class Rows:
    """Activations of one layer at every token of a micro-batch; no padding.

    Args:
        values: axes token, then the point's own.
        lengths: tokens per text.
        only: the position that the rows belong to, one row per text, where the others were left out.
    """

    values: torch.Tensor
    lengths: tuple[int, ...]
    only: int | None = None

    def at(self, position: int) -> torch.Tensor:
        """The row of each text at one position, negative from its end; axes text, then the point's own.

        Raises:
            InputError: a text has no such position.
        """
        return self.values if self.only == position else self.values[rows_at(position, self.lengths)]


def rows_at(position: int, lengths: Sequence[int]) -> list[int]:
    """Where each text's `position` lies when texts are laid end to end.

    Args:
        position: counted from the start of each text, or negative from its end.
        lengths: tokens per text.

    Raises:
        InputError: a text has no such position.
    """
    short = [n for n in lengths if not -n <= position < n]
    if short:
        raise InputError(f"Position {position} is outside a text of {short[0]} tokens, 0 to {short[0] - 1}.")
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    return [int(s) + position % n for s, n in zip(starts, lengths, strict=True)]


class Reducer(ABC):
    """Base of all reducers; subclasses are frozen dataclasses whose fields are plain values.

    Attributes:
        reads: what `measure` is shown: `Rows` of one layer, an `AttentionBlock`, `VocabRows`, `DirectRows`,
            `BlockRows` or `ValueRows`.
        wants_scores: for attention, whether the scores before the softmax are read too.
    """

    reads: ClassVar[Reads]
    wants_scores: ClassVar[bool] = False

    @property
    def key(self) -> str:
        """A short unique spelling, such as `top_magnitudes(k=3)`."""
        name = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(self).__name__).lstrip("_")
        # The base is no dataclass itself, every subclass is.
        values = ", ".join(f"{k}={v!r}" for k, v in dataclasses.asdict(self).items())  # type: ignore[call-overload]
        return f"{name}({values})"

    @abstractmethod
    def fields(self) -> Mapping[str, Field]:
        """The arrays it makes, by name."""

    @abstractmethod
    def measure(self, piece: Any) -> Mapping[str, torch.Tensor]:
        """The numbers of one piece, by field.

        Args:
            piece: `Rows` (numbers have axes token or text, then the field's other axes),
                `AttentionBlock` (text, head, query or key) or `VocabRows` (layer, token, others).
        """

    def settle(self, arrays: dict[str, torch.Tensor], lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """The recorded arrays of a micro-batch in their final form; called once per micro-batch."""
        return arrays

    def memory_bytes(self, n_tokens: int, n_heads: int, d_model: int) -> int:
        """Bytes that one layer's results take for `n_tokens`; an estimate for plans."""
        per_token, n_ranks = 0, getattr(self, "top_k", getattr(self, "k", 1))
        for field in self.fields().values():
            if "token" in field.dims:
                per_token += 4 * (n_heads if "head" in field.dims else 1) * (n_ranks if "rank" in field.dims else 1)
        return per_token * n_tokens


@dataclass
class Partial:
    """What one reducer has seen of some texts; merges with what it saw of others.

    Args:
        reducer: the reducer.
        point: where it looked.
        layers: the block numbers on the layer axis; empty for a point that exists once.
        arrays: by field, axes layer (if any) then the field's.
        index: corpus index of each text seen.
        lengths: tokens of each text seen.
    """

    reducer: Reducer
    point: Point
    layers: tuple[int, ...]
    arrays: dict[str, np.ndarray]
    index: tuple[int, ...]
    lengths: tuple[int, ...]

    def dims(self, field: str) -> tuple[str, ...]:
        """Axes of a field's array."""
        own = self.reducer.fields()[field].dims
        if self.reducer.reads == "rows" and {"token", "d_model"} & set(own):
            own = _at_site(own, SITES[self.point.site].dims)
        return ("layer", *own) if self.layers else own

    @staticmethod
    def merge(parts: Sequence[Partial]) -> Partial:
        """One partial that has seen all their texts."""
        first = parts[0]
        if len(parts) == 1:
            return first
        seen = [i for p in parts for i in p.index]
        if len(set(seen)) != len(seen):
            raise ValueError("the same text was seen by two partials that are to be merged")
        arrays = {
            name: np.concatenate([p.arrays[name] for p in parts], axis=first._along(name)) for name in first.arrays
        }
        lengths = tuple(n for p in parts for n in p.lengths)
        return Partial(first.reducer, first.point, first.layers, arrays, tuple(seen), lengths)

    def _along(self, field: str) -> int:
        dims = self.dims(field)
        return dims.index("token") if "token" in dims else dims.index("text")

    def finish(self, batch: Batch) -> xr.Dataset:
        """The labelled arrays, texts in the order of `batch`."""
        import xarray as xr

        place = {text: i for i, text in enumerate(self.index)}
        order = [place[text] for text in batch.index]
        offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        in_order = order == sorted(order)
        tokens = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in order])
        variables: dict[str, Any] = {}
        has_token = False
        for name, field in self.reducer.fields().items():
            array, dims = self.arrays[name], self.dims(name)
            has_token |= "token" in dims
            if not in_order:
                array = np.take(array, tokens if "token" in dims else np.asarray(order), axis=self._along(name))
            variables[name] = (dims, array, {"units": field.unit, "long_name": field.help})
        coords: dict[str, Any] = token_coords(batch) if has_token else {}
        if self.layers:
            coords["layer"] = list(self.layers)
        return xr.Dataset(variables, coords=coords)


def _at_site(own: tuple[str, ...], site: tuple[str, ...]) -> tuple[str, ...]:
    """A row reducer's axes where rows have other axes than token and d_model: all of them, or one more per head."""
    if "d_model" in own:
        i = own.index("d_model")
        return (*own[:i], *site[1:], *own[i + 1 :])
    i = own.index("token") + 1
    return (*own[:i], "head", *own[i:]) if "head" in site else own


class Recorder:
    """Puts what a reducer measures on one micro-batch where it belongs, on the device it was measured on.

    Args:
        reducer: the reducer.
        point: where it looks.
        layers: the block numbers that it looks at; (0,) for a point that exists once.
        lengths: tokens per text of the micro-batch.
    """

    def __init__(self, reducer: Reducer, point: Point, layers: tuple[int, ...], lengths: tuple[int, ...]) -> None:
        self.reducer, self.point, self.layers, self.lengths = reducer, point, layers, lengths
        self._slot = {layer: i for i, layer in enumerate(layers)}
        self._fields = dict(reducer.fields())
        self._arrays: dict[str, torch.Tensor] = {}
        self._host: dict[str, torch.Tensor] | None = None
        self._device: torch.device | None = None

    def wants(self, layer: int) -> bool:
        """Whether the reducer looks at this layer."""
        return layer in self._slot

    def _array(self, name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        if name not in self._arrays:
            self._arrays[name] = like.new_zeros((len(self.layers), *shape))
        return self._arrays[name]

    def rows(self, layer: int, rows: Rows | DirectRows | BlockRows | ValueRows) -> None:
        """Record one layer's activations."""
        for name, values in self.reducer.measure(rows).items():
            array = self._array(name, tuple(values.shape), values)
            array[self._slot[layer]] = values.to(array.device)  # blocks may be spread over devices

    def attention(self, layer: int, block: AttentionBlock) -> None:
        """Record one block of queries of one layer."""
        longest, first = max(self.lengths), block.first_head
        for name, values in self.reducer.measure(block).items():
            if "query" in self._fields[name].dims:  # whole maps, of one text
                whole = self._array(name, (block.n_heads or values.shape[1], longest, longest), values)
                n_heads, n_queries, n_keys = values.shape[1:]
                place = slice(first, first + n_heads), slice(block.start, block.start + n_queries), slice(n_keys)
                whole[self._slot[layer]][place] = values[0].to(whole.device)
                continue
            n_text, *some_heads, n = values.shape
            if not some_heads and first:
                continue  # the same for all heads, and recorded with the first ones
            shape = (n_text, *([block.n_heads or some_heads[0]] if some_heads else []), longest)
            array = self._array(name, shape, values)[self._slot[layer]]
            values = values.to(array.device)
            if some_heads:
                array = array[:, first : first + some_heads[0]]
            if self._fields[name].per == "query":
                array[..., block.start : block.start + n] = values
            else:
                array[..., :n] += values

    def vocab(self, layers: Sequence[int], start: int, rows: VocabRows | VocabNumbers) -> None:
        """Record the readout of some layers for the tokens from `start` on."""
        slots = [self._slot[layer] for layer in layers]
        n_tokens = sum(self.lengths)
        for name, values in self.reducer.measure(rows).items():
            array = self._array(name, (n_tokens, *values.shape[2:]), values)
            for slot, one in zip(slots, values, strict=True):
                array[slot, start : start + one.shape[0]] = one

    def recorded(self, field: str) -> torch.Tensor:
        """What was recorded of a field so far; axes layer, then the field's."""
        return self._arrays[field]

    def leave(self) -> None:
        """Start to move what was recorded off the device; `close` waits for it."""
        missing = set(self._fields) - set(self._arrays)
        if missing:
            raise RuntimeError(f"{self.point} never fired: {self.reducer.key} recorded nothing for {sorted(missing)}")
        arrays = self.reducer.settle(self._arrays, self.lengths)
        if self.reducer.reads == "attention":
            whole = {name for name, field in self._fields.items() if "query" in field.dims}
            arrays = {name: array if name in whole else self._pack(array) for name, array in arrays.items()}
        layered = SITES[self.point.site].layered
        self._device = next(iter(arrays.values())).device
        self._host = {name: (a if layered else a[0]).to("cpu", non_blocking=True) for name, a in arrays.items()}

    def close(self, index: tuple[int, ...]) -> Partial:
        """What was recorded, off the device; `index` are the texts' places in the corpus."""
        import torch

        if self._host is None:
            self.leave()
        assert self._host is not None
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        layers = self.layers if SITES[self.point.site].layered else ()
        host = {name: array.numpy() for name, array in self._host.items()}
        return Partial(self.reducer, self.point, layers, host, index, self.lengths)

    def _pack(self, array: torch.Tensor) -> torch.Tensor:
        # layer, text, (head,) position -> layer, (head,) token: lay the texts end to end, without padding
        import torch

        cut = [array[:, i, ..., :n] for i, n in enumerate(self.lengths)]
        return torch.cat(cut, dim=-1)

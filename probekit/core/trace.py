"""What a request brought back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .axes import check_axes
from .model import ModelInfo
from .requests import Capture
from .text import Batch

if TYPE_CHECKING:
    import xarray as xr


def token_coords(batch: Batch) -> dict[str, Any]:
    """The coordinates of the `token` axis: text, pos, token_id and token_str of every token; domain if texts have one."""
    # A lone surrogate is no text to the libraries further on; it shows as its escape.
    strings = [s.encode("utf-8", "backslashreplace").decode() for s in batch.strings]
    domains = np.repeat(np.asarray(batch.domains, dtype=object), batch.lengths)
    return {
        **({"domain": ("token", domains)} if any(batch.domains) else {}),
        "text": ("token", batch.text_of_token),
        "pos": ("token", batch.pos),
        "token_id": ("token", batch.ids),
        "token_str": ("token", np.asarray(strings, dtype=object)),
    }


@dataclass(frozen=True)
class Trace:
    """Reduced activations of one request, as labelled arrays.

    `trace[capture]` is an `xarray.Dataset` with the reducer's fields. Texts are laid end to end on
    the `token` axis, whose coordinates are `text`, `pos`, `token_id` and `token_str`; `layer` holds
    block numbers. There is no padding.

    Args:
        batch: the texts that ran.
        info: the model that ran them.
        data: one dataset per capture, by capture key.
        vocab: what token ids that occur in the data show as, by id.
    """

    batch: Batch
    info: ModelInfo
    data: Mapping[str, xr.Dataset]
    vocab: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, dataset in self.data.items():
            for name, array in dataset.data_vars.items():
                check_axes(tuple(str(d) for d in array.dims), f"{name} of {key}")

    def __getitem__(self, capture: Capture) -> xr.Dataset:
        if capture.key not in self.data:
            raise KeyError(f"This trace has no {capture.key}; it holds {sorted(self.data)}")
        return self.data[capture.key]

    def select(self, captures: tuple[Capture, ...]) -> Trace:
        """The share of one analysis: only the captures it asked for."""
        return Trace(self.batch, self.info, {c.key: self[c] for c in captures}, self.vocab)

    def vocab_table(self) -> xr.DataArray:
        """What token ids show as; axis `vocab` with the ids as its coordinate, ids ascending."""
        import xarray as xr

        ids = sorted(self.vocab)
        strings = np.asarray([self.vocab[i] for i in ids], dtype=object)
        return xr.DataArray(strings, dims="vocab", coords={"vocab": np.asarray(ids, dtype=np.int64)})

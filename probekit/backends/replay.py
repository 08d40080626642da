"""A stored trace in the place of a model: what was captured once can be analysed again without weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from probekit.core import (
    SITES,
    Batch,
    BosPolicy,
    CapabilityError,
    Capture,
    Forward,
    ModelInfo,
    Progress,
    Request,
    Trace,
)
from probekit.reduce import Partial, Reducer


class ReplayModel:
    """Serves the captures of a stored trace, and refuses everything else.

    Args:
        trace: what `probekit.engine.load_trace` read.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    @property
    def info(self) -> ModelInfo:
        """The model that was traced."""
        return self.trace.info

    @property
    def batch(self) -> Batch:
        """The texts that were traced."""
        return self.trace.batch

    def tokenize(self, texts: Sequence[str], bos: BosPolicy = "model") -> Batch:
        """A trace has no tokenizer.

        Raises:
            CapabilityError: always; run on `batch` instead.
        """
        raise CapabilityError("A replayed trace has no tokenizer; run on its own `batch`.")

    def decode(self, ids: Sequence[int]) -> tuple[str, ...]:
        """What ids that occur in the trace show as."""
        known = dict(zip(self.batch.ids.tolist(), self.batch.strings, strict=True)) | dict(self.trace.vocab)
        return tuple(known.get(i, f"[{i}]") for i in ids)

    def provenance(self) -> dict[str, Any]:
        """The traced model, marked as replayed."""
        return {"model": self.info.as_dict(), "backend": "replay", "versions": {}}

    def execute(self, request: Request, batch: Batch, progress: Progress | None = None) -> list[Partial]:
        """The stored captures of some of the stored texts.

        Raises:
            CapabilityError: the trace holds another text, no such capture, or no pass with these patches.
        """
        if not isinstance(request, Forward) or request.patches or request.order or request.against:
            raise CapabilityError("A replayed trace serves Forward requests without patches, order and reference.")
        stored = dict(zip(self.batch.index, self.batch.texts, strict=True))
        for index, text in zip(batch.index, batch.texts, strict=True):
            if index not in stored or stored[index].ids != text.ids:
                raise CapabilityError(f"Text {index} is not the text that was traced; run on the trace's own `batch`.")
        return [self._partial(capture, batch) for capture in request.captures]

    def _partial(self, capture: Capture, batch: Batch) -> Partial:
        if capture.key not in self.trace.data:
            held = ", ".join(sorted(self.trace.data))
            raise CapabilityError(f"The stored trace has no {capture.key}; it holds {held}. Run the model again.")
        assert isinstance(capture.reducer, Reducer)
        dataset = self.trace.data[capture.key]
        places = [self.batch.index.index(i) for i in batch.index]
        starts, lengths = self.batch.starts, self.batch.lengths
        tokens = np.concatenate([np.arange(starts[i], starts[i] + lengths[i]) for i in places])
        arrays = {}
        for name in capture.reducer.fields():
            array = dataset[name]
            chosen = array.isel(token=tokens) if "token" in array.dims else array.isel(text=places)
            arrays[name] = chosen.values
        layered = SITES[capture.point.site].layered
        layers = tuple(int(i) for i in dataset["layer"].values) if layered else ()
        return Partial(capture.reducer, capture.point, layers, arrays, batch.index, batch.lengths)

"""What `probekit models` shows."""

from __future__ import annotations

from dataclasses import dataclass

from .cache import model_folder, read_manifest
from .entries import CAPABILITIES, CATALOGUE, DEFAULT_MODEL, Kind
from .progress import size_text


@dataclass(frozen=True)
class Listed:
    """One row of the table of embedded models.

    Args:
        name: what to type.
        kind: decoder or encoder.
        licence: SPDX identifier.
        size: parameters and download size.
        capabilities: what it can be used for.
        cached: whether it opens without a network.
        default: whether it is used when no model is named.
        summary: one line on what it is.
        source: whose model it is.
    """

    name: str
    kind: Kind
    licence: str
    size: str
    capabilities: str
    cached: bool
    default: bool
    summary: str
    source: str


def listing() -> list[Listed]:
    """Every embedded model, the default first."""
    rows = [
        Listed(
            name=e.name,
            kind=e.kind,
            licence=e.licence,
            size=f"{e.n_params / 1e6:.0f} M parameters, {size_text(e.download_bytes)} download",
            capabilities=CAPABILITIES[e.kind],
            cached=read_manifest(model_folder(e.key)) is not None,
            default=e.name == DEFAULT_MODEL,
            summary=e.summary,
            source=e.source,
        )
        for e in CATALOGUE.values()
    ]
    return sorted(rows, key=lambda row: not row.default)

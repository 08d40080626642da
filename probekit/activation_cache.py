"""Raw activations of one text, with the access that users of TransformerLens type from memory."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from probekit.core import SITES, Batch, BosPolicy, Capture, Forward, InputError, Patch, Point, TextError, UnknownName
from probekit.engine import Listener, Progress, human, run_pass, told
from probekit.reduce import Keep, Maps

if TYPE_CHECKING:
    import xarray as xr

    from probekit.core import Model, ModelInfo, TokenText

DEFAULT_POINTS = ("resid_post", "logits")
Key = str | tuple[str, int] | Point


def cache(
    model: Any,
    text: str | Batch,
    points: Key | Sequence[Key] = DEFAULT_POINTS,
    *,
    patches: Sequence[Patch] = (),
    bos: BosPolicy = "model",
    memory_limit: int | None = None,
    progress: bool | Listener = True,
) -> ActivationCache:
    """Run one text and keep its raw activations, in float32.

    Args:
        model: an opened model, or anything that `open_model` takes.
        text: one text, or a `Batch` that holds one.
        points: where to look, in any spelling; a layered point without a layer (`"resid_post"`) means every layer.
            By default the residual stream after every block, and the logits. `"pattern.3"` gives whole attention
            maps, which grow with the square of the text.
        patches: what is changed on the way.
        bos: as in `run`.
        memory_limit: bytes that may be used above the loaded model; most of the free memory if None.
        progress: as in `run`.

    Returns:
        Arrays by point: `cache["resid_post", 3]`, `cache["resid_post", -1]`, `cache["blocks.3.hook_resid_post"]`.

    Raises:
        PlanError: it does not fit in memory; nothing has run then.
        TextError: there is not exactly one text, or it is too long for the model.
        InputError: an unknown point or layer, or a patch that does not fit.

    Example:
        >>> seen = cache("smollm2-135m-instruct", "One two three.", ("resid_post", "pattern.3"))  # doctest: +SKIP
        >>> seen["resid_post", -1].sizes  # doctest: +SKIP
    """
    from probekit.models import open_model

    opened: Model = open_model(model, lazy=True)
    batch = text if isinstance(text, Batch) else opened.tokenize([text] if isinstance(text, str) else text, bos)
    if len(batch) != 1:
        raise TextError(f"A cache holds one text; found {len(batch)}. Make one for each text.")
    limit = opened.info.context_length
    if limit is not None and batch.n_tokens > limit:
        raise TextError(f"The text has {batch.n_tokens:,} tokens; the model reads at most {limit:,}. Shorten it.")
    captures = {p: Capture(p, Maps() if p.site == "pattern" else Keep()) for p in _wanted(points, opened.info)}
    if hasattr(opened, "load"):
        opened.load()
    request = Forward(tuple(captures.values()), tuple(patches))
    with Progress(**told(progress)) as bar:
        trace, _ = run_pass(opened, request, batch, memory_limit=memory_limit, progress=bar)
    arrays: dict[Point, xr.DataArray] = {}
    for point, capture in captures.items():
        values = trace[capture]["value"]
        for layer in opened.info.require(point):
            layered = SITES[point.site].layered
            one = Point(point.site, layer) if layered else point
            arrays[one] = _labelled(values.sel(layer=layer) if layered else values, one, batch.texts[0])
    order = list(SITES)
    held = dict(sorted(arrays.items(), key=lambda kv: (order.index(kv[0].site), kv[0].layer or 0)))
    return ActivationCache(batch, opened.info.name, opened.info.n_layers, held)


def _wanted(points: Key | Sequence[Key], info: ModelInfo) -> list[Point]:
    """Each point once: a site with all its layers takes in those that were named one by one."""
    if isinstance(points, (str, Point)) or (len(points) == 2 and isinstance(points[1], int)):
        points = (cast(Key, points),)
    if not points:
        raise InputError(f"No point was given; the default is {', '.join(DEFAULT_POINTS)}.")
    every = [Point.of(cast(Key, p)) for p in points]
    whole = {p.site for p in every if p.layer is None}
    single = [Point(p.site, info.require(p)[0]) for p in every if p.layer is not None and p.site not in whole]
    return list(dict.fromkeys([*(p for p in every if p.layer is None), *single]))


def _labelled(values: xr.DataArray, point: Point, text: TokenText) -> xr.DataArray:
    import xarray as xr

    strings = [s.encode("utf-8", "backslashreplace").decode() for s in text.strings]
    about = {
        "token_str": np.asarray(strings, dtype=object),
        "token_id": np.asarray(text.ids),
        "pos": np.arange(len(text)),
    }
    if point.site == "pattern":
        coords: dict[str, Any] = {f"{dim}_str": (dim, about["token_str"]) for dim in ("query", "key")}
    else:
        coords = {name: ("token", array) for name, array in about.items()}
    attrs = {"units": values.attrs["units"], "long_name": SITES[point.site].help}
    return xr.DataArray(values.values, dims=values.dims, coords=coords, name=str(point), attrs=attrs)


@dataclass(frozen=True, repr=False, eq=False)
class ActivationCache(Mapping[str, "xr.DataArray"]):
    """Raw activations of one text, by point. Build it with `probekit.cache`.

    Keys are canonical spellings such as `resid_post.3`; access takes every spelling of a point, and a
    layered point without a layer gives its layers stacked. Arrays are float32 with named axes; the
    `token` axis carries `token_str`, `token_id` and `pos`.

    Args:
        batch: the text that ran.
        model: name of the model.
        n_layers: its number of blocks.
        arrays: what was seen, one layer each.
    """

    batch: Batch
    model: str
    n_layers: int
    arrays: Mapping[Point, xr.DataArray]

    def __getitem__(self, key: Key) -> xr.DataArray:
        point = Point.of(key)
        if SITES[point.site].layered and point.layer is None:
            return self.stack(point.site)
        return self._find(point)

    def _find(self, point: Point) -> xr.DataArray:
        (layer,) = point.layers(self.n_layers)
        exact = Point(point.site, layer) if SITES[point.site].layered else point
        if exact not in self.arrays:
            raise UnknownName(
                f"This cache does not hold {exact}. It holds {self._held()}. "
                f'Ask for it: pk.cache(model, text, points=(…, "{exact}")).'
            )
        return self.arrays[exact]

    def __contains__(self, key: object) -> bool:
        try:
            self[key]  # type: ignore[index]
        except (InputError, TypeError, ValueError):
            return False
        return True

    def get(self, key: Key, default: Any = None) -> Any:
        """The array at a point, or the default where the cache does not hold it."""
        try:
            return self[key]
        except InputError:
            return default

    def __iter__(self) -> Iterator[str]:
        return iter(str(p) for p in self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def stack(self, site: str) -> xr.DataArray:
        """All layers that the cache holds of a site; axes layer, then the site's own.

        Raises:
            UnknownName: it holds none.
        """
        import xarray as xr

        point = Point.of(site)
        layers = [p.layer for p in self.arrays if p.site == point.site and p.layer is not None]
        if not layers:
            raise UnknownName(
                f"This cache holds no layer of {point.site}. It holds {self._held()}. "
                f'Ask for it: pk.cache(model, text, points=(…, "{point.site}")).'
            )
        one = [self.arrays[Point(point.site, layer)] for layer in layers]
        stacked = xr.concat(one, "layer", coords="minimal", compat="override").assign_coords(layer=layers)
        return stacked.rename(point.site).assign_attrs(one[0].attrs)

    @property
    def logits(self) -> xr.DataArray:
        """Next-token logits as the model returns them; axes token, vocab."""
        return self["logits"]

    @property
    def tokens(self) -> xr.DataArray:
        """What each token shows as, with its id and position; axis token."""
        import xarray as xr

        (text,) = self.batch
        coords = {"token_id": ("token", np.asarray(text.ids)), "pos": ("token", np.arange(len(text)))}
        return xr.DataArray(np.asarray(text.strings, dtype=object), dims="token", coords=coords, name="tokens")

    @property
    def nbytes(self) -> int:
        """Memory that the arrays take."""
        return sum(a.nbytes for a in self.arrays.values())

    def _rows(self) -> list[tuple[str, str, str]]:
        """Point, layers and axes, one row per site."""
        rows = []
        for site in dict.fromkeys(p.site for p in self.arrays):
            some = [p.layer for p in self.arrays if p.site == site and p.layer is not None]
            first = next(a for p, a in self.arrays.items() if p.site == site)
            rows.append((site, _runs(some), " × ".join(f"{d} {n:,}" for d, n in first.sizes.items())))
        return rows

    def _held(self) -> str:
        return ", ".join(f"{site}{f' (layers {layers})' if layers else ''}" for site, layers, _ in self._rows())

    def _title(self) -> str:
        shown = "".join(self.batch.strings)
        shown = shown if len(shown) <= 50 else shown[:48] + " …"
        return f"ActivationCache of {self.model}: {shown!r}, {self.batch.n_tokens} tokens, {human(self.nbytes)}"

    def __repr__(self) -> str:
        lines = [
            f"  {site:<11}{f'layers {layers}' if layers else '':<16} {axes}" for site, layers, axes in self._rows()
        ]
        return "\n".join([self._title(), *lines])

    def _repr_html_(self) -> str:
        cells = [[f"<code>{html.escape(site)}</code>", layers or "–", axes] for site, layers, axes in self._rows()]
        body = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{c}</td>" for c in row) + "</tr>" for row in cells
        )
        head = "<tr>" + "".join(f"<th style='text-align:left'>{h}</th>" for h in ("point", "layers", "axes")) + "</tr>"
        return f"<p>{html.escape(self._title())}</p><table>{head}{body}</table>"


def _runs(layers: Sequence[int]) -> str:
    """Layer numbers, consecutive ones as a range."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs)

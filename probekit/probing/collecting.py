"""Collecting activations at chosen tokens of many texts, a few texts at a time."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probekit._version import __version__
from probekit.batches import make_batch
from probekit.core import (
    SITES,
    Batch,
    BosPolicy,
    Capture,
    Chat,
    Forward,
    InputError,
    PlanError,
    Point,
    token_coords,
)
from probekit.engine import Listener, Progress, available_memory, human, run_pass, told
from probekit.reduce import AtPosition, Keep

from .collected import FORMAT, VERSION, Collected, Rows, begin_folder, remove_with, write_manifest, write_rows
from .places import Places, Positions, groups_of, places_of

if TYPE_CHECKING:
    from probekit.core import Model, ModelInfo

Key = str | tuple[str, int] | Point
IN_MEMORY = 1 << 30  # bytes; larger arrays go to a folder
CHUNK_BYTES, CHUNK_TOKENS = 1 << 26, 4096  # raw activations, and tokens, that are held at once at most
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class CollectPlan:
    """What collecting will take, worked out before a model runs.

    Args:
        n_texts: texts.
        n_groups: prompts: texts that are alike count once.
        n_rows: chosen tokens.
        points: by site, its layers; empty for a site that exists once.
        nbytes: bytes of all arrays.
        in_memory: whether they are held in memory if no folder is given.
    """

    n_texts: int
    n_groups: int
    n_rows: int
    points: Mapping[str, tuple[int, ...]]
    nbytes: int
    in_memory: bool

    def __str__(self) -> str:
        where = "in memory" if self.in_memory else "in a temporary folder, unless one is given"
        what = ", ".join(f"{site}{f' ({len(n)} layers)' if n else ''}" for site, n in self.points.items())
        return (
            f"{self.n_rows:,} rows of {self.n_texts:,} texts ({self.n_groups:,} prompts) at {what}: "
            f"{human(self.nbytes)} {where}"
        )


@dataclass(frozen=True)
class _Work:
    """A collection that is about to be made."""

    model: Model
    batch: Batch
    places: Places
    groups: np.ndarray
    labels: np.ndarray | None
    layers: Mapping[str, tuple[int, ...]]
    dtype: np.dtype

    def shape(self, site: str) -> tuple[int, ...]:
        info, layers = self.model.info, self.layers[site]
        heads = info.n_kv_heads if site in ("k", "v") else info.n_heads
        sizes = {
            "d_model": info.d_model,
            "d_mlp": info.d_mlp,
            "d_head": info.d_head,
            "vocab": info.d_vocab,
            "head": heads,
        }
        own = tuple(sizes[d] for d in SITES[site].dims[1:])
        return (*([len(layers)] if layers else []), len(self.places), *own)

    @property
    def nbytes(self) -> int:
        return sum(int(np.prod(self.shape(s))) for s in self.layers) * self.dtype.itemsize

    def plan(self) -> CollectPlan:
        least = min(IN_MEMORY, available_memory() // 4)
        n_groups = len(np.unique(self.groups))
        sizes = (len(self.batch), n_groups, len(self.places))
        return CollectPlan(*sizes, self.layers, self.nbytes, self.nbytes <= least)


def collect(
    model: Any,
    texts: Any,
    points: Key | Sequence[Key] = "resid_post",
    *,
    positions: Positions = "last",
    labels: Sequence[Any] | None = None,
    groups: Sequence[Hashable] | None = None,
    dtype: str = "float32",
    folder: str | Path | None = None,
    bos: BosPolicy = "model",
    chat: Chat = False,
    memory_limit: int | None = None,
    progress: bool | Listener = True,
) -> Collected:
    """Activations at chosen tokens of many texts, for probes; every text runs once, a few at a time.

    The output of the token embedding is kept too, where the model shows it: it is what a probe is compared with. Arrays
    of more than 1 GiB (or a quarter of the free memory) are memory-mapped .npy files, in `folder` or in a temporary
    folder that goes when the result does. Texts with the same token ids, or the same words but for case and blanks,
    are one group.

    Args:
        model: an opened model, or anything that `open_model` takes.
        texts: as in `run`; records may also have a `label` and a `group`.
        points: where to look, in any spelling; without a layer, every layer.
        positions: "last", "all", a position or several (negative from the end), a function that says of a token's
            string whether it is wanted, or for each text its positions or a boolean for each of its tokens.
        labels: one for each text; labels for each token are given to the probe later.
        groups: what belongs together, one for each text: texts of one document, template or minimal pair.
        dtype: "float32" or "float16".
        folder: where to keep it, for `Collected.open`; must be new, empty, or hold a collection that broke off.
        bos: as in `run`.
        chat: as in `run`.
        memory_limit: bytes that a pass may use above the loaded model; most of the free memory if None.
        progress: as in `run`.

    Raises:
        InputError: an unknown point, a position that a text does not have, labels or groups that do not fit, or an
            activation that is not finite in `dtype`.
        StoreError: the folder is taken or its disk too small.
        PlanError: a pass does not fit in memory.

    Example:
        >>> texts = [{"text": "Good morning.", "label": "en"}, {"text": "Guten Morgen.", "label": "de"}]
        >>> collect("smollm2-135m-instruct", texts)["resid_post", 12].sizes  # doctest: +SKIP
    """
    work = _prepare(model, texts, points, positions, labels, groups, dtype, bos, chat)
    plan = work.plan()
    target, temporary = (Path(folder), False) if folder is not None else (None, False)
    if target is None and not plan.in_memory:
        target, temporary = Path(tempfile.mkdtemp(prefix="probekit-collected-")), True
    manifest = _manifest(work)
    if target is not None:
        try:
            begin_folder(target, manifest, plan.nbytes)
        except BaseException:
            if temporary:
                shutil.rmtree(target, ignore_errors=True)
            raise
    try:
        arrays = _run(work, target, memory_limit, progress)
        about = _about(work)
        if target is not None:
            write_rows(target, about)
            manifest = {**manifest, "complete": True}
            write_manifest(target, manifest)
    except BaseException:
        if target is not None:
            _remove(target, work.layers, temporary)
        raise
    if target is not None:
        arrays = {s: np.load(target / f"{s}.npy", mmap_mode="r", allow_pickle=False) for s in arrays}
    found = Collected(arrays, work.layers, about, manifest, target)
    if temporary and target is not None:
        found._temporary.append(remove_with(found, target))
    return found


def plan(
    model: Any,
    texts: Any,
    points: Key | Sequence[Key] = "resid_post",
    *,
    positions: Positions = "last",
    dtype: str = "float32",
    bos: BosPolicy = "model",
    chat: Chat = False,
) -> CollectPlan:
    """What `collect` would take; loads the tokenizer but no weights. Arguments as there."""
    return _prepare(model, texts, points, positions, None, None, dtype, bos, chat).plan()


def _prepare(
    model: Any,
    texts: Any,
    points: Any,
    positions: Positions,
    labels: Sequence[Any] | None,
    groups: Sequence[Hashable] | None,
    dtype: str,
    bos: BosPolicy,
    chat: Chat,
) -> _Work:
    from probekit.models import open_model

    if dtype not in DTYPES:
        raise InputError(f"Found dtype={dtype!r}; expected one of {', '.join(DTYPES)}.")
    opened: Model = open_model(model, lazy=True)
    texts, said = _records(texts)
    labels = said.get("label") if labels is None else labels
    groups = said.get("group") if groups is None else groups
    batch = make_batch(opened, (), texts, bos, None, chat)
    for i, n in enumerate(batch.lengths):
        if n == 0:
            raise InputError(f"Text {i} has no token.")
    if labels is not None and len(labels) != len(batch):
        raise InputError(
            f"Found {len(labels)} labels for {len(batch)} texts; expected one for each. Labels for each token are given "
            "to the probe, in the order of the rows."
        )
    batch = Batch(batch.texts, batch.bos, begins=batch.begins, template=batch.template)
    layers = _layers(points, opened.info)
    own = None if labels is None else np.asarray(labels)
    places = places_of(positions, batch)
    return _Work(opened, batch, places, groups_of(batch, groups), own, layers, np.dtype(dtype))


def _records(texts: Any) -> tuple[Any, dict[str, list[Any]]]:
    """Texts without what only probes read of their records, and that, by name."""
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not any(isinstance(t, Mapping) for t in texts):
        return texts, {}
    said: dict[str, list[Any]] = {}
    for name in ("label", "group"):
        values = [t.get(name) if isinstance(t, Mapping) else None for t in texts]
        if any(v is not None for v in values):
            missing = [i for i, v in enumerate(values) if v is None]
            if missing:
                raise InputError(f"Text {missing[0]} has no {name} and others do. Give all of them one.")
            said[name] = values
    plain = [{k: v for k, v in t.items() if k not in said} if isinstance(t, Mapping) else t for t in texts]
    return plain, said


def _layers(points: Any, info: ModelInfo) -> dict[str, tuple[int, ...]]:
    """By site the layers that are kept; the token embedding comes last if it was not asked for."""
    if isinstance(points, (str, Point)) or (len(points) == 2 and isinstance(points[1], int)):
        points = (points,)
    if not points:
        raise InputError("No point was given, such as 'resid_post' or 'resid_post.3'.")
    found: dict[str, set[int]] = {}
    for point in map(Point.of, points):
        if SITES[point.site].dims[0] != "token" or point.site == "router":
            raise InputError(f"{point} cannot be collected: it has no vector per token.")
        found.setdefault(point.site, set()).update(info.require(point) if SITES[point.site].layered else ())
    if "embed" in info.sites:
        found.setdefault("embed", set())
    return {site: tuple(sorted(layers)) for site, layers in found.items()}


def _manifest(work: _Work) -> dict[str, Any]:
    batch = work.batch
    provenance = work.model.provenance()
    return {
        "format": FORMAT,
        "version": VERSION,
        "complete": True,
        "probekit": __version__,
        **provenance,
        "model": {**work.model.info.as_dict(), **(provenance.get("model") or {})},
        "texts": {
            "n_texts": len(batch),
            "n_tokens": batch.n_tokens,
            "bos": batch.bos,
            **({"beginning_of_sequence": batch.begins} if batch.begins else {}),
            **({"chat_template": batch.template} if batch.template else {}),
            "digest": f"sha256:{batch.digest}",
        },
        "positions": work.places.words,
        "sites": {
            s: {"layers": list(n), "shape": list(work.shape(s)), "dtype": str(work.dtype)}
            for s, n in work.layers.items()
        },
    }


def _about(work: _Work) -> Rows:
    batch, places = work.batch, work.places
    at = np.asarray(batch.starts)[places.text] + places.pos
    coords = token_coords(batch)
    numbers = {"text": places.text, "pos": places.pos, "position": places.position}
    numbers |= {"token_id": batch.ids[at], "group": work.groups[places.text]}
    strings = np.asarray(coords["token_str"][1], dtype=object)[at]
    return Rows(numbers, strings, batch.ids.astype(np.int32), np.asarray(batch.lengths), work.labels)


def _run(
    work: _Work, folder: Path | None, memory_limit: int | None, progress: bool | Listener
) -> dict[str, np.ndarray]:
    """Fill the arrays, chunk by chunk."""
    arrays: dict[str, np.ndarray] = {}
    try:
        for site in work.layers:
            shape = work.shape(site)
            if folder is None:
                arrays[site] = np.empty(shape, work.dtype)
            else:
                arrays[site] = np.lib.format.open_memmap(folder / f"{site}.npy", "w+", work.dtype, shape)
    except MemoryError as error:
        raise PlanError(f"The rows take {human(work.nbytes)}, more than there is memory. Give a folder.") from error
    single = work.places.single
    reducer = Keep() if single is None else AtPosition(single)
    captures = {
        site: [Capture(Point(site, n), reducer) for n in layers] or [Capture(Point(site), reducer)]
        for site, layers in work.layers.items()
    }
    if hasattr(work.model, "load"):
        work.model.load()
    request = Forward(tuple(c for some in captures.values() for c in some), why="activations are collected")
    chunks = _chunks(work, single is not None)
    starts = np.concatenate([[0], np.cumsum(np.bincount(work.places.text, minlength=len(work.batch)))])
    with Progress(len(chunks), **told(progress)) as bar:
        for chunk in chunks:
            part = work.batch.select(chunk)
            trace, _ = run_pass(work.model, request, part, memory_limit=memory_limit, progress=bar)
            to = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in chunk])
            inside = np.concatenate(
                [work.places.pos[starts[i] : starts[i + 1]] + b for i, b in zip(chunk, part.starts, strict=True)]
            )
            for site, some in captures.items():
                for k, capture in enumerate(some):
                    seen = trace[capture]["value"]
                    values: np.ndarray = (seen.isel(layer=0) if "layer" in seen.dims else seen).values
                    one = arrays[site][k] if work.layers[site] else arrays[site]
                    one[to] = _fitting(values if single is not None else values[inside], work.dtype, capture, part)
    for array in arrays.values():
        if isinstance(array, np.memmap):
            array.flush()
    return arrays


def _fitting(values: np.ndarray, dtype: np.dtype, capture: Capture, part: Batch) -> np.ndarray:
    with np.errstate(over="ignore"):
        done = values.astype(dtype)
    if not np.isfinite(done).all():
        seen = (
            "is not finite"
            if not np.isfinite(values).all()
            else f"reaches {np.abs(values).max():.3g}, too large for {dtype}"
        )
        raise InputError(
            f"An activation at {capture.point} of the texts {list(part.index[:5])} … {seen}. Use float32, or look at the model."
        )
    return done


def _chunks(work: _Work, single: bool) -> list[list[int]]:
    """Texts that are collected together: alike in length, and few enough that their raw activations are small."""
    width = sum(int(np.prod(work.shape(s))) // len(work.places) for s in work.layers) * 4
    most = CHUNK_TOKENS if single else min(CHUNK_TOKENS, max(256, CHUNK_BYTES // width))
    wanted = set(work.places.text.tolist())
    order = sorted(wanted, key=lambda i: -work.batch.lengths[i])
    chunks: list[list[int]] = [[]]
    n = 0
    for i in order:
        if chunks[-1] and n + work.batch.lengths[i] > most:
            chunks.append([])
            n = 0
        chunks[-1].append(i)
        n += work.batch.lengths[i]
    return chunks


def _remove(folder: Path, sites: Mapping[str, Any], temporary: bool) -> None:
    """Take away what was begun: all of a temporary folder, only probekit's own files of a user's."""
    if temporary:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for name in (*(f"{s}.npy" for s in sites), "rows.npz", "manifest.json", "manifest.json.partial"):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()

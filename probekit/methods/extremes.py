"""Massive entries of the residual stream: where they lie, and as places that can be changed, with controls."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probekit.core import Batch, Patch, Replace

MIN_MAGNITUDE, RATIO = 100.0, 1000.0  # arXiv 2402.17762, section 2
ROLES = ("first position", "special", "first delimiter", "delimiter", "other")
CONTROLS = ("other dimension", "other position")
WHY = {
    "zero": "massive entries set to zero",
    "mean": "massive entries set to their mean over the other texts",
    "other dimension": "control: the same tokens, other dimensions set to zero",
    "other position": "control: the same dimensions, other tokens set to zero",
}
_PLACES = ("the first position", "a special token", "the first delimiter", "a further delimiter", "another token")
_DELIMITER = re.compile(r"[ \t]*(?:\.|\.?[\r\n]+)[ \t]*")
_SPECIAL = re.compile(
    r"<\|[^|]+\|>|<｜[^｜]+｜>|</?s>|<(?:bos|eos|pad|unk|cls|sep|mask|start_of_turn|end_of_turn)>"
    r"|\[(?:BOS|EOS|PAD|UNK|CLS|SEP|MASK|INST|/INST)\]"
)


@dataclass(frozen=True)
class Entry:
    """One large number in the residual stream that leaves a block.

    Args:
        layer: the block.
        text: row of the text in its batch.
        pos: position within the text.
        dim: dimension.
        value: signed.
    """

    layer: int
    text: int
    pos: int
    dim: int
    value: float

    @property
    def role(self) -> tuple[bool, int]:
        """Entries of different texts with the same role stand for one another: at the start or not, and dimension."""
        return self.pos == 0, self.dim


@dataclass(frozen=True)
class Largest:
    """The largest entries of every token, as `TopMagnitudes` and `MedianMagnitude` give them.

    Args:
        value: signed; axes layer, token, rank.
        dim: axes layer, token, rank.
        median: median magnitude; axes layer, text.
        batch: the texts.
    """

    value: np.ndarray
    dim: np.ndarray
    median: np.ndarray
    batch: Batch

    def passing(self, min_magnitude: float = MIN_MAGNITUDE, ratio: float = RATIO) -> np.ndarray:
        """Which entries are massive: magnitude above both bounds, strictly; axes layer, token, rank."""
        place = np.repeat(np.arange(len(self.batch)), self.batch.lengths)
        magnitude, scale = np.abs(self.value), self.median[:, place, None]
        return (magnitude > min_magnitude) & (magnitude > ratio * scale)

    def entries(self, layer: int, min_magnitude: float = MIN_MAGNITUDE, ratio: float = RATIO) -> tuple[Entry, ...]:
        """Massive entries after one block, by text, position and falling magnitude."""
        place, pos = np.repeat(np.arange(len(self.batch)), self.batch.lengths), self.batch.pos
        found = np.argwhere(self.passing(min_magnitude, ratio)[layer])
        return tuple(
            Entry(layer, int(place[t]), int(pos[t]), int(self.dim[layer, t, r]), float(self.value[layer, t, r]))
            for t, r in found
        )

    def layers(self, min_magnitude: float = MIN_MAGNITUDE, ratio: float = RATIO, share: float = 0.0) -> list[int]:
        """Blocks after which some entry is massive, in at least this share of the texts."""
        tokens = self.passing(min_magnitude, ratio).any(axis=2)  # layer token
        texts = np.add.reduceat(tokens, self.batch.starts, axis=1) > 0
        return [int(i) for i in np.flatnonzero(texts.any(axis=1) & (texts.mean(axis=1) >= share))]

    def first(self, min_magnitude: float = MIN_MAGNITUDE, ratio: float = RATIO) -> int | None:
        """The first block after which half of the texts hold massive entries; else any text; None if none does.

        One odd token of one text does not make a block the first.
        """
        found = self.layers(min_magnitude, ratio, 0.5) or self.layers(min_magnitude, ratio)
        return found[0] if found else None

    def peaks(self, mlp_norm: np.ndarray, attn_norm: np.ndarray) -> dict[str, tuple[Any, Any]]:
        """Each text's largest entry as variables of a result: where it lies, its path through depth, its writer.

        The writer is the block after which its magnitude has grown most, unknown counted as zero.

        Args:
            mlp_norm: norm of what each block's MLP adds; axes layer, token.
            attn_norm: the same of its attention.
        """
        pos, dim, layer, paths = zip(*(self.path(i) for i in range(len(self.batch))), strict=True)
        path = np.stack(paths, axis=1)  # layer text
        writer = np.diff(np.nan_to_num(np.abs(path)), axis=0, prepend=0.0).argmax(axis=0)
        at = writer, np.array(self.batch.starts) + pos
        share = mlp_norm[at] / np.maximum(mlp_norm[at] + attn_norm[at], 1e-30)
        places = {"peak_pos": pos, "peak_dim": dim, "peak_layer": layer}
        variables: dict[str, tuple[Any, Any]] = {name: ("text", [*values]) for name, values in places.items()}
        return variables | {
            "peak_path": (("layer", "text"), path), "writer": ("text", writer), "writer_mlp_share": ("text", share)
        }  # fmt: skip

    def carriers(self, d_model: int, min_magnitude: float, ratios: Mapping[str, float]) -> dict[str, tuple[Any, Any]]:
        """Massive entries per layer, token and dimension, as variables of a result; each once per ratio.

        Args:
            d_model: width of the residual stream.
            min_magnitude: magnitude that a massive entry exceeds.
            ratios: multiples of the median that it exceeds, by the ending of the variables' names.
        """
        variables: dict[str, tuple[Any, Any]] = {}
        for end, ratio in ratios.items():
            found = self.passing(min_magnitude, ratio)
            variables[f"n_massive{end}"] = ("layer", found.sum(axis=(1, 2)) / len(self.batch))
            variables[f"massive_layers{end}"] = ("token", found.any(axis=2).sum(axis=0))
            variables[f"dim_texts{end}"] = ("d_model", self.texts_per_dim(d_model, min_magnitude, ratio))
        return variables

    def path(self, text: int) -> tuple[int, int, int, np.ndarray]:
        """Position, dimension and layer of the largest entry of one text, and that entry's value through depth.

        The path is NaN where the entry is not among its token's largest.
        """
        at = slice(self.batch.starts[text], self.batch.starts[text] + self.batch.lengths[text])
        here, dims = self.value[:, at], self.dim[:, at]
        layer, pos = np.unravel_index(np.abs(here[..., 0]).argmax(), here.shape[:2])
        its_dim = int(dims[layer, pos, 0])
        found = dims[:, pos] == its_dim  # layer rank
        path = np.where(found.any(axis=1), np.where(found, here[:, pos], 0).sum(axis=1), np.nan)
        return int(pos), its_dim, int(layer), path

    def texts_per_dim(self, d_model: int, min_magnitude: float = MIN_MAGNITUDE, ratio: float = RATIO) -> np.ndarray:
        """In how many texts each dimension holds a massive entry, after whatever block; axis d_model."""
        _, token, _ = found = np.nonzero(self.passing(min_magnitude, ratio))
        place = np.repeat(np.arange(len(self.batch)), self.batch.lengths)
        held = np.zeros((len(self.batch), d_model), dtype=bool)
        held[place[token], self.dim[found]] = True
        return held.sum(axis=0)


def token_roles(batch: Batch, bos_id: int | None = None) -> np.ndarray:
    """What part each token plays, a name from `ROLES`; axis token.

    A delimiter is a full stop or newlines, with blanks around them or not; the first one is counted from the second
    token on, so that a text that opens with a delimiter still has one. Special tokens are told by the id of the
    beginning-of-sequence token and by how they are spelt, such as <|im_end|>, </s> or [SEP].
    """
    roles = []
    for text in batch:
        seen = False
        for pos, (token, shown) in enumerate(zip(text.ids, text.strings, strict=True)):
            if pos == 0:
                roles.append("first position")
            elif token == bos_id or _SPECIAL.fullmatch(shown.strip()):
                roles.append("special")
            elif _DELIMITER.fullmatch(shown):
                roles.append("delimiter" if seen else "first delimiter")
                seen = True
            else:
                roles.append("other")
    return np.array(roles, dtype=object)


def carriers_in_words(held: np.ndarray, role: np.ndarray, shown: np.ndarray, text: np.ndarray) -> str:
    """Where carriers of massive entries lie, role by role, with the commonest tokens.

    Args:
        held: whether each token carries one.
        role: what part it plays, from `ROLES`.
        shown: what it shows as.
        text: text that it belongs to.
    """
    return carriers_said(*tally_carriers(held, role, shown, text))


def tally_carriers(
    held: np.ndarray, role: np.ndarray, shown: np.ndarray, text: np.ndarray
) -> tuple[list[int], dict[str, int]]:
    """Texts with carriers in each role of `ROLES`, and how often each token carries, by role, a tab and the token."""
    texts = [len(np.unique(text[held & (role == name)])) for name in ROLES]
    return texts, dict(Counter(f"{r}\t{t}" for r, t in zip(role[held], shown[held], strict=True)))


def carriers_said(texts: Sequence[int], words: Mapping[str, int]) -> str:
    """What `tally_carriers` found, in words."""
    parts = []
    for name, place, n in zip(ROLES, _PLACES, texts, strict=True):
        if n:
            own = Counter({k.partition("\t")[2]: c for k, c in words.items() if k.partition("\t")[0] == name})
            tokens = [repr(t) for t, _ in own.most_common(4)]
            tokens = [*tokens[:3], "…"] if len(tokens) > 3 else tokens
            parts.append(f"{place} in {n} text{'s' * (n != 1)} ({', '.join(tokens)})")
    return "; ".join(parts)


def gaussian_ratio(n: int) -> float:
    """Expected largest magnitude of n independent Gaussian entries over their median magnitude.

    The quantile at which the largest of n magnitudes is expected, from Gumbel's limit law.
    """
    from scipy.stats import norm

    return float(norm.ppf(1 - 1 / (2 * n) * np.exp(-np.euler_gamma)) / norm.ppf(0.75))


def in_words(layers: Sequence[int], last: str = ", ") -> str:
    """Ascending layer numbers in words, consecutive ones as a range.

    Args:
        layers: the numbers.
        last: what stands before the last of several.
    """
    edges = [0, *(i for i in range(1, len(layers)) if layers[i] != layers[i - 1] + 1), len(layers)]
    parts = [layers[a:b] for a, b in zip(edges, edges[1:], strict=False) if b > a]
    named = [str(p[0]) if len(p) == 1 else f"{p[0]} to {p[-1]}" for p in parts] or ["none"]
    return last.join([*([", ".join(named[:-1])] if named[:-1] else []), named[-1]])


def changes(entries: Sequence[Entry], batch: Batch, d_model: int) -> dict[str, tuple[Patch, ...]]:
    """The patches of each case of `WHY`; cases in which there is nothing to change are left out."""
    cases = {
        "zero": zeroed(entries, batch),
        "mean": averaged(entries, batch),
        "other dimension": other_dims(entries, batch, d_model),
        "other position": other_positions(entries, batch),
    }
    return {case: patches for case, patches in cases.items() if patches}


def zeroed(entries: Sequence[Entry], batch: Batch) -> tuple[Patch, ...]:
    """Set each entry to zero in the stream that leaves its block."""
    return tuple(_patch(e, batch, 0.0) for e in entries)


def averaged(entries: Sequence[Entry], batch: Batch) -> tuple[Patch, ...]:
    """Set each entry to its mean over the other texts, sign included; entries no other text has are left alone.

    The mean is over entries of the same role: at the start of a text or later, and the same dimension. A text's own
    entries never count, so every text is held out from the mean that it is given.
    """
    patches = []
    for entry in entries:
        others = [e.value for e in entries if e.role == entry.role and e.text != entry.text and e.layer == entry.layer]
        if others:
            patches.append(_patch(entry, batch, Replace([[float(np.mean(others))]])))
    return tuple(patches)


def other_dims(entries: Sequence[Entry], batch: Batch, d_model: int, seed: int = 0) -> tuple[Patch, ...]:
    """The control: as many entries at the same tokens, in random dimensions that hold no massive entry, set to zero.

    A text's draws depend on its tokens and the seed alone, not on the texts beside it.
    """
    free = np.setdiff1d(np.arange(d_model), sorted({e.dim for e in entries}))
    draws = _Draws(batch, seed)
    places: dict[tuple[int, int, int], list[Entry]] = {}
    for entry in entries:
        places.setdefault((entry.layer, entry.text, entry.pos), []).append(entry)
    patches = []
    for (layer, text, pos), some in places.items():
        patches += [_patch(Entry(layer, text, pos, d, 0.0), batch, 0.0) for d in draws(text, free, len(some))]
    return tuple(patches)


def other_positions(entries: Sequence[Entry], batch: Batch, seed: int = 0) -> tuple[Patch, ...]:
    """The other control: the same dimensions at random tokens that hold no massive entry, set to zero."""
    taken, draws = {(e.text, e.pos) for e in entries}, _Draws(batch, seed)
    places: dict[tuple[int, int, int], list[Entry]] = {}
    for entry in entries:
        places.setdefault((entry.layer, entry.text, entry.dim), []).append(entry)
    patches = []
    for (layer, text, dim), some in places.items():
        free = np.array([p for p in range(batch.lengths[text]) if (text, p) not in taken], dtype=int)
        patches += [_patch(Entry(layer, text, p, dim, 0.0), batch, 0.0) for p in draws(text, free, len(some))]
    return tuple(patches)


class _Draws:
    """Random places, drawn for each text by a generator of its own."""

    def __init__(self, batch: Batch, seed: int) -> None:
        self._rngs = [np.random.default_rng([seed, *text.ids]) for text in batch]

    def __call__(self, text: int, free: np.ndarray, n: int) -> list[int]:
        """`n` different ones of `free`, or all of them where there are fewer."""
        return [int(x) for x in self._rngs[text].choice(free, size=min(n, len(free)), replace=False)]


def _patch(entry: Entry, batch: Batch, edit: float | Replace) -> Patch:
    return Patch(("resid_post", entry.layer), edit, (entry.pos,), dims=(entry.dim,), texts=(batch.index[entry.text],))

"""What an analysis asks for: frozen, hashable data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from .branching import Branch
from .edits import Patch, Values
from .errors import InputError
from .points import Point

if TYPE_CHECKING:
    from .text import Batch


@runtime_checkable
class ReducerSpec(Protocol):
    """The part of a reducer that a request needs: it is hashable and has a key (see `probekit.reduce`)."""

    @property
    def key(self) -> str:
        """A short unique spelling, such as `top_magnitudes(k=3)`."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Capture:
    """A pair (point, reducer): what to look at, and how to shrink it before it leaves the forward pass.

    Args:
        point: a `Point` or any spelling of one; a layered site without a layer means every layer.
        reducer: a reducer of `probekit.reduce`.
    """

    point: Point
    reducer: ReducerSpec

    def __init__(self, point: Point | str | tuple[str, int], reducer: ReducerSpec) -> None:
        object.__setattr__(self, "point", Point.of(point))
        object.__setattr__(self, "reducer", reducer)
        if not isinstance(reducer, Hashable) or not hasattr(reducer, "key"):
            raise InputError(f"Expected a reducer of probekit.reduce for the point {self.point}, found {reducer!r}.")

    @property
    def key(self) -> str:
        """A short unique spelling, such as `resid_post:norm()`."""
        return f"{self.point}:{self.reducer.key}"


@dataclass(frozen=True)
class LogitDifference:
    """A number per text, made of its logits at one position: sum over `plus` minus sum over `minus`.

    Args:
        plus: per text of the request, in order, the token id that counts for it.
        minus: per text, the token id that counts against it; -1 for none.
        position: where the logits are read, negative from the end.
    """

    plus: tuple[int, ...]
    minus: tuple[int, ...]
    position: int = -1

    def __post_init__(self) -> None:
        if len(self.plus) != len(self.minus):
            raise InputError(f"Expected one id per text; found {len(self.plus)} for and {len(self.minus)} against.")


@dataclass(frozen=True)
class NextTokenEntropy:
    """A number per text: the entropy of its next-token distribution at one position, in nats.

    Over the whole vocabulary, at temperature 1.

    Args:
        position: where the distribution is read, negative from the end.
    """

    position: int = -1


@dataclass(frozen=True)
class Reference:
    """Another run's residual stream leaving the last block, from which its next-token distributions follow.

    Args:
        rows: axes token, d_model; texts laid end to end.
        index: corpus index of each text.
        lengths: tokens of each text.

    Raises:
        InputError: the rows are not as many as the texts have tokens.
    """

    rows: Values
    index: tuple[int, ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        shape, n = self.rows.array.shape, sum(self.lengths)
        if len(shape) != 2 or shape[0] != n or len(self.index) != len(self.lengths):
            raise InputError(
                f"A reference for {len(self.index)} texts of {n} tokens has rows of shape {shape}; expected one row "
                "per token, and as many lengths as texts."
            )

    def of(self, batch: Batch) -> np.ndarray:
        """The rows of some of the texts, in the order of `batch`; axes token, d_model.

        Raises:
            InputError: a text is not part of the reference, or has another length there.
        """
        ends = np.cumsum(self.lengths)
        places = {text: slice(end - n, end) for text, end, n in zip(self.index, ends, self.lengths, strict=True)}
        for text, n in zip(batch.index, batch.lengths, strict=True):
            found = places.get(text)
            if found is None or found.stop - found.start != n:
                what = "is not part of it" if found is None else f"has {found.stop - found.start} there"
                raise InputError(f"Text {text} of {n} tokens cannot be compared with the reference: it {what}.")
        return np.concatenate([self.rows.array[places[text]] for text in batch.index])


@dataclass(frozen=True)
class Forward:
    """One forward pass over every text.

    Args:
        captures: what comes back, reduced.
        patches: what is changed on the way, in this order.
        model: the role of the model this goes to, for analyses that compare models.
        texts: corpus indices of the texts that run; None for all.
        gradient_of: if given, captures see the gradient of this number with respect to the
            activation at their point, instead of the activation.
        order: the block that runs in each place, such as (0, 2, 1, 3) for two that are swapped; None for their own
            order. `resid_pre`, `resid_mid` and `resid_post` belong to the place, points inside a block to the block.
        rows: instead of `texts`: the corpus index of the text in each row of the pass. A text may run in several rows,
            each under its own patches; patches and results then count rows, not texts.
        against: if given, readouts at `resid_post` compare with this run's final distribution (`kl_nats` is
            KL(reference ‖ layer), at the last layer too) instead of their own.
        inputs: instead of the run's texts: token ids of texts that run in their place, such as random tokens.
        why: what the pass is for, in a few words, for plans; requests that differ in nothing else share a pass.
    """

    captures: tuple[Capture, ...]
    patches: tuple[Patch, ...] = ()
    model: str = "model"
    texts: tuple[int, ...] | None = None
    gradient_of: LogitDifference | NextTokenEntropy | None = None
    order: tuple[int, ...] | None = None
    against: Reference | None = None
    rows: tuple[int, ...] | None = None
    inputs: tuple[tuple[int, ...], ...] | None = None
    why: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.texts, self.rows, self.inputs)) > 1:
            raise InputError("A request names the texts that run, the text of each row, or inputs; found several.")
        if self.inputs is not None and not (self.inputs and all(self.inputs)):
            raise InputError("The inputs of a request are token ids, at least one for each of at least one text.")

    @property
    def pass_key(self) -> tuple[object, ...]:
        """Requests with the same key can share one pass."""
        where = self.texts, self.rows, self.inputs
        return self.model, self.patches, where, self.gradient_of, self.order, self.against


@dataclass(frozen=True)
class Embed:
    """One embedding per text, from a text-embedding model.

    Args:
        texts: what is embedded, in place of the run's texts.
        normalise: whether each embedding is scaled to unit length.
        cut: whether a text that is longer than the model reads is cut at its end, and not refused.
        total: texts in all requests of this kind that follow one another, for the progress bar; 0 if not known.
        model: the role of the model this goes to.
        why: what it is for, in a few words.
    """

    texts: tuple[str, ...]
    normalise: bool = True
    cut: bool = False
    total: int = field(default=0, compare=False)
    model: str = "model"
    why: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.texts:
            raise InputError("A request for embeddings needs texts; found none.")


@dataclass(frozen=True)
class Embedded:
    """What an `Embed` request brought back.

    Args:
        values: axes text, d_model; float32.
        ids: the token ids that each text ran as, special tokens included.
        n_cut: texts that were cut because the model does not read so many tokens.
    """

    values: np.ndarray
    ids: tuple[tuple[int, ...], ...]
    n_cut: int = 0


@dataclass(frozen=True)
class Similarities:
    """How near each text lies to a text it is compared with.

    Embeddings do not leave the model. A run that keeps a journal answers a request that it has answered before from
    there, so that long work is best asked for in parts.

    Args:
        texts: what is embedded; a text longer than the model reads is cut at its end, as by encoding with
            sentence-transformers.
        anchors: the texts that they are compared with; each is embedded once.
        to: for each text, the place of its anchor.
        watched: for each text, a token id whose occurrences are counted; empty for none.
        total: texts in all requests of this kind that follow one another, for the progress bar; 0 if not known.
        model: the role of the model this goes to.
        why: what it is for, in a few words.

    Raises:
        InputError: the lengths do not agree.
    """

    texts: tuple[str, ...]
    anchors: tuple[str, ...]
    to: tuple[int, ...]
    watched: tuple[int, ...] = ()
    total: int = field(default=0, compare=False)
    model: str = "model"
    why: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        n = len(self.texts)
        if not n or len(self.to) != n or (self.watched and len(self.watched) != n):
            raise InputError(
                f"{n} texts to compare need as many places of anchors and, if any, watched ids; found {len(self.to)} "
                f"and {len(self.watched)}."
            )
        if not all(0 <= i < len(self.anchors) for i in self.to):
            raise InputError(f"Expected places of {len(self.anchors)} anchors; found {min(self.to)} to {max(self.to)}.")

    @cached_property
    def key(self) -> str:
        """What the answer depends on beside the model: a hash of texts, anchors and watched ids."""
        content = json.dumps([self.texts, self.anchors, self.to, self.watched])
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class Compared:
    """What a `Similarities` request brought back.

    Args:
        cosine: of each text with its anchor; float32, axis text.
        count: occurrences of the watched id in each text; axis text, empty where none was watched.
        tokens: how many tokens each text ran as, special ones included; axis text.
        n_cut: texts that were cut because the model does not read so many tokens.
    """

    cosine: np.ndarray
    count: np.ndarray
    tokens: np.ndarray
    n_cut: int


@dataclass(frozen=True)
class Columns:
    """What every query of a text pays to one of its tokens, by layer and head, in a text-embedding model.

    Args:
        texts: what runs, in place of the run's texts; special tokens are added.
        at: for each text, the position of the token that is looked at, special tokens counted.
        optional: whether a model that shows no attention answers with the reason, and not with an error.
        total: texts in all requests of this kind that follow one another, for the progress bar; 0 if not known.
        model: the role of the model this goes to.
        why: what it is for, in a few words.

    Raises:
        InputError: there is not one position per text.
    """

    texts: tuple[str, ...]
    at: tuple[int, ...]
    optional: bool = False
    total: int = field(default=0, compare=False)
    model: str = "model"
    why: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.texts or len(self.at) != len(self.texts) or min(self.at) < 0:
            raise InputError(
                f"Attention columns need texts, and a position from 0 for each; found {len(self.texts)} texts and the "
                f"positions {list(self.at[:8])}."
            )


@dataclass(frozen=True)
class AttentionColumns:
    """What a `Columns` request brought back.

    Args:
        values: attention probabilities; float32, axes layer, head, query. The queries of all texts lie end to end,
            special tokens included and without padding. With causal attention, queries in front of the token pay 0.
        lengths: queries of each text; axis text.
        missing: why the model shows no attention, if it shows none; there are no values then.
    """

    values: np.ndarray
    lengths: np.ndarray
    missing: str = ""

    def of(self, text: int) -> np.ndarray:
        """The column of one text; axes layer, head, query."""
        end = int(self.lengths[: text + 1].sum())
        return self.values[..., end - int(self.lengths[text]) : end]


@dataclass(frozen=True)
class Vocabulary:
    """Every id of a model's tokenizer, decoded and encoded again: a `VocabularyTable`.

    Args:
        model: the role of the model this goes to.
    """

    model: str = "model"


@dataclass(frozen=True)
class Weights:
    """The rows that a model keeps for each id: `VocabularyWeights`, read off its files where they allow it.

    Args:
        model: the role of the model this goes to.
    """

    model: str = "model"


@dataclass(frozen=True)
class Tokenize:
    """Token ids of texts: a tuple of ids per text.

    Args:
        texts: what is tokenised; an empty one gives the special tokens alone.
        special: whether the tokenizer adds the special tokens that it adds by itself.
        model: the role of the model this goes to.
    """

    texts: tuple[str, ...]
    special: bool = False
    model: str = "model"


@dataclass(frozen=True)
class Texts:
    """The run's texts as they were tokenised: a `Batch`; no model runs."""

    model: str = "model"


LookUp = Columns | Embed | Similarities | Texts | Tokenize | Vocabulary | Weights
Request = Forward | Branch | LookUp

"""Everything that is known about one token: spelling, bytes, rows, neighbours, behaviour, stored results."""

from __future__ import annotations

import html
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from probekit.analysis import Result, fmt, load_results
from probekit.core import (
    Batch,
    Branch,
    CapabilityError,
    Forward,
    InputError,
    Model,
    Request,
    Vocabulary,
    VocabularyTable,
    VocabularyWeights,
    Weights,
)
from probekit.engine import run_pass
from probekit.engine.look_up import answer
from probekit.methods.repeating import FAMILIES, prompts, written
from probekit.methods.token_categories import categories, is_byte_level, token_bytes
from probekit.methods.token_rows import Neighbour, Placed, TokenRows
from probekit.plots import visible

_STEPS, _TRIALS = 3, 6  # of the behavioural verification, as undertrained-tokens has them
_NOT_WRITTEN = 0.01


@dataclass(frozen=True)
class Stored:
    """What a stored result says of the token.

    Args:
        analysis: its name.
        folder: where it is.
        model: the model it is of.
        facts: by variable (and place on a second axis), the value.
    """

    analysis: str
    folder: str
    model: str
    facts: Mapping[str, float | str]


@dataclass(frozen=True)
class TokenCard:
    """Everything known about one token. Tokens are untrusted text: what shows them never interprets them.

    Args:
        model: the model's name.
        token: its id.
        piece: how the vocabulary spells it.
        shown: what it shows as.
        text: what it decodes to in the middle of a text.
        bytes_hex: the bytes it stands for, in hexadecimal; "" where nothing tells.
        category: what becomes of its text; see `undertrained-tokens`.
        special: whether the tokenizer treats it as special.
        encodes_to: the ids that its text encodes to.
        encodes_shown: what these show as.
        numbers: norms of its rows, and indicators of being under-trained (small is suspicious); empty for models that
            do not show their weights.
        reference: what indicators measure the distance from; "" without any.
        neighbours: tokens whose unembedding rows have the largest cosine with its own.
        written: by prompt, the largest probability of it where it should follow; None if the model was not asked.
        stored: what stored results say of it.
    """

    model: str
    token: int
    piece: str
    shown: str
    text: str
    bytes_hex: str
    category: str
    special: bool
    encodes_to: tuple[int, ...]
    encodes_shown: tuple[str, ...]
    numbers: Mapping[str, Placed]
    reference: str
    neighbours: tuple[Neighbour, ...]
    written: Mapping[str, float] | None
    stored: tuple[Stored, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """What the card says, as pairs of a name and a line of visible text."""
        ids = ", ".join(f"{i} {_quoted(s)}" for i, s in zip(self.encodes_to, self.encodes_shown, strict=True))
        found = [
            ("token", f"{self.token} {_quoted(self.shown)} of {self.model}"),
            ("piece", _quoted(self.piece)),
            ("bytes", self.bytes_hex or "not known"),
            ("category", f"{self.category}{'; special to the tokenizer' if self.special else ''}"),
            ("encodes to", ids or "nothing"),
        ]
        for name, n in self.numbers.items():
            found.append((name, f"{fmt(n.value)} (percentile {n.percentile:.1f} of the ordinary tokens)"))
        if self.reference:
            found.append(("reference", f"{self.reference}; small distances from it are suspicious"))
        near = ", ".join(f"{_quoted(n.shown)} ({n.token}) {n.cosine:.2f}" for n in self.neighbours)
        if near:
            found.append(("neighbours", near))
        if self.written is not None:
            said = ", ".join(f"{name} {_share(p)}" for name, p in self.written.items())
            verdict = "not written" if max(self.written.values()) < _NOT_WRITTEN else "written"
            found.append(
                ("verification", f"{verdict} (below {_NOT_WRITTEN:.0%} in every prompt counts as not): {said}")
            )
        for result in self.stored:
            facts = ", ".join(f"{k} {_plain(v)}" for k, v in result.facts.items())
            found.append((result.analysis, f"{facts or 'does not hold this token'} ({result.model}, {result.folder})"))
        return [(name, visible(line, keep_whitespace=True)) for name, line in found]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name.ljust(width)}  {line}" for name, line in rows)

    def _repr_html_(self) -> str:
        lines = "".join(
            f'<tr><th style="text-align:left;vertical-align:top">{html.escape(name)}</th>'
            f'<td style="text-align:left;white-space:pre-wrap">{html.escape(line)}</td></tr>'
            for name, line in self.rows()
        )
        return f"<table>{lines}</table>"


class TokenCards(tuple[TokenCard, ...]):
    """Cards of several tokens, in order; shows each of them."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n\n".join(map(str, self))

    def _repr_html_(self) -> str:
        return "".join(card._repr_html_() for card in self)


def token_card(
    model: Any,
    token: int | str | Sequence[int | str],
    *,
    n_neighbours: int = 8,
    verify: bool = False,
    results: Iterable[str | Path] = (),
) -> TokenCard | TokenCards:
    """Everything known about a token: how it is spelt, what its rows say, what the model does with it.

    Loads no weights where they can be read off safetensors files, unless the token is to be verified.

    Args:
        model: an opened model, or anything that `open_model` takes.
        token: an id; the exact text of a token, with its leading space; any other text, for each of its tokens; or
            several of these.
        n_neighbours: tokens with the largest cosine to name.
        verify: ask the model to write it, as undertrained-tokens does.
        results: folders of stored runs on the same tokenizer; whatever they hold by token id is shown.

    Returns:
        A card; `TokenCards` where `token` stands for several tokens.

    Raises:
        InputError: there is no such token, or a stored result is of another tokenizer.
        CapabilityError: the model shows no vocabulary, or cannot be asked to write.

    Example:
        >>> token_card("smollm2-135m-instruct", 36744)  # doctest: +SKIP
    """
    book = TokenBook(model)
    several = isinstance(token, Sequence) and not isinstance(token, str)
    wanted: list[Any] = list(token) if isinstance(token, Sequence) and not isinstance(token, str) else [token]
    ids = [i for one in wanted for i in book.ids(one)]
    if not ids:
        raise InputError("No token was named.")
    stored = [(Path(folder), load_results(folder)) for folder in results]
    for folder, found in stored:
        for result in found.values():
            _check_same(result, book.model, folder)
    asked = _converse(book.model, _written(book.table, book.kinds, ids)) if verify else None
    cards = TokenCards(
        replace(
            book.card(i, n_neighbours=n_neighbours),
            written=None if asked is None else dict(zip(FAMILIES, map(float, asked[place]), strict=True)),
            stored=tuple(_facts(r, str(folder), i) for folder, rs in stored for r in rs.values() if _by_token(r)),
        )
        for place, i in enumerate(ids)
    )
    return cards if several or len(cards) > 1 else cards[0]


class TokenBook:
    """A model's vocabulary, read once: each card of it then takes a moment. Holds the unembedding in float32.

    Loads no weights where they can be read off safetensors files.

    Args:
        model: an opened model, or anything that `open_model` takes.

    Raises:
        CapabilityError: the model shows no vocabulary.

    Example:
        >>> TokenBook("smollm2-135m-instruct").card(36744)  # doctest: +SKIP
    """

    def __init__(self, model: Any) -> None:
        from probekit.models import open_model

        self.model: Model = open_model(model, lazy=True)
        self.table: VocabularyTable = answer(self.model, Vocabulary())
        self.kinds = categories(self.table)
        self._rows = TokenRows.of(_weights(self.model), self.table, self.kinds)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def nbytes(self) -> int:
        """Memory that its arrays take."""
        return self._rows.nbytes

    def ids(self, token: int | str) -> list[int]:
        """An id itself; the ids that decode to exactly this text; or else what the text encodes to.

        Raises:
            InputError: there is no such token.
        """
        return _ids_of(token, self.table, self.model)

    def texts(self, ids: Iterable[int]) -> list[str]:
        """What each of these ids decodes to in the middle of a text, as it is: untrusted, whatever it holds."""
        return [self.table.decoded[i] for i in ids]

    def card(self, token: int, *, n_neighbours: int = 8) -> TokenCard:
        """What is known of one token without asking the model.

        Args:
            token: an id.
            n_neighbours: tokens with the largest cosine to name.

        Raises:
            InputError: there is no such id.
        """
        (token,) = _ids_of(int(token), self.table, self.model)
        return TokenCard(
            **_spelling(self.model, self.table, self.kinds, token),
            numbers=self._rows.placed(token),
            reference=self._rows.reference,
            neighbours=self._rows.neighbours(token, self.table, n_neighbours),
            written=None,
            stored=(),
        )


def _spelling(model: Model, table: VocabularyTable, kinds: np.ndarray, token: int) -> dict[str, Any]:
    text = table.decoded[token]
    spelt = token_bytes(table.pieces[token], text, byte_level=is_byte_level(table)) if table.pieces[token] else None
    return {
        "model": model.info.name,
        "token": token,
        "piece": table.pieces[token],
        "shown": table.shown[token],
        "text": text,
        "bytes_hex": "" if spelt is None else spelt.hex(" "),
        "category": str(kinds[token]),
        "special": bool(table.special[token]),
        "encodes_to": table.encoded[token],
        "encodes_shown": tuple(table.shown[i] for i in table.encoded[token]),
    }


def _ids_of(token: Any, table: VocabularyTable, model: Model) -> list[int]:
    """An id itself; the ids that decode to exactly this text; or else what the text encodes to."""
    if isinstance(token, (int, np.integer)) and not isinstance(token, bool):
        if not 0 <= token < len(table):
            raise InputError(f"Token ids of {model.info.name!r} go from 0 to {len(table) - 1:,}; found {token}.")
        return [int(token)]
    if not isinstance(token, str) or not token:
        raise InputError(f"A token is an id or a text, found {token!r}.")
    exact = [i for i, text in enumerate(table.decoded) if text == token]
    if exact:
        return exact
    spelt = [i for i, piece in enumerate(table.pieces) if piece == token]
    ask: Any = getattr(model, "ids_of", None)
    if spelt or ask is None:
        return spelt
    return [int(i) for i in ask((token,))[0]]


def _weights(model: Model) -> VocabularyWeights | None:
    try:
        found: VocabularyWeights = answer(model, Weights())
    except CapabilityError:
        return None
    return found


def _written(table: VocabularyTable, kinds: np.ndarray, ids: list[int]) -> Generator[Request, Any, np.ndarray]:
    made = yield from prompts(table, kinds, _TRIALS)
    return (yield from written(made, ids, _STEPS))


def _converse(model: Any, flow: Generator[Request, Any, np.ndarray]) -> np.ndarray:
    """Serve a conversation of look-ups and passes over texts of its own."""
    if hasattr(model, "load"):
        model.load()
    sent: Any = None
    while True:
        try:
            request = flow.send(sent)
        except StopIteration as stop:
            found: np.ndarray = stop.value
            return found
        assert not isinstance(request, Branch), "these conversations write no continuations"
        sent = run_pass(model, request, Batch(()))[0] if isinstance(request, Forward) else answer(model, request)


def _check_same(result: Result, model: Model, folder: Path) -> None:
    own, theirs = model.provenance().get("tokenizer_hash"), result.provenance.get("tokenizer_hash")
    if own is not None and theirs is not None and own != theirs:
        name = result.provenance.get("model", {}).get("name", "another model")
        raise InputError(
            f"The result of {result.name} in {folder} is of {name!r}, whose tokenizer differs from that of "
            f"{model.info.name!r}: its ids mean other tokens."
        )


def _by_token(result: Result) -> bool:
    """Whether a result says something of each id, rather than what ids show as."""
    return any("vocab" in a.dims for n, a in result.dataset.data_vars.items() if n != "shown")


def _facts(result: Result, folder: str, token: int) -> Stored:
    """What a result holds at an id; NaN (not asked, not defined) is left out."""
    data, facts = result.dataset, {}
    here = np.flatnonzero(data["vocab"].values == token) if "vocab" in data.coords else np.array([token])
    if here.size:
        for name, array in data.data_vars.items():
            if "vocab" not in array.dims or name == "shown" or len(array.dims) > 2:
                continue
            row = array.isel(vocab=int(here[0]))
            labels = [""] if row.ndim == 0 else [f" [{c}]" for c in _labels(row)]
            for label, value in zip(labels, np.atleast_1d(row.values).tolist(), strict=True):
                if not (isinstance(value, float) and np.isnan(value)):
                    facts[f"{name}{label}"] = value if isinstance(value, str) else float(value)
    model = str(result.provenance.get("model", {}).get("name", ""))
    return Stored(result.name, folder, model, facts)


def _labels(row: Any) -> list[str]:
    dim = row.dims[0]
    return [str(c) for c in row[dim].values] if dim in row.coords else [str(i) for i in range(row.sizes[dim])]


def _quoted(text: str) -> str:
    return f"‘{visible(text)}’"


def _plain(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if value.is_integer() else fmt(value)


def _share(p: float) -> str:
    return f"{p:.0%}" if p >= _NOT_WRITTEN else f"{p:.0e}"

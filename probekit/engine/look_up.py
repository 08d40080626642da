"""Requests that need no pass over the run's texts: weights, vocabularies, what given texts embed as or attend to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from probekit.core import (
    AttentionColumns,
    CapabilityError,
    Columns,
    Compared,
    Embed,
    LookUp,
    Model,
    Similarities,
    Tokenize,
)

from .journal import Journal
from .progress import Progress

_ENCODER = "a text-embedding model, such as 'all-minilm-l6-v2'"


def answer(model: Model, request: LookUp, progress: Progress | None = None, journal: Journal | None = None) -> Any:
    """What a model says to a request that needs no pass.

    Args:
        model: the model of the request's role.
        request: what is wanted.
        progress: the bar of the run.
        journal: holds the similarities that were found before, and is told those found now.

    Returns:
        `Embedded` for an `Embed`, `Compared` for `Similarities`, `AttentionColumns` for `Columns`, ids per text for
        `Tokenize`, a `VocabularyTable` for a `Vocabulary`, `VocabularyWeights` for `Weights`.

    Raises:
        CapabilityError: the model has nothing of the kind.
        StoreError: the journal cannot be written.
    """
    if isinstance(request, Columns) and request.optional:
        try:
            return answer(model, replace(request, optional=False), progress, journal)
        except CapabilityError as error:
            return AttentionColumns(np.empty((0, 0, 0), np.float32), np.zeros(0, dtype=np.int64), str(error))
    method, what, which = {
        "Columns": ("attention_columns", "show attention columns", _ENCODER),
        "Embed": ("embed_texts", "embed texts", _ENCODER),
        "Similarities": ("embed_texts", "embed texts", _ENCODER),
        "Tokenize": ("ids_of", "tokenise", "a model with the native backend"),
        "Vocabulary": ("vocabulary", "show its vocabulary", "a model with the native backend"),
        "Weights": ("vocabulary_weights", "show its weights", "a decoder with the native backend"),
    }[type(request).__name__]
    ask: Any = getattr(model, method, None)
    if ask is None:
        raise CapabilityError(f"{model.info.name!r} ({type(model).__name__}) cannot {what}; open {which}.")
    if isinstance(request, Similarities):
        return compare(ask, request, progress or Progress(), journal or Journal(None, ""))
    if isinstance(request, Columns):
        bar = progress or Progress()
        bar.begin_texts(request.why, len(request.texts), request.total)
        return ask(request.texts, request.at, progress=bar.embedded)
    if isinstance(request, Embed):
        bar = progress or Progress()
        bar.begin_texts(request.why, len(request.texts), request.total)
        return ask(request.texts, normalise=request.normalise, cut=request.cut, progress=bar.embedded)
    if isinstance(request, Tokenize):
        return ask(request.texts, special=request.special)
    return ask()


def compare(embed: Any, request: Similarities, progress: Progress, journal: Journal) -> Compared:
    """The cosine of each text with its anchor; equal texts are embedded once.

    Memory holds the embeddings of one request, and no longer than it runs.

    Args:
        embed: turns texts into embeddings, as `embed_texts` of a text-embedding model.
        request: which texts to compare.
        progress: the bar of the run; is told of texts, not of anchors.
        journal: answers what was asked before.
    """
    n = len(request.texts)
    progress.begin_texts(request.why, n, request.total)
    found = journal.compared(request)
    if found is not None:
        progress.embedded(n, known=True)
        return found
    anchors = embed(request.anchors, cut=True)
    place = {text: i for i, text in enumerate(dict.fromkeys(request.texts))}
    texts = embed(tuple(place), cut=True, progress=progress.embedded)
    progress.embedded(n - len(place))
    rows = [place[text] for text in request.texts]
    cosine = np.einsum("td,td->t", texts.values[rows], anchors.values[list(request.to)])
    count = [texts.ids[row].count(token) for row, token in zip(rows, request.watched, strict=False)]
    tokens = np.array([len(texts.ids[row]) for row in rows])
    found = Compared(cosine.astype(np.float32), np.array(count, dtype=np.int32), tokens, texts.n_cut)
    journal.add_compared(request, found)
    return found

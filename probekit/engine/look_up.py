"""Requests that need no pass over the run's texts: weights, vocabularies, embeddings of given texts."""

from __future__ import annotations

from typing import Any

from probekit.core import CapabilityError, Embed, LookUp, Model, Tokenize

from .progress import Progress


def answer(model: Model, request: LookUp, progress: Progress | None = None) -> Any:
    """What a model says to a request that needs no pass.

    Args:
        model: the model of the request's role.
        request: what is wanted.
        progress: the bar of the run.

    Returns:
        `Embedded` for an `Embed`, ids per text for `Tokenize`, a `VocabularyTable` for a `Vocabulary`, `VocabularyWeights` for `Weights`.

    Raises:
        CapabilityError: the model has nothing of the kind.
    """
    method, what, which = {
        "Embed": ("embed_texts", "embed texts", "a text-embedding model, such as 'all-minilm-l6-v2'"),
        "Tokenize": ("ids_of", "tokenise", "a model with the native backend"),
        "Vocabulary": ("vocabulary", "show its vocabulary", "a model with the native backend"),
        "Weights": ("vocabulary_weights", "show its weights", "a decoder with the native backend"),
    }[type(request).__name__]
    ask: Any = getattr(model, method, None)
    if ask is None:
        raise CapabilityError(f"{model.info.name!r} ({type(model).__name__}) cannot {what}; open {which}.")
    if isinstance(request, Embed):
        tell = None if progress is None or progress.silent else progress.tell
        return ask(request.texts, normalise=request.normalise, progress=tell)
    if isinstance(request, Tokenize):
        return ask(request.texts, special=request.special)
    return ask()

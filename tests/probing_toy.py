"""Collections made by hand, and models that show a planted concept, for the tests of probes."""

from __future__ import annotations

from typing import Any

import numpy as np
from helpers import scripted

from probekit.backends.scripted import ScriptedModel, planted, random_play
from probekit.probing.collected import Collected, Rows


def collection(
    arrays: np.ndarray, labels: Any = None, *, groups: Any = None, per: int = 1, embed: np.ndarray | None = None
) -> Collected:
    """A collection with axes layer, row, feature, `per` rows for each text; random token ids."""
    n_layers, n = arrays.shape[:2]
    n_texts = n // per
    text = np.repeat(np.arange(n_texts), per)
    ids = np.random.default_rng(5).integers(0, 40, (n_texts, 4))
    own = np.arange(n_texts) if groups is None else np.asarray(groups)
    pos = np.tile(np.arange(per), n_texts)
    numbers = {"text": text, "pos": pos, "position": pos, "token_id": ids[text, pos % 4], "group": own[text]}
    about = Rows(
        numbers,
        np.array([f" w{i}" for i in numbers["token_id"]], dtype=object),
        ids.ravel(),
        np.full(n_texts, 4),
        None if labels is None else np.asarray(labels),
    )
    held = {"resid_post": arrays.astype(np.float32)}
    layers: dict[str, tuple[int, ...]] = {"resid_post": tuple(range(n_layers))}
    if embed is not None:
        held["embed"], layers["embed"] = embed.astype(np.float32), ()
    model = {"name": "made", "n_layers": n_layers}
    return Collected(held, layers, about, {"model": model, "texts": {"n_texts": n_texts, "n_tokens": 4 * n_texts}})


def concept_model(first: int, strength: float, *, n_layers: int = 4, d_model: int = 24) -> tuple[ScriptedModel, Any]:
    """A scripted model that writes whether a text's ids have an even sum along one direction, from a layer on.

    No single id says so. Returns the model and what it says of a text's ids.
    """
    direction = np.zeros(d_model)
    direction[3], direction[7] = 0.6, 0.8

    def even(ids: Any) -> bool:
        return sum(ids) % 2 == 0

    def plant(text: Any, script: Any) -> Any:
        script.resid[first:] += strength * (1.0 if even(text.ids) else -1.0) * direction
        return script

    play = planted(random_play(n_layers, 3, d_model, seed=1), plant)
    return scripted(play=play, n_layers=n_layers, d_model=d_model, d_vocab=64), even


def word_texts(n: int, *, seed: int = 0, length: int = 6) -> list[str]:
    """Texts of words of the scripted model's vocabulary."""
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in rng.integers(0, 64, length)) for _ in range(n)]

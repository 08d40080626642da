"""A small text-embedding model whose geometry is planted, for tests of what inserted tokens do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from probekit.core import Batch, Embedded, ModelInfo, TokenText, VocabularyTable

CLS, SEP = 0, 1
_SPECIAL = ("[CLS]", "[SEP]")


class BagEmbedder:
    """What a text says, by its words outside the vocabulary, with a direction that all texts share, and a little noise.

    Two texts are as similar on average as two tokens are. A token of the vocabulary that is put into a text changes the
    noise and nothing else, so that it brings a pair nearer every other time; but a sticky token draws the whole text
    towards the shared direction, by `strength` for each copy.
    """

    def __init__(self, words: Sequence[str], *, sticky: str = "", strength: float = 3.0, seed: int = 0) -> None:
        self.words = (*_SPECIAL, *words, "unknown")
        self.place = {w: i for i, w in enumerate(self.words)}
        self.seed, self.middle = seed, np.ones(48) / np.sqrt(48)
        self.sticky, self.strength = self.place.get(sticky, -1), strength
        self.embedded: list[str] = []
        self.stop: Callable[[], None] = lambda: None

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            name="bag", kind="encoder", architecture="bag", n_layers=1, n_heads=1, n_kv_heads=1, d_model=48, d_head=48,
            d_mlp=1, d_vocab=len(self.words), n_params=1, context_length=400, dtype="float32", device="cpu",
            sites=frozenset(), bos_id=None, revision="",
        )  # fmt: skip

    def provenance(self) -> dict[str, Any]:
        return {"model": self.info.as_dict(), "weights_hash": f"bag {self.sticky} {self.strength}"}

    def execute(self, request: Any, batch: Batch, progress: Any = None) -> Any:
        raise AssertionError("an encoder runs no pass")

    def ids_of(self, texts: Sequence[str], *, special: bool = False) -> tuple[tuple[int, ...], ...]:
        unknown = len(self.words) - 1
        plain = [tuple(self.place.get(w.strip(".,").lower(), unknown) for w in t.split()) for t in texts]
        return tuple((CLS, *ids, SEP) if special else ids for ids in plain)

    def tokenize(self, texts: Sequence[str], bos: Any = "model") -> Batch:
        made = [
            TokenText(ids, self.decode(ids), text=t)
            for ids, t in zip(self.ids_of(texts, special=True), texts, strict=True)
        ]
        return Batch(tuple(made), "model")

    def decode(self, ids: Sequence[int]) -> tuple[str, ...]:
        return tuple(self.words[i] for i in ids)

    def vocabulary(self) -> VocabularyTable:
        encoded = tuple((i,) for i in range(len(self.words)))
        shown = tuple(f" {w} " for w in self.words)  # a word stays one beside others
        return VocabularyTable(self.words, self.words, shown, encoded, np.arange(len(self.words)) <= SEP)

    def embed_texts(
        self, texts: Sequence[str], *, normalise: bool = True, cut: bool = False, progress: Any = None
    ) -> Embedded:
        self.stop()
        self.embedded += texts
        ids = self.ids_of(texts, special=True)
        values = np.array([self._one(text, one) for text, one in zip(texts, ids, strict=True)])
        if progress is not None:
            progress(len(texts))
        if normalise:
            values /= np.linalg.norm(values, axis=1, keepdims=True)
        return Embedded(values.astype(np.float32), ids)

    def _direction(self, text: str) -> np.ndarray:
        digest = hashlib.sha256(f"{self.seed} {text}".encode()).digest()
        row = np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal(48)
        return np.asarray(row / np.linalg.norm(row))

    def _one(self, text: str, ids: Sequence[int]) -> np.ndarray:
        said = " ".join(w for w in text.split() if w not in self.place)
        shared = 0.5 + self.strength * ids.count(self.sticky)
        return self._direction(said or text) + 0.05 * self._direction(f"noise {text}") + shared * self.middle

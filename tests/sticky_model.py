"""A small text-embedding model whose geometry and attention are planted, for tests of what inserted tokens do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from probekit.core import AttentionColumns, Batch, Embedded, ModelInfo, TokenText, VocabularyTable
from probekit.methods.sentences import built_in

CLS, SEP = 0, 1
N_LAYERS, N_HEADS, ATTENDED = 3, 2, 1  # the layer at which some tokens are attended to more
_SPECIAL = ("[CLS]", "[SEP]")


class BagEmbedder:
    """What a text says, by its words outside the vocabulary, with a direction that all texts share, and a little noise.

    Two texts are as similar on average as two tokens are. A token of the vocabulary that is put into a text changes the
    noise and nothing else, so that it brings a pair nearer every other time; but sticky tokens (words in one string)
    draw the whole text towards the shared direction, by `strength` for each copy.

    With `topics`, the built-in sentences of a topic share a direction, and each copy of a sticky token adds `blur` to
    the noise. Every token is paid attention by its own noise
    around 1 / tokens of the text; sticky ones are paid `gain` times as much more, at one layer.
    """

    def __init__(
        self, words: Sequence[str], *, sticky: str = "", strength: float = 3.0, seed: int = 0, topics: bool = False,
        blur: float = 0.0, gain: float = 0.0,
    ) -> None:  # fmt: skip
        self.words = (*_SPECIAL, *words, "unknown")
        self.place = {w: i for i, w in enumerate(self.words)}
        self.seed, self.middle = seed, np.ones(48) / np.sqrt(48)
        self.sticky, self.strength = [self.place[w] for w in sticky.split()], strength
        self.topic = dict(zip(*built_in(), strict=True)) if topics else {}
        self.blur, self.gain, self.known = blur, gain, dict[str, np.ndarray]()
        self.embedded: list[str] = []
        self.attended: list[str] = []
        self.stop: Callable[[], None] = lambda: None

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            name="bag", kind="encoder", architecture="bag", n_layers=N_LAYERS, n_heads=N_HEADS, n_kv_heads=2, d_model=48,
            d_head=24, d_mlp=1, d_vocab=len(self.words), n_params=1, context_length=400, dtype="float32", device="cpu",
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

    def _meant(self, text: str) -> np.ndarray:
        if text not in self.known:
            self.known[text] = self._direction(text)
        return self.known[text]

    def _one(self, text: str, ids: Sequence[int]) -> np.ndarray:
        said = " ".join(w for w in text.split() if w not in self.place)
        own = self._meant(said or text)
        if said in self.topic:
            own = 0.75 * own + self._meant(self.topic[said])
        copies = sum(ids.count(one) for one in self.sticky)
        noise = (0.05 + self.blur * copies) * self._direction(f"noise {text}")
        return np.asarray(own + noise + (0.5 + self.strength * copies) * self.middle)

    def attention_columns(self, texts: Sequence[str], at: Sequence[int], *, progress: Any = None) -> AttentionColumns:
        self.stop()
        self.attended += texts
        every = self.ids_of(texts, special=True)
        columns = [self._column(text, ids, ids[place]) for text, ids, place in zip(texts, every, at, strict=True)]
        if progress is not None:
            progress(len(texts))
        return AttentionColumns(np.concatenate(columns, axis=-1).astype(np.float32), np.array([len(i) for i in every]))

    def _column(self, text: str, ids: Sequence[int], token: int) -> np.ndarray:
        own = np.exp(0.2 * np.random.default_rng([self.seed, token]).standard_normal((N_LAYERS, 1, 1)))
        digest = hashlib.sha256(f"{self.seed} attention {text}".encode()).digest()
        noise = np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal(
            (N_LAYERS, N_HEADS, len(ids))
        )
        column = own * np.exp(0.3 * noise) / len(ids)
        column[ATTENDED] *= 1 + self.gain * (token in self.sticky)
        return np.asarray(column)

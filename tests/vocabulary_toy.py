"""A tokenizer whose words are single tokens, and models on it: a scripted one that copies, spells and counts, and random ones."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import numpy as np
from helpers import random_weights

from probekit.backends.scripted import Script, ScriptedModel
from probekit.backends.transformers import TransformersModel
from probekit.backends.transformers.vocabulary import ids_of, vocabulary_table
from probekit.core import TokenText, VocabularyTable, VocabularyWeights

SPECIALS = ("<s>", "</s>", "<pad>", "<r0>", "<r1>", "<r2>")
WORDS = tuple(a + b + c for a in "bdfgkl" for b in "aeiou" for c in "mn")  # bam, ban, bem, …
STAND_IN = "blacksmith"  # the most distinct letters
PIECES = ("Input", "Output", "Word", "Spelled", "Letters", "phrase", "mean", "means", "nothing", "Question", "Answer")
_END = 32  # positions at the end of a text at which the copier says something
CHARACTERS = "".join(chr(i) for i in range(32, 127)) + "\n«»"


def toy_tokenizer() -> Any:
    """Special tokens, then words, then single characters; the longest pieces win, and nothing is added."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = [*WORDS, STAND_IN, *PIECES]
    scores = [(s, 0.0) for s in SPECIALS] + [(w, -1.0) for w in words] + [(c, -4.0) for c in CHARACTERS]
    own = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=False))
    own.decoder = decoders.Fuse()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=own, **special, additional_special_tokens=list(SPECIALS[3:]))


TOKENIZER = toy_tokenizer()
V = len(TOKENIZER)
TABLE: VocabularyTable = vocabulary_table(TOKENIZER, V)
RESERVED = tuple(range(3, 6))


def id_of(text: str) -> int:
    return TABLE.pieces.index(text)


class Copier(ScriptedModel):
    """Writes again what stands in guillemets, spells and counts it; but for some tokens, of which it knows nothing.

    Args:
        broken: ids that it cannot write; it writes a comma in their place.
        cannot: names of tasks ("Spelled", "Letters") that it cannot do for any word.
        weights: what it shows as its rows; random ones, the reserved at one point, if None.
    """

    def __init__(
        self, broken: Collection[int] = (), cannot: Collection[str] = (), weights: VocabularyWeights | None = None
    ) -> None:
        self.broken, self.cannot = frozenset(broken), frozenset(cannot)
        super().__init__(self._script, n_layers=1, n_heads=1, d_model=V, d_vocab=V, unembedding=np.eye(V))
        self.rows = rows_with() if weights is None else weights
        self.asked = 0

    def vocabulary(self) -> VocabularyTable:
        return TABLE

    def vocabulary_weights(self) -> VocabularyWeights:
        return self.rows

    def ids_of(self, texts: Any, *, special: bool = False) -> tuple[tuple[int, ...], ...]:
        return ids_of(TOKENIZER, texts, special=special)

    def decode(self, ids: Any) -> tuple[str, ...]:
        return tuple(TABLE.shown[i] for i in ids)

    def _script(self, text: TokenText) -> Script:
        self.asked += 1
        rows = np.full((len(text), V), np.log(1e-7))
        for t in range(max(0, len(text) - _END), len(text)):
            rows[t, self._next(text.ids[: t + 1])] = np.log(1 - 1e-7 * (V - 1))
        pattern = np.tril(np.ones((len(text), len(text))))
        return Script(rows[None], (pattern / pattern.sum(-1, keepdims=True))[None, None])

    def _next(self, ids: tuple[int, ...]) -> int:
        opening, last = id_of("«"), ids[-1]
        before = [i for i in range(1, len(ids) - 1) if ids[i] == opening != ids[i - 1]]
        if last == opening and before:
            return self._can(ids[before[-1] + 1])
        if len(ids) > 1 and last == ids[-2]:
            return self._can(last)
        return self._answer(ids, before)

    def _can(self, token: int) -> int:
        return id_of(",") if token in self.broken else token

    def _answer(self, ids: tuple[int, ...], before: list[int]) -> int:
        text = "".join(TABLE.decoded[i] for i in ids)
        found = re.search(r"Word: «([^»]*)»\n(Spelled|Letters):(.*)\Z", text[text.rfind("Word:") :], re.DOTALL)
        if not found or found[2] in self.cannot or ids[before[-1] + 1] in self.broken:
            return id_of(",")
        word = found[1]
        answer = f" {'-'.join(word) if found[2] == 'Spelled' else len(word)}\n"
        so_far = found[3]
        rest = answer[len(so_far) :] if answer.startswith(so_far) else ""
        return int(ids_of(TOKENIZER, [rest])[0][0]) if rest else id_of("W")


def rows_with(
    planted: Collection[int] = (), *, seed: int = 0, tied: bool = True, d_model: int = 24
) -> VocabularyWeights:
    """Random rows; those of the reserved tokens, and of planted ones, lie at one point (and have small inputs if untied)."""
    rng = np.random.default_rng(seed)
    point = rng.normal(size=d_model)
    rows = rng.normal(size=(V, d_model))
    chosen = [*RESERVED, *planted]
    rows[chosen] = point + 0.01 * rng.normal(size=(len(chosen), d_model))
    inputs = rng.normal(size=(V, d_model))
    inputs[chosen] *= 0.01
    out = rows.astype(np.float32)
    return VocabularyWeights(out if tied else inputs.astype(np.float32), out, None, tied)


def random_llama(weights: VocabularyWeights, seed: int = 0) -> TransformersModel:
    """A tiny random model with these rows."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    d_model = weights.unembedding.shape[1]
    sizes = {"hidden_size": d_model, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=V, num_key_value_heads=2, tie_word_embeddings=weights.tied, bos_token_id=0, eos_token_id=1,
        pad_token_id=2, max_position_embeddings=1024, **sizes,
    )  # fmt: skip
    module: Any = random_weights(AutoModelForCausalLM.from_config(config), seed).eval()
    with torch.no_grad():
        module.get_input_embeddings().weight.copy_(torch.as_tensor(weights.embedding))
        module.get_output_embeddings().weight.copy_(torch.as_tensor(weights.unembedding))
    return TransformersModel.from_loaded(module, toy_tokenizer(), name="toy")

"""A model whose activations are written by hand: planted effects with known truth, and nulls without them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from probekit.core import (
    Batch,
    BosPolicy,
    CapabilityError,
    Forward,
    ModelInfo,
    Progress,
    Request,
    TextError,
    TokenText,
)
from probekit.reduce import Partial, Recorder, Reducer, Rows
from probekit.reduce.attention_blocks import AttentionBlock
from probekit.reduce.vocab_rows import project, stream_readout

from .direct import show_directions


@dataclass(frozen=True)
class Script:
    """What one text does inside the model.

    Args:
        resid: residual stream after each block; axes layer, token, d_model.
        pattern: attention probabilities; axes layer, head, query, key; zero where the query cannot see.
    """

    resid: np.ndarray
    pattern: np.ndarray


Play = Callable[[TokenText], Script]


class ScriptedModel:
    """Plays a script for each text; no weights besides an unembedding.

    A text is words separated by blanks; the vocabulary is `w0` … `w{V-1}`, and other words are hashed into it.

    Args:
        play: the activations of a text; must depend on nothing but its token ids.
        n_layers: blocks.
        n_heads: heads per block.
        d_model: width of the residual stream.
        d_vocab: size of the vocabulary.
        unembedding: axes vocab, d_model; a fixed random matrix if None. There is no final norm.
        block: queries per attention block.
    """

    def __init__(
        self,
        play: Play,
        *,
        n_layers: int = 4,
        n_heads: int = 3,
        d_model: int = 16,
        d_vocab: int = 64,
        unembedding: np.ndarray | None = None,
        block: int = 32,
    ) -> None:
        self._play, self._block = play, block
        if unembedding is None:
            unembedding = np.random.default_rng(0).normal(size=(d_vocab, d_model))
        self.weight = torch.as_tensor(unembedding, dtype=torch.float32)
        self.bias: torch.Tensor | None = None
        sizes: dict[str, Any] = {
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_kv_heads": n_heads,
            "d_model": d_model,
            "d_head": max(1, d_model // n_heads),
            "d_mlp": 4 * d_model,
            "d_vocab": d_vocab,
            "n_params": self.weight.numel(),
        }
        self.info = ModelInfo(
            name="scripted",
            kind="decoder",
            architecture="scripted",
            context_length=None,
            dtype="float32",
            device="cpu",
            sites=frozenset({"resid_pre", "attn_out", "mlp_out", "resid_post", "pattern", "logits"}),
            **sizes,
        )

    def norm(self, rows: torch.Tensor) -> torch.Tensor:
        """No final norm."""
        return rows

    def finish(self, logits: torch.Tensor) -> torch.Tensor:
        """Nothing follows the unembedding."""
        return logits

    def tokenize(self, texts: Sequence[str], bos: BosPolicy = "model") -> Batch:
        """One token per word."""
        done = []
        for i, text in enumerate(texts):
            words = text.split()
            if not words:
                raise TextError(f"Text {i} is empty. Every text needs at least one visible character.")
            ids = tuple(self._id(w) for w in words)
            done.append(TokenText(ids, self.decode(ids)))
        if not done:
            raise TextError("No text was given.")
        return Batch(tuple(done), bos)

    def _id(self, word: str) -> int:
        known = word[1:] if word.startswith("w") and word[1:].isdigit() else None
        number = int(known) if known else int(hashlib.sha256(word.encode()).hexdigest(), 16)
        return number % self.info.d_vocab

    def decode(self, ids: Sequence[int]) -> tuple[str, ...]:
        """`w` and the number."""
        return tuple(f" w{i}" for i in ids)

    def provenance(self) -> dict[str, Any]:
        """What there is to tell of a script."""
        digest = hashlib.sha256(self.weight.numpy().tobytes()).hexdigest()
        return {"model": self.info.as_dict(), "weights_hash": f"sha256:{digest}", "backend": "scripted", "versions": {}}

    def execute(self, request: Request, batch: Batch, progress: Progress | None = None) -> list[Partial]:
        """Play every text and show it to the reducers.

        Raises:
            CapabilityError: the request is no `Forward`, has patches, or wants a point that no script holds.
        """
        if not isinstance(request, Forward) or request.patches or request.order or request.against:
            raise CapabilityError(
                "A scripted model serves Forward requests without patches, order and reference: it has no computation."
            )
        parts = [self._one(request, batch.select([i]), progress) for i in range(len(batch))]
        return [Partial.merge([p[i] for p in parts]) for i in range(len(request.captures))]

    def _one(self, request: Forward, batch: Batch, progress: Progress | None) -> list[Partial]:
        script = self._play(batch.texts[0])
        resid = torch.as_tensor(np.ascontiguousarray(script.resid), dtype=torch.float32)
        last = self.info.n_layers - 1
        recorders = []
        for capture in request.captures:
            assert isinstance(capture.reducer, Reducer)
            recorders.append(Recorder(capture.reducer, capture.point, self.info.require(capture.point), batch.lengths))
        for recorder in recorders:
            site, reads = recorder.point.site, recorder.reducer.reads
            if reads == "attention":
                self._show_attention(recorder, script.pattern, batch.lengths)
            elif reads == "rows" and site == "logits":
                logits = torch.empty(len(resid[last]), self.info.d_vocab)
                recorder.rows(0, Rows(project(resid[last], self, logits), batch.lengths))
            elif reads == "rows":
                for layer in recorder.layers:
                    recorder.rows(layer, Rows(_at(site, resid)[layer], batch.lengths))
        vocab = [r for r in recorders if r.reducer.reads == "vocab"]
        if vocab:
            stream_readout(
                dict(enumerate(resid)),
                last,
                torch.as_tensor(batch.next_ids),
                self,
                [r for r in vocab if r.point.site == "resid_post"],
                [r for r in vocab if r.point.site == "logits"],
            )
        direct = [r for r in recorders if r.reducer.reads == "direct"]
        if direct:
            logits = project(resid[last], self, torch.empty(len(resid[last]), self.info.d_vocab))
            held = {(r.point.site, i): _at(r.point.site, resid)[i] for r in direct for i in r.layers}
            show_directions(direct, held, resid[last], logits.topk(2).indices.numpy(), self, batch)
        if progress is not None:
            progress(0.0)
        return [r.close(batch.index) for r in recorders]

    def _show_attention(self, recorder: Recorder, pattern: np.ndarray, lengths: tuple[int, ...]) -> None:
        probs = torch.as_tensor(np.ascontiguousarray(pattern), dtype=torch.float32)
        for layer in recorder.layers:
            for start in range(0, lengths[0], self._block):
                stop = min(start + self._block, lengths[0])
                rows = probs[layer, :, start:stop, :stop][None]
                entropy = torch.special.entr(rows).sum(-1)
                recorder.attention(layer, AttentionBlock(rows, entropy, rows.amax(-1), start, lengths))

    def with_block(self, block: int) -> ScriptedModel:
        """The same model, showing attention in blocks of another size."""
        return ScriptedModel(self._play, unembedding=self.weight.numpy(), block=block, **_sizes(self.info))


def _at(site: str, resid: torch.Tensor) -> torch.Tensor:
    """Activations at a site; axes layer, token, d_model. The stream starts from zero, and only attention writes."""
    before = torch.cat([torch.zeros_like(resid[:1]), resid[:-1]])
    if site == "mlp_out":
        return torch.zeros_like(resid)
    return {"resid_pre": before, "attn_out": resid - before}.get(site, resid)


def _sizes(info: ModelInfo) -> dict[str, int]:
    return {"n_layers": info.n_layers, "n_heads": info.n_heads, "d_model": info.d_model, "d_vocab": info.d_vocab}


def random_play(
    n_layers: int = 4, n_heads: int = 3, d_model: int = 16, *, seed: int = 0, sharpness: float = 0.0
) -> Play:
    """A script without effects: Gaussian residual streams and attention that is uniform up to noise.

    Args:
        n_layers: blocks.
        n_heads: heads per block.
        d_model: width of the residual stream.
        seed: another seed, another null model; a text's script depends on this and on its token ids.
        sharpness: standard deviation of the attention scores; 0 gives exactly uniform causal rows.
    """

    def play(text: TokenText) -> Script:
        digest = hashlib.sha256(repr((seed, text.ids)).encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        n = len(text)
        scores = rng.normal(size=(n_layers, n_heads, n, n)) * sharpness
        weights = np.tril(np.exp(scores))
        return Script(rng.normal(size=(n_layers, n, d_model)), weights / weights.sum(-1, keepdims=True))

    return play


def planted(play: Play, change: Callable[[TokenText, Script], Script]) -> Play:
    """A script with an effect planted into another one's activations, which are copied first."""

    def play_changed(text: TokenText) -> Script:
        script = play(text)
        return change(text, replace(script, resid=script.resid.copy(), pattern=script.pattern.copy()))

    return play_changed

"""A model whose activations are written by hand: planted effects with known truth, and nulls without them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from probekit.core import (
    Batch,
    BosPolicy,
    Branch,
    CapabilityError,
    Forward,
    ModelInfo,
    Patch,
    Progress,
    Request,
    Sampling,
    TextError,
    TokenText,
)
from probekit.reduce import BlockRows, Partial, Recorder, Reducer, Rows, ValueRows
from probekit.reduce.attention_blocks import AttentionBlock
from probekit.reduce.lens_files import by_lens, translation
from probekit.reduce.vocab_rows import project, stream_readout

from .continuations import Done, There, Writing
from .direct import show_directions


@dataclass(frozen=True)
class Script:
    """What one text does inside the model.

    Args:
        resid: residual stream after each block; axes layer, token, d_model.
        pattern: attention probabilities; axes layer, head, query, key; zero where the query cannot see.
        mlp: what the MLPs added to the stream, the rest being attention's; axes layer, token, d_model; 0 if None.
        key: axes layer, token, head, d_head; 0 if None. They have no part in `pattern`.
        value: axes layer, token, head, d_head; 0 if None.
    """

    resid: np.ndarray
    pattern: np.ndarray
    mlp: np.ndarray | None = None
    key: np.ndarray | None = None
    value: np.ndarray | None = None


Play = Callable[[TokenText], Script]
Respond = Callable[[TokenText, Script, tuple[Patch, ...]], Script]  # what patches of this text make of its script


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
        respond: what patches make of a script, for planted causes; patches are refused if None. Is given the patches
            that apply to the text, in the order of the request.
        bos_id: id of the beginning-of-sequence token; None for none.
        writes: probability of each token after given ones, for continuations; none are written if None. Has nothing to
            do with what `play` shows.
        ends: ids after which a continuation has nothing more to say.
    """

    def __init__(
        self,
        play: Play,
        *,
        respond: Respond | None = None,
        bos_id: int | None = None,
        writes: Callable[[Sequence[int]], np.ndarray] | None = None,
        ends: frozenset[int] = frozenset(),
        n_layers: int = 4,
        n_heads: int = 3,
        d_model: int = 16,
        d_vocab: int = 64,
        unembedding: np.ndarray | None = None,
        block: int = 32,
    ) -> None:
        self._play, self._block, self._respond = play, block, respond
        self._writes, self._ends = writes, ends
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
            sites=frozenset({*_ROWS, "pattern", "logits"}),
            bos_id=bos_id,
            **sizes,
        )

    @property
    def unembed(self) -> ScriptedModel:
        """The way from a residual row to logits: its own."""
        return self

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
            CapabilityError: the request is no `Forward`, wants a point that no script holds, or has patches where
                nothing was said of what they do.
        """
        plain = isinstance(request, Forward) and not (request.order or request.against or request.gradient_of)
        if not isinstance(request, Forward) or not plain or (request.patches and self._respond is None):
            raise CapabilityError(
                "A scripted model serves Forward requests without order, reference and gradient, and without patches "
                "unless it is told how to respond: it has no computation."
            )
        parts = [self._one(request, batch.select([i]), progress) for i in range(len(batch))]
        return [Partial.merge([p[i] for p in parts]) for i in range(len(request.captures))]

    def branch(self, request: Branch, done: Done, *, memory_limit: int, there: There | None = None) -> None:
        """Write continuations one after the other, by the probabilities of `writes`.

        Raises:
            CapabilityError: nothing was said of what it writes.
        """
        if self._writes is None:
            raise CapabilityError("A scripted model writes nothing unless it is told the probabilities of its tokens.")
        writing = Writing(
            request, done, ends=self._ends, decode=lambda ids: " ".join(f"w{i}" for i in ids), there=there
        )
        for job in writing.jobs():
            prefix = request.bases[job.fork.base].ids[: job.fork.position]
            while True:
                p = np.asarray(self._writes([*prefix, *job.ids]), dtype=float)
                forced = job.fork.token if not job.ids else None
                token = _drawn(p, request.sampling, job.draws[len(job.ids)]) if forced is None else forced
                with np.errstate(divide="ignore"):
                    logprob = float(np.log(p[token] / p.sum()))
                if not writing.goes_on(job, token, logprob):
                    break

    def _one(self, request: Forward, batch: Batch, progress: Progress | None) -> list[Partial]:
        script = self._play(batch.texts[0])
        here = tuple(p for p in request.patches if p.texts is None or batch.index[0] in p.texts)
        if here and self._respond is not None:
            script = self._respond(batch.texts[0], script, here)
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
                    recorder.rows(layer, Rows(self._at(site, script)[layer], batch.lengths))
            elif reads == "values":
                gram = torch.eye(self.info.d_head).expand(self.info.n_heads, -1, -1)
                for layer in recorder.layers:
                    recorder.rows(layer, ValueRows(self._at("v", script)[layer], gram, batch.lengths))
            elif reads == "block":
                before, after, mlp = (self._at(s, script) for s in ("resid_pre", "resid_post", "mlp_out"))
                for layer in recorder.layers:
                    recorder.rows(layer, BlockRows(before[layer], after[layer], mlp[layer], batch.lengths))
        vocab = [r for r in recorders if r.reducer.reads == "vocab"]
        if vocab:
            own = [r for r in vocab if r.point.site == "logits"]
            lens = by_lens([r for r in vocab if r.point.site == "resid_post"]) or {None: []}
            for which, some in lens.items():
                ids, translate = torch.as_tensor(batch.next_ids), translation(which, resid.device)
                stream_readout(dict(enumerate(resid)), last, ids, self, some, own, translate=translate)
                own = []
        direct = [r for r in recorders if r.reducer.reads == "direct"]
        if direct:
            logits = project(resid[last], self, torch.empty(len(resid[last]), self.info.d_vocab))
            inner = [r for r in direct if r.point.site != "logits"]
            held = {(r.point.site, i): self._at(r.point.site, script)[i] for r in inner for i in r.layers}
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

    def _at(self, site: str, script: Script) -> torch.Tensor:
        """Activations at a site; axes layer, token, then the site's own. The stream starts from zero."""
        resid = torch.as_tensor(np.ascontiguousarray(script.resid), dtype=torch.float32)
        before = torch.cat([torch.zeros_like(resid[:1]), resid[:-1]])
        if site in ("k", "v", "z"):
            given = script.key if site == "k" else script.value
            shape = (*resid.shape[:2], self.info.n_heads, self.info.d_head)
            rows = torch.zeros(shape) if given is None else torch.as_tensor(given, dtype=torch.float32)
            if site != "z":
                return rows
            return torch.einsum("lhqk,lkhd->lqhd", torch.as_tensor(script.pattern, dtype=torch.float32), rows)
        mlp = torch.zeros_like(resid) if script.mlp is None else torch.as_tensor(script.mlp, dtype=torch.float32)
        middle = resid - mlp
        return {
            "resid_pre": before, "attn_out": middle - before, "resid_mid": middle, "mlp_out": mlp, "resid_post": resid
        }[site]  # fmt: skip

    def with_block(self, block: int) -> ScriptedModel:
        """The same model, showing attention in blocks of another size."""
        how: dict[str, Any] = {"respond": self._respond, "bos_id": self.info.bos_id, **_sizes(self.info)}
        return ScriptedModel(self._play, unembedding=self.weight.numpy(), block=block, **how)


def _drawn(p: np.ndarray, how: Sampling, number: float) -> int:
    """A token: the likeliest, or the one at which the cumulative distribution passes a number in [0, 1)."""
    if how.temperature == 0:
        return int(p.argmax())
    p = (p / p.sum()) ** (1 / how.temperature)
    order = np.argsort(-p, kind="stable")
    ranked = p[order] / p.sum()
    ranked = np.where(ranked.cumsum() - ranked < how.top_p, ranked, 0.0)
    place = int(np.searchsorted(ranked.cumsum(), number * ranked.sum(), side="right"))
    return int(order[min(place, len(p) - 1)])


_ROWS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "k", "v", "z")


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
        resid = rng.normal(size=(n_layers, n, d_model))
        shape = (n_layers, n, n_heads, max(1, d_model // n_heads))
        parts = {"mlp": rng.normal(size=resid.shape), "key": rng.normal(size=shape), "value": rng.normal(size=shape)}
        return Script(resid, weights / weights.sum(-1, keepdims=True), **parts)

    return play


def planted(play: Play, change: Callable[[TokenText, Script], Script]) -> Play:
    """A script with an effect planted into another one's activations, which are copied first."""

    def play_changed(text: TokenText) -> Script:
        return change(text, copy.deepcopy(play(text)))

    return play_changed

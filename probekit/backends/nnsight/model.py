"""An nnsight model behind probekit's model protocol (nnsight 0.8, `nnsight.TransformersModel`).

A pass is one `with model.trace(ids):` block that visits modules in the order in which the model reaches them. nnsight
runs such a block as a greenlet in step with the forward pass, so the block holds the real tensors and may write others
back; patches are therefore edits of `.output` and `.inputs`, as an nnsight user would write them. Attention
probabilities are what eager attention returns (`self_attn.output[1]`): the model is switched to eager for a pass that
asks for them, and back. Such a pass holds head × query × key of a layer at a time, which the native backend never does.

Of the points inside attention, `z` is what the output projection reads and `v` what a separate value
projection writes. `q` and `k` after rotary embedding pass no module's edge; they are left out, as are `v`
of a fused or clipped projection and the `router` of a mixture.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from probekit.backends.capture_pass import CapturePass, require_forward
from probekit.backends.self_check import N_TOKENS, TOLERANCE, self_check
from probekit.backends.transformers.forward_pass import evaluating
from probekit.backends.transformers.implementation import attention_by
from probekit.backends.transformers.model import TransformersModel
from probekit.backends.transformers.native_unembed import NativeUnembed
from probekit.backends.transformers.weights import OUTPUT_PROJECTIONS, output_gram
from probekit.core import (
    Batch,
    BosPolicy,
    CapabilityError,
    Capture,
    Chat,
    Forward,
    InputError,
    ModelError,
    ModelInfo,
    Progress,
    Request,
    SelfCheckError,
    TokenText,
)
from probekit.reduce import Keep, Partial
from probekit.reduce.unembed import Unembed

from .visits import ATTENTION_INPUT, ORDER, MapWatch, Visit, make_visits, tapped

try:
    import nnsight
    from nnsight.intervention.interleaver import OutOfOrderError
except ImportError as error:
    raise ModelError(
        "The nnsight backend needs nnsight 0.8. Install it with: pip install 'probekit[compare]'"
    ) from error

Remote = bool | str


class NnsightModel:
    """A decoder wrapped by nnsight, seen through probekit's points.

    Build it with `probekit.open_model(nnsight_model)` or `open_model(name, backend="nnsight")`. Edits that the
    nnsight model carries (`model.edit`) take part. Its configuration, training mode and attention are as
    before after every pass.

    With `remote` (`NnsightModel.from_nnsight(model, remote=True)`), passes run on an NDIF server (`trace(remote=...)`). Functions of this process do not travel
    there, so the activations of all visited places are saved, sent here and only then reduced, and patches are
    refused. The way is tested through nnsight's own dry run (`remote="local"`), not against a server.

    Args:
        native: the same model for sizes, tokens and hashes.
        make: gives the nnsight model.
        remote: what `trace` is told; False runs here.
        save_first: save activations and reduce them after the run; always so with `remote`.
    """

    def __init__(
        self, native: TransformersModel, make: Callable[[], Any], *, remote: Remote = False, save_first: bool = False
    ) -> None:
        self.native, self.remote = native, remote
        self.changeable = not (remote or save_first)
        self._make = make
        self._wrapped: Any = None
        self._lock = threading.RLock()
        self._fetched: _FetchedUnembed | None = None

    @classmethod
    def from_nnsight(
        cls, wrapped: Any, *, name: str | None = None, remote: Remote = False, save_first: bool = False
    ) -> Self:
        """A model that the caller wrapped with nnsight.

        Args:
            wrapped: an `nnsight.TransformersModel` of a decoder; its weights are loaded by `load` if they are not
                yet, except with `remote`.
            name: how it is called in results.
            remote: run on a server, see the class.
            save_first: reduce after the run, see the class.

        Raises:
            InputError: it is another kind of nnsight model.
            ModelError: its family is not in the architecture table.
        """
        if not isinstance(wrapped, nnsight.TransformersModel) or wrapped.tokenizer is None:
            raise InputError(
                f"Found {type(wrapped).__name__} of nnsight, or a model without tokenizer; expected "
                "nnsight.TransformersModel(name) or nnsight.TransformersModel(module, tokenizer=tokenizer)."
            )

        def module() -> Any:
            if not remote:
                wrapped.dispatch()
            return wrapped._module

        config = wrapped._module.config
        named = name or wrapped.repo_id or type(wrapped._module).__name__
        revision = wrapped.revision or getattr(config, "_commit_hash", None) or ""
        native = TransformersModel(config, wrapped.tokenizer, named, revision, module)
        if remote:
            native._module = module()  # sizes only: the weights are on the server
        return cls(native, lambda: wrapped, remote=remote, save_first=save_first)

    @classmethod
    def from_model(cls, native: TransformersModel) -> Self:
        """A model that probekit opened, run through nnsight; the weights are shared."""
        return cls(native, native.to_nnsight)

    def load(self) -> Self:
        """Load the weights and check that what is captured is what the model computes.

        Raises:
            ModelError: the weights cannot be loaded.
            SelfCheckError: the captured activations contradict the model's own output.
        """
        with self._lock:
            if self._wrapped is None:
                if not self.remote:
                    self.native.load()
                self._wrapped = self._make()
                try:
                    if self.changeable:
                        self_check(self, self.native._added, sinks=self.native.architecture.sinks)
                    else:
                        self._fetched = _FetchedUnembed(self)
                        _check_lens(self)
                except BaseException:
                    self._wrapped = self._fetched = None
                    raise
        return self

    def to_nnsight(self) -> Any:
        """The nnsight model itself."""
        self.load()
        return self._wrapped

    @property
    def module(self) -> Any:
        """The transformers model that nnsight wraps."""
        return self.to_nnsight()._module

    @property
    def info(self) -> ModelInfo:
        """Sizes and capabilities."""
        info = dataclasses.replace(self.native.info, sites=self._sites())
        return dataclasses.replace(info, device="remote") if self.remote else info

    def _sites(self) -> frozenset[str]:
        architecture = self.native.architecture
        sites = ({*architecture.taps} & {*ORDER}) | {"logits"}
        if getattr(architecture, "route", None) is None:  # others have no switch for eager attention
            sites |= {"pattern", "z"} if self._projection(*OUTPUT_PROJECTIONS) else {"pattern"}
            config = self.native._config
            separate = getattr(config, "clip_qkv", None) is None and self._projection("v_proj")
            sites |= {"v"} if separate else set()
        return frozenset(sites)

    def _projection(self, *names: str) -> str | None:
        """The first of these parts that attention has; None before the weights are loaded."""
        module = self.native._module
        if module is None:
            return names[0]
        attention = module.get_submodule(f"{self.native.architecture.layers}.0.{self.native.architecture.attention}")
        return next((n for n in names if hasattr(attention, n)), None)

    def tokenize(self, texts: Any, bos: BosPolicy = "model", chat: Chat = False) -> Batch:
        """The exact token ids that will run, as `TransformersModel.tokenize`."""
        return self.native.tokenize(texts, bos, chat)

    def decode(self, ids: Any) -> tuple[str, ...]:
        """What each id shows as."""
        return self.native.decode(ids)

    def weights_hash(self, *, fresh: bool = False) -> str:
        """As `TransformersModel.weights_hash`; weights on a server are named, not hashed."""
        return f"remote:{self.native.info.name}" if self.remote else self.native.weights_hash(fresh=fresh)

    def provenance(self) -> dict[str, Any]:
        """What fixes this model's numbers."""
        own = getattr(self.module.config, "_attn_implementation", None) or "eager"
        packages = ("nnsight", "torch", "transformers", "tokenizers", "numpy")
        return {
            "model": self.info.as_dict(),
            "weights_hash": self.weights_hash(),
            "weights": self.native.weights_note,
            "attention": f"{own}; eager where attention is captured",
            "tokenizer_hash": self.native._tokenizer_hash,
            "versions": {p: importlib.metadata.version(p) for p in packages},
            "backend": "nnsight" if not self.remote else f"nnsight, remote={self.remote}",
        }

    def own_logits(self, batch: Batch) -> np.ndarray:
        """The model's own logits for one text; axes token, vocab."""
        model, remote = self.to_nnsight(), self.remote
        ids = torch.tensor([batch.texts[0].ids])
        with self._lock, torch.no_grad(), evaluating(model._module):
            with model.trace(ids, use_cache=False, remote=remote):
                logits = nnsight.save(model.output.logits)
            return logits[0].float().cpu().numpy()

    def output_gram(self, layer: int) -> Tensor:
        """W_O^h (W_O^h)^T of each query head of a block; axes head, d_head, d_head.

        Raises:
            CapabilityError: the weights are on a server.
        """
        if self.remote:
            raise CapabilityError("Values cannot be seen through W_O of a remote model: its weights are on a server.")
        info, path = self.info, self._place("pattern", layer)[0]
        return output_gram(self.module.get_submodule(path), info.n_heads, info.d_head)

    @property
    def unembed(self) -> Unembed:
        """The way from a residual row to logits."""
        return self._fetched or NativeUnembed(self.native)

    def execute(self, request: Request, batch: Batch, progress: Progress | None = None) -> list[Partial]:
        """One forward pass over the texts of a micro-batch.

        Args:
            request: a `Forward` without gradient and without knock-outs.
            batch: the texts.
            progress: is told the work done, in GFLOP.

        Returns:
            One partial per capture, in order.

        Raises:
            CapabilityError: this backend cannot serve the request.
        """
        request = require_forward(request, self.native.info.name)
        for what, asked in (
            ("gradients", request.gradient_of is not None),
            ("knock-outs of attention edges", any(p.point.site == "pattern" for p in request.patches)),
            ("patches in a pass that saves first, as a remote one does", request.patches and not self.changeable),
        ):
            if asked:
                raise CapabilityError(f"The nnsight backend does not serve {what}; use backend='transformers'.")
        self.load()
        with self._lock:
            device = "cpu" if self.remote else self.module.get_input_embeddings().weight.device
            want = CapturePass(self, request, batch, progress, torch.device(device))
            visits = self._visits(want)
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.enter_context(evaluating(self.module))
                if want.watched:
                    stack.enter_context(attention_by(self.module, "eager"))
                try:
                    self._run(want.ids, visits)
                except OutOfOrderError as error:
                    raise SelfCheckError(
                        f"{self.native.info.name!r} reaches its modules in another order than expected: {error}. "
                        "Its family needs another row in the architecture table."
                    ) from error
                return want.finish()

    def _run(self, ids: Tensor, visits: list[Visit]) -> None:
        """Trace the model and make the visits, while it runs or from what it saved."""
        model, remote = self._wrapped, self.remote
        if self.changeable:
            with model.trace(ids, use_cache=False) as tracer:
                make_visits(model, visits)
                tracer.stop()  # the unembedding is read in blocks afterwards
            return
        places = [(v.path, v.side) for v in visits]
        with model.trace(ids, use_cache=False, remote=remote) as tracer:
            seen = nnsight.save([])
            for path, side in places:
                part = model.get(path)
                seen.append(part.inputs if side == "input" else part.output)
            tracer.stop()
        for visit, value in zip(visits, seen, strict=True):
            visit.see(value)

    def _visits(self, want: CapturePass) -> list[Visit]:
        """Where the trace has to stop, in the order of the forward pass."""
        visits: dict[tuple[str, str], Visit] = {}

        def visit(path: str, side: str, when: tuple[int, int], see: Callable[[Any], Any]) -> None:
            visits.setdefault((path, side), Visit(path, side, when)).sees.append(see)

        for (site, layer), taps in want.taps().items():
            path, side = self._place(site, layer)
            heads = {"z": want.info.n_heads, "v": want.info.n_kv_heads}.get(site)
            at = {"embed": -1, "final_norm": want.info.n_layers}.get(site, layer)
            visit(path, side, (at, ORDER[site]), tapped(taps, side, heads, len(want.batch)))
        for layer in sorted(want.watched):
            watch = MapWatch(self.module.get_submodule(path := self._place("pattern", layer)[0]), layer, want)
            visit(path, "input", (layer, ATTENTION_INPUT), watch.mask)
            visit(path, "output", (layer, ORDER["pattern"]), watch.map)
        return sorted(visits.values(), key=lambda v: v.when)

    def _place(self, site: str, layer: int) -> tuple[str, str]:
        """Path from the causal model, and side, of a site in a layer."""
        architecture = self.native.architecture
        block = f"{architecture.layers}.{layer}"
        attention = f"{block}.{architecture.attention}"
        if site == "embed":
            return _path_of(self.module, self.module.get_input_embeddings()), "output"
        if site == "pattern":
            return attention, "output"
        if site == "z":
            return f"{attention}.{self._projection(*OUTPUT_PROJECTIONS)}", "input"
        if site == "v":
            return f"{attention}.v_proj", "output"
        path, side = architecture.taps[site]
        if site == "final_norm":
            return path, side
        return f"{block}.{path}".rstrip("."), side


def nnsight_twin(module: Any, tokenizer: Any) -> Any:
    """An `nnsight.TransformersModel` that shares a module's weights and nothing else.

    nnsight replaces the `forward` of every module it wraps and sets the tokenizer's padding, so it gets a copy
    of the module tree, of its configuration and of the tokenizer; parameters and buffers are the same tensors.

    Args:
        module: the transformers model.
        tokenizer: its tokenizer.
    """
    shared: dict[int, Any] = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    twin = copy.deepcopy(module, shared)
    device = next(module.parameters()).device
    return nnsight.TransformersModel(twin, tokenizer=copy.deepcopy(tokenizer), device=device)


def _check_lens(model: NnsightModel) -> None:
    """The part of the self-check that needs neither patches nor the weights of the blocks."""
    ids = np.linspace(0, min(model.info.d_vocab, 20_000) - 1, N_TOKENS).astype(int)
    batch = Batch((TokenText(tuple(map(int, ids)), tuple("?" * N_TOKENS)),), "never")
    found = model.execute(Forward((Capture("logits", Keep()),)), batch)[0].arrays["value"]
    expected = model.own_logits(batch)
    off = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not off <= TOLERANCE.get(model.info.dtype, 5e-2):
        raise SelfCheckError(
            f"{model.info.name!r} fails the self-check: the lens at the last layer = the model's logits; found a "
            f"relative difference of {off:.2e}. Its family needs another row in the architecture table."
        )


class _FetchedUnembed:
    """Final norm and unembedding, brought here through a trace once; for a model whose weights are elsewhere."""

    def __init__(self, model: NnsightModel) -> None:
        wrapped, remote, module = model._wrapped, model.remote, model._wrapped._module
        head, norm = _path_of(module, module.get_output_embeddings()), model.native.architecture.final_norm
        names = [n for n, _ in module.get_submodule(norm).named_parameters()]
        has_bias = module.get_submodule(head).bias is not None
        ids = torch.zeros((1, 2), dtype=torch.long)
        with wrapped.trace(ids, use_cache=False, remote=remote) as tracer:
            weight = nnsight.save(wrapped.get(head).weight)
            bias = nnsight.save(wrapped.get(head).bias if has_bias else 0)
            gains = nnsight.save([wrapped.get(f"{norm}.{name}") for name in names])
            tracer.stop()
        self.weight: Tensor = weight.detach()
        self.bias: Tensor | None = bias.detach() if has_bias else None
        self._norm = copy.deepcopy(module.get_submodule(norm)).to_empty(device=self.weight.device)
        self._norm.load_state_dict({n: g.detach() for n, g in zip(names, gains, strict=True)}, strict=False)
        self._own = NativeUnembed(model.native)

    def norm(self, rows: Tensor) -> Tensor:
        """The final norm."""
        with torch.no_grad():
            return self._norm.forward(rows)

    def finish(self, logits: Tensor) -> Tensor:
        """What follows the unembedding."""
        return self._own.finish(logits)


def _path_of(root: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in root.named_modules() if module is part)

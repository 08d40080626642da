"""Writing many continuations of shared prefixes at once.

Each base runs once; its keys and values are kept once, whoever continues it. Continuations from any position of any
base share a batch, and whoever is done makes room for the next. A token is drawn by inverting the cumulative
distribution at a number that belongs to this continuation and step alone, so that what runs beside it changes nothing.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from probekit.backends.continuations import Done, Job, There, Writing
from probekit.core import Base, Branch, CapabilityError, PlanError, Sampling, TextError

from .branch_attention import Slots, writing
from .forward_pass import evaluating
from .generation import end_tokens
from .relu_attention import RELU
from .weights import input_device

if TYPE_CHECKING:
    from .model import TransformersModel

MOST_ROWS = 256  # continuations that run together


def write_branches(
    model: TransformersModel,
    request: Branch,
    done: Done,
    *,
    memory_limit: int,
    rows: int | None = None,
    there: There | None = None,
) -> None:
    """Write every continuation that a request asks for and that is not there.

    Args:
        model: the model.
        request: bases, forks, samples.
        done: is told each continuation, forks in order of their last one.
        memory_limit: bytes that may be used above the loaded model.
        rows: continuations that run together; what fits in memory, at most 256, if None.
        there: numbers of the continuations of each fork that are left out.

    Raises:
        CapabilityError: the family's attention cannot be entered this way.
        PlanError: not even one continuation fits in memory.
        TextError: a base and its continuations are longer than the model reads.
    """
    writer = _Writer(model, request, done, there)
    writer.run(rows or min(fitting_rows(model, request, memory_limit), writer.writing.n_jobs))


def branch_bytes(model: TransformersModel, request: Branch, rows: int) -> int:
    """Memory above the loaded model that so many continuations at a time need."""
    info = model.info
    width = 2 if info.dtype in ("float16", "bfloat16") else 4
    per_token = 2 * info.n_layers * info.n_kv_heads * info.d_head * width
    shared = sum(len(b.ids) for b in request.bases) * per_token
    longest = max(len(b.ids) for b in request.bases)
    scores = 4 * 4 * info.n_heads * (longest + request.sampling.max_tokens)
    logits = info.d_vocab * (3 * 4 + 2 * 8)
    return shared + rows * (request.sampling.max_tokens * per_token + scores + logits)


def fitting_rows(model: TransformersModel, request: Branch, memory_limit: int) -> int:
    """How many continuations at a time fit in memory, at most 256.

    Raises:
        PlanError: not even one; says what would be needed.
    """
    one, two = (branch_bytes(model, request, n) for n in (1, 2))
    if one > memory_limit:
        raise PlanError(
            f"Writing one continuation at a time needs {one / 2**20:,.1f} MiB above the loaded model, and "
            f"{memory_limit / 2**20:,.1f} MiB are available. Raise the memory limit, give fewer or shorter texts at "
            "once, or lower max_tokens."
        )
    return min(MOST_ROWS, 1 + (memory_limit - one) // (two - one), request.n * len(request.forks))


class _Writer:
    def __init__(self, model: TransformersModel, request: Branch, done: Done, there: There | None) -> None:
        if model.architecture.route is not None:
            raise CapabilityError(
                f"{model.info.name!r} ({model.info.architecture}) asks no registry for its attention function, so "
                "continuations cannot share prefixes there; branching is not offered for this family."
            )
        if model.module.config._attn_implementation == RELU:
            raise CapabilityError(
                f"{model.info.name!r} has ReLU in the place of the softmax; branching is not offered."
            )
        limit, most = model.info.context_length, request.sampling.max_tokens
        longest = max(f.position for f in request.forks) + most
        if limit is not None and longest > limit:
            raise TextError(
                f"A base of {longest - most:,} tokens with {most:,} more exceeds the {limit:,} that the model reads."
            )
        self.model, self.request = model, request
        decode = partial(model.tokenizer.decode, skip_special_tokens=True)
        self.writing = Writing(
            request, done, ends=end_tokens(model.module), decode=lambda ids: decode(list(ids)), there=there
        )
        self.device, self.unembed = input_device(model.module), model.unembed
        self.slots = Slots([{} for _ in request.bases], most)
        self.first: dict[tuple[int, int], Tensor] = {}  # base, position: logits there

    def run(self, n_rows: int) -> None:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluating(self.model.module))
            stack.enter_context(writing(self.model.module, self.slots))
            for i, base in enumerate(self.request.bases):
                self._read(i, base)
            self._write(n_rows)

    def _read(self, i: int, base: Base) -> None:
        """Run a base once, up to its last fork, and keep what continuations need."""
        positions = sorted({f.position for f in self.request.forks if f.base == i})
        if not positions:
            return
        self.slots.filling = i
        ids = torch.tensor([base.ids[: positions[-1]]], device=self.device)
        hidden = self.model.module.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        self.slots.filling = None
        rows = self._logits(hidden[[p - 1 for p in positions]])
        self.first.update({(i, p): row for p, row in zip(positions, rows, strict=True)})

    def _logits(self, hidden: Tensor) -> Tensor:
        unembed = self.unembed
        logits = hidden.to(unembed.weight.device, unembed.weight.dtype) @ unembed.weight.T
        logits = logits.float() if unembed.bias is None else (logits + unembed.bias).float()
        return unembed.finish(logits)

    def _write(self, n_rows: int) -> None:
        waiting, running = self.writing.jobs(), {}  # by slot
        self.slots.open(n_rows, self.device)
        free = list(range(n_rows))
        while True:
            while free:
                job = next(waiting, None)
                if job is None:
                    break
                if not self._begin(job):  # over with its first token
                    continue
                slot = free.pop(0)
                running[slot] = job
                self.slots.place(slot, job.fork.base, job.fork.position)
            if not running:
                return
            if len(running) <= 0.7 * len(self.slots.base):  # nobody waits any more
                order = sorted(running)
                self.slots.shrink(order)
                running, free = {i: running[slot] for i, slot in enumerate(order)}, []
            self._step(running, free)

    def _begin(self, job: Job) -> bool:
        """Put the first token, forced or drawn; whether there is more to write."""
        logits = self.first[job.fork.base, job.fork.position][None]
        token = job.fork.token
        if token is None:
            token = int(_draw(logits, self.request.sampling, job.draws[:1])[0])
        return self.writing.goes_on(job, token, float(torch.log_softmax(logits, -1)[0, token]))

    def _step(self, running: dict[int, Job], free: list[int]) -> None:
        """One more token for every row that is being written on."""
        slots, order = self.slots, sorted(running)
        slots.settle(order)
        tokens = torch.zeros((len(slots.base), 1), dtype=torch.long, device=self.device)
        for slot in order:
            tokens[slot, 0] = running[slot].ids[-1]
        places = (slots.start + slots.step)[:, None]
        hidden = self.model.module.base_model(input_ids=tokens, position_ids=places, use_cache=False).last_hidden_state
        slots.step = slots.step + 1
        if free:
            slots.step[free] = 0
        logits = self._logits(hidden[order, -1])
        numbers = np.array([running[slot].draws[len(running[slot].ids)] for slot in order])
        drawn = _draw(logits, self.request.sampling, numbers)
        logprobs = (logits.gather(1, drawn[:, None])[:, 0] - logits.logsumexp(-1)).tolist()
        for slot, token, logprob in zip(order, drawn.tolist(), logprobs, strict=True):
            if not self.writing.goes_on(running[slot], token, logprob):
                del running[slot]
                free.append(slot)


def _draw(logits: Tensor, sampling: Sampling, numbers: np.ndarray) -> Tensor:
    """A token of each row: the likeliest, or the one at which the cumulative distribution passes the row's number."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits / sampling.temperature, -1)
    order: Any = None
    if sampling.top_p < 1:
        probs, order = torch.sort(probs, dim=-1, descending=True, stable=True)
        before = probs.cumsum(-1, dtype=torch.float64) - probs
        probs = probs.masked_fill(before >= sampling.top_p, 0.0)
    up_to = probs.cumsum(-1, dtype=torch.float64)
    wanted = torch.as_tensor(numbers, device=probs.device)[:, None] * up_to[:, -1:]
    place = torch.searchsorted(up_to, wanted, right=True).clamp(max=probs.shape[-1] - 1)
    return (place if order is None else order.gather(1, place))[:, 0]

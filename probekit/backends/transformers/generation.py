"""Writing on, token by token, while patches change activations.

One text at a time, so that prompts of unequal length need no padding; keys and values of earlier tokens
come from transformers' cache. The loop is small and its own, because a patch has to know which
positions a step shows: the prompt at once, then one token after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from transformers import DynamicCache

from probekit.backends.block_taps import Tap
from probekit.backends.capture_pass import CapturePass
from probekit.backends.edits import apply_edit, cut_of
from probekit.core import (
    Batch,
    Forward,
    Generated,
    InputError,
    KnockOut,
    Patch,
    TextError,
    TokenText,
    Written,
    check_patch,
    token_coords,
)

from .attention_switch import Watch
from .forward_pass import HEAD_SITES, evaluating, hooked, looking
from .weights import input_device

if TYPE_CHECKING:
    from .model import TransformersModel


def generate(
    model: TransformersModel,
    batch: Batch,
    n_tokens: int,
    patches: Sequence[Patch] = (),
    *,
    temperature: float = 0.0,
    seed: int = 0,
    cached: bool = True,
    listen: Callable[[Written], None] | None = None,
) -> Generated:
    """Continue each text by up to `n_tokens`, stopping after an end token.

    A patch without positions acts on prompt and written tokens alike; positions are those of the prompt (negative
    ones from its end), and such a patch leaves written tokens alone. The keys of a `KnockOut` are positions of the
    prompt; without queries, written tokens do not look at them either.

    Args:
        model: the model.
        batch: the prompts.
        n_tokens: tokens to write at most, per text.
        patches: what is changed on the way, in this order.
        temperature: 0 takes the most probable token; otherwise tokens are drawn from softmax(logits / temperature).
        seed: of the draws. A text's draws depend on the seed and its corpus index, not on the texts beside it.
        cached: whether keys and values of earlier tokens are kept; without, each step runs the whole text again.
        listen: is told of every token as it is written; what it raises ends the writing.

    Raises:
        InputError: a number out of bounds, or a patch that does not fit, also where values have a row per token.
        TextError: a prompt leaves no room in the model's context.
    """
    if n_tokens < 1 or not 0 <= temperature < float("inf"):
        raise InputError(
            f"Found n_tokens={n_tokens} and temperature={temperature}; expected at least 1 token and a finite "
            "temperature of 0 (greedy) or more."
        )
    longest, limit = max(batch.lengths), model.info.context_length
    if limit is not None and longest + n_tokens > limit:
        raise TextError(
            f"A prompt of {longest:,} tokens with {n_tokens:,} more exceeds the {limit:,} that the model reads."
        )
    _check(model, batch, patches)
    done, numbers, ended = [], [], []
    ends = end_tokens(model.module)
    for row, prompt in enumerate(batch):
        text = batch.index[row]
        mine = [_absolute(p, len(prompt)) for p in patches if p.texts is None or text in p.texts]
        draws = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, text]).generate_state(1, np.uint64)[0]))
        ids, cache, seen = list(prompt.ids), DynamicCache() if cached else None, 0
        while len(ids) < len(prompt) + n_tokens:
            logits = _next_logits(model, ids, seen, mine, cache)
            seen = len(ids) if cached else 0
            log_p = torch.log_softmax(logits, dim=-1)
            if temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=draws))
            ids.append(token)
            numbers.append((float(log_p[token]), float(torch.special.entr(log_p.exp()).sum())))
            if listen is not None:
                listen(Written(text, token, model.decode([token])[0], *numbers[-1]))
            if token in ends:
                break
        ended.append(ids[-1] in ends)
        written = tuple(ids[len(prompt) :])
        done.append(TokenText((*prompt.ids, *written), (*prompt.strings, *model.decode(written))))
    return _labelled(model, batch, Batch(tuple(done), batch.bos, batch.index), numbers, ended)


def _next_logits(model: TransformersModel, ids: list[int], seen: int, patches: list[Patch], cache: Any) -> Tensor:
    """Logits after the last of `ids`, float32 on the CPU; the first `seen` are in the cache."""
    whole, tail = _batch_of(ids), _batch_of(ids[seen:])
    module, n_layers = model.module, model.info.n_layers
    taps: dict[tuple[str, int], list[Tap]] = {}
    knock_outs: dict[int, list[Patch]] = {}
    for patch in patches:
        for layer in patch.point.layers(n_layers):
            if not isinstance(patch.edit, KnockOut):
                taps.setdefault((patch.point.site, layer), []).append(_tap(patch, whole, tail))
            elif not seen or patch.edit.queries is None:
                knock_outs.setdefault(layer, []).append(patch)
    cuts = {layer: cut for layer, some in knock_outs.items() if (cut := cut_of(some, whole)) is not None}
    inside = {place: some for place, some in taps.items() if place[0] in HEAD_SITES}
    watch = Watch(frozenset(), whole.lengths, lambda *_: None, taps=inside, cuts=cuts)
    device = input_device(module)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(module))
        stack.enter_context(looking(model, watch))
        stack.enter_context(
            hooked(model, {p: some for p, some in taps.items() if p not in inside}, gradient=False, n_texts=1)
        )
        out = module(
            input_ids=torch.tensor([tail.texts[0].ids], device=device),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
        )
    return out.logits[0, -1].float().cpu()


def _tap(patch: Patch, whole: Batch, tail: Batch) -> Tap:
    """What a patch makes of the tokens that a step shows.

    That is the new tokens; but keys and values come with all earlier ones, as the cache keeps them: unpatched.
    """

    def tap(values: Tensor) -> Tensor | None:
        if values.shape[1] == whole.n_tokens:
            return apply_edit(patch, values, whole)
        return apply_edit(patch, values, tail) if patch.positions is None else None

    return tap


def _batch_of(ids: list[int]) -> Batch:
    return Batch((TokenText(tuple(ids), ("",) * len(ids)),))


def _absolute(patch: Patch, n: int) -> Patch:
    """The patch for a prompt of `n` tokens that will grow: positions counted from the start."""
    edit = patch.edit
    if isinstance(edit, KnockOut):
        keys, queries = (None if some is None else [p % n for p in some] for some in (edit.keys, edit.queries))
        return Patch(patch.point, KnockOut(keys, queries), heads=patch.heads)
    positions = None if patch.positions is None else [p % n for p in patch.positions]
    return Patch(patch.point, edit, positions, heads=patch.heads, dims=patch.dims)


def _check(model: TransformersModel, batch: Batch, patches: Sequence[Patch]) -> None:
    CapturePass(model, Forward((), tuple(patches)), batch, None, torch.device("cpu"))
    for patch in patches:
        if patch.positions is None and not isinstance(patch.edit, KnockOut):
            try:
                check_patch(patch, model.info, Batch((TokenText((0,), ("",)),), index=(patch.texts or (0,))[:1]))
            except InputError as error:
                raise InputError(
                    f"Without positions, a patch also acts on each written token by itself. {error} "
                    "Name positions of the prompt, or give values without a position axis."
                ) from error


def end_tokens(module: Any) -> frozenset[int]:
    """Ids after which a model has nothing more to say."""
    config = getattr(module, "generation_config", None) or module.config
    ends = config.eos_token_id if config.eos_token_id is not None else module.config.get_text_config().eos_token_id
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)


def _labelled(
    model: TransformersModel, prompts: Batch, batch: Batch, numbers: list[tuple[float, float]], ended: list[bool]
) -> Generated:
    new = np.concatenate([np.arange(n) >= p for n, p in zip(batch.lengths, prompts.lengths, strict=True)])
    coords = {name: (dim, np.asarray(values)[new]) for name, (dim, values) in token_coords(batch).items()}
    logprob, entropy = np.asarray(numbers, dtype=np.float32).T
    at_1 = "temperature 1, patches included"

    def named(dim: str, values: Any, unit: str, meaning: str) -> xr.DataArray:
        return xr.DataArray(values, dims=dim, attrs={"units": unit, "long_name": meaning})

    data = xr.Dataset(
        {
            "logprob_nats": named("token", logprob, "nats", f"log-probability of the token at {at_1}"),
            "entropy_nats": named("token", entropy, "nats", f"entropy of the token's distribution at {at_1}"),
            "ended": named("text", np.asarray(ended), "1", "whether the text stopped at an end token"),
        },
        coords=coords,
    )
    written = [t.ids[n:] for t, n in zip(batch, prompts.lengths, strict=True)]
    texts = tuple(model.tokenizer.decode(list(ids), skip_special_tokens=True) for ids in written)
    return Generated(batch, prompts.lengths, texts, data)

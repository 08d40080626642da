"""Generation: transformers' own continuation where nothing is patched, and the same patches at every step.

A patched continuation is checked against running the whole text again after each token, with the same patches as one
ordinary pass would have them (no cache, no steps), and against the logits of that pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    D_MODEL,
    D_VOCAB,
    SIZES,
    assert_close,
    random_weights,
    scripted,
    texts_of,
    tiny_model,
    words_tokenizer,
)
from scipy.special import entr, log_softmax

import probekit as pk
from probekit.backends.transformers import TransformersModel
from probekit.core import (
    Add,
    Batch,
    CapabilityError,
    Capture,
    Forward,
    InputError,
    KnockOut,
    Patch,
    ProjectOut,
    Replace,
    TextError,
    TokenText,
)
from probekit.reduce import Keep

KINDS = ("llama-grouped", "gpt2", "mistral", "qwen2")
LENGTHS = (5, 12, 1, 9)
N_NEW = 10
every_kind = pytest.mark.parametrize("kind", KINDS)
rng = np.random.default_rng(0)
DIRECTION = rng.normal(size=D_MODEL)
PATCHES: dict[str, tuple[Patch, ...]] = {
    "steering": (Patch("resid_post.1", Add(DIRECTION, 2.0)),),
    "steering the last token of the prompt": (Patch("resid_post.1", Add(DIRECTION, 5.0), positions=(-1,)),),
    "direction removed everywhere": (Patch("resid_pre", ProjectOut(DIRECTION)),),
    "a head gone": (Patch("z.1", 0.0, heads=(2,)),),
    "queries, keys and values": (
        Patch("q.2", 2.0, heads=(1,)),
        Patch("k.1", Add(rng.normal(size=8))),
        Patch("v.0", 0.5, heads=(0,)),
    ),
    "keys of the prompt": (Patch("k.2", 3.0, positions=(0,)), Patch("v.1", 0.0, positions=(-1,))),
    "a constant": (Patch("mlp_out.1", Replace(rng.normal(size=D_MODEL))),),
    "hidden units": (Patch("mlp_act.2", 0.0, dims=range(20)),),
}
CUTS: dict[str, Patch] = {
    "keys nobody sees": Patch("pattern", KnockOut(keys=(1, 3)), heads=(0, 2)),
    "a key the end of the prompt does not see": Patch("pattern.1", KnockOut(keys=(0, 1), queries=(-1,))),
    "nothing but itself": Patch("pattern.1", KnockOut(), heads=(1,)),
}


def written(found: Any) -> list[tuple[int, ...]]:
    return [t.ids[n:] for t, n in zip(found.batch, found.n_prompt, strict=True)]


@every_kind
def test_greedy_generation_is_transformers_own(kind: str) -> None:
    """Token for token, for prompts of unequal length, past the sliding window and over an end token."""
    tiny, batch = tiny_model(kind), texts_of(LENGTHS, D_VOCAB)
    found = tiny.model.generate(batch, N_NEW)
    for prompt, ids in zip(batch, written(found), strict=True):
        given = torch.tensor([prompt.ids])
        own = tiny.module.generate(given, max_new_tokens=N_NEW, do_sample=False, attention_mask=torch.ones_like(given))
        assert (*prompt.ids, *ids) == tuple(own[0].tolist())


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_acts_the_same_at_every_step(kind: str, name: str) -> None:
    """The cache and running everything again agree; so does one ordinary pass over the finished text."""
    model, batch = tiny_model(kind).model, texts_of(LENGTHS, D_VOCAB)
    found = model.generate(batch, N_NEW, PATCHES[name])
    again = model.generate(batch, N_NEW, PATCHES[name], cached=False)
    assert found.batch == again.batch
    assert_close(found.data["logprob_nats"], again.data["logprob_nats"], atol=3e-5)
    assert written(found) != written(model.generate(batch, N_NEW)), "the patch is decorative"
    _compare_with_one_pass(model, batch, found, PATCHES[name])


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("name", CUTS)
def test_cut_edges_stay_cut(kind: str, name: str) -> None:
    """Written tokens do not look at a key that was cut for everybody; named queries are those of the prompt."""
    model, batch = tiny_model(kind).model, texts_of((5, 12, 9), D_VOCAB)
    found = model.generate(batch, N_NEW, (CUTS[name],))
    again = model.generate(batch, N_NEW, (CUTS[name],), cached=False)
    assert found.batch == again.batch
    assert_close(found.data["logprob_nats"], again.data["logprob_nats"], atol=3e-5)
    plain = model.generate(batch, N_NEW)
    assert np.abs(found.data["logprob_nats"].values[0] - plain.data["logprob_nats"].values[0]) > 1e-5
    _compare_with_one_pass(model, batch, found, (CUTS[name],))


def _other(kind: str) -> Any:
    """BLOOM does its attention by itself (ALiBi, keys cached after patching); gpt-oss has learned sinks and windows."""
    from transformers import AutoModelForCausalLM, BloomConfig, GptOssConfig

    if kind == "bloom":
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config: Any = BloomConfig(vocab_size=D_VOCAB, hidden_size=32, n_layer=3, n_head=4, **ids)
    else:
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default"}}
        sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
        config = GptOssConfig(**sizes, **experts, layer_types=layers)
    module = random_weights(AutoModelForCausalLM.from_config(config)).eval()
    return TransformersModel.from_loaded(module, words_tokenizer(), name=kind).load()


@pytest.mark.parametrize("kind", ["bloom", "gpt-oss"])
def test_other_ways_through_attention(kind: str) -> None:
    model, batch = _other(kind), texts_of((5, 12, 9), D_VOCAB)
    patches = (
        Patch("k.2", 3.0, positions=(0,)),
        Patch("v.1", 0.0, positions=(-1,)),
        Patch("q.2", 2.0, heads=(1,)),
        Patch("z.1", 0.5, heads=(0,)),
        CUTS["keys nobody sees"],
    )
    plain, found = (model.generate(batch, 8, some) for some in ((), patches))
    for text, n in zip(plain.batch, plain.n_prompt, strict=True):
        given = torch.tensor([text.ids[:n]])
        own = model.module.generate(given, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(given))
        assert text.ids == tuple(own[0].tolist())
    assert found.batch == model.generate(batch, 8, patches, cached=False).batch != plain.batch
    _compare_with_one_pass(model, batch, found, patches)


def _compare_with_one_pass(model: Any, prompts: Batch, found: Any, patches: Sequence[Patch]) -> None:
    """Log-probability, entropy and the choice itself, from the logits of one pass over prompt and continuation."""
    at = 0
    for i, (text, n) in enumerate(zip(found.batch, prompts.lengths, strict=True)):
        fixed = []
        for p in patches:
            if isinstance(p.edit, KnockOut):
                keys, queries = (None if x is None else [k % n for k in x] for x in (p.edit.keys, p.edit.queries))
                fixed.append(Patch(p.point, KnockOut(keys, queries), heads=p.heads))
            else:
                where = None if p.positions is None else [k % n for k in p.positions]
                fixed.append(Patch(p.point, p.edit, where, heads=p.heads, dims=p.dims))
        request = Forward((Capture("logits", Keep()),), tuple(fixed))
        logits = model.execute(request, Batch((text,)))[0].arrays["value"].astype(float)
        log_p = log_softmax(logits, axis=-1)[n - 1 : -1]
        new = slice(at, at + len(text) - n)
        assert np.array_equal(log_p.argmax(-1), text.ids[n:]), f"text {i}"
        assert_close(found.data["logprob_nats"][new], log_p.max(-1), atol=5e-5)
        assert_close(found.data["entropy_nats"][new], entr(np.exp(log_p)).sum(-1), atol=5e-5)
        at = new.stop


def test_patches_of_one_text_leave_the_others_alone() -> None:
    model, batch = tiny_model("gpt2").model, texts_of((5, 7), D_VOCAB)
    found = model.generate(batch, 6, (Patch("resid_post.1", Add(DIRECTION, 5.0), texts=(1,)),))
    plain = model.generate(batch, 6)
    assert written(found)[0] == written(plain)[0] and written(found)[1] != written(plain)[1]


def test_texts_do_not_depend_on_their_company() -> None:
    """Greedy or drawn, a text continues as it does alone; the draws follow its place in the corpus and the seed."""
    model, batch = tiny_model("llama-grouped").model, texts_of((5, 12, 9), D_VOCAB)
    for how in ({}, {"temperature": 1.0, "seed": 3}):
        together = model.generate(batch, 8, **how)
        for i in range(3):
            assert written(model.generate(batch.select([i]), 8, **how))[0] == written(together)[i]
    drawn = [written(model.generate(batch, 8, temperature=1.0, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    near_zero = model.generate(batch, 8, temperature=1e-3, seed=5)
    assert written(near_zero) == written(model.generate(batch, 8))


def test_draws_follow_the_models_distribution() -> None:
    """400 first tokens of one prompt: each token's share within 5 standard errors of its probability."""
    model = tiny_model("llama-grouped").model
    prompt, n = texts_of((5,), D_VOCAB).texts[0], 400
    first = [ids[0] for ids in written(model.generate(Batch((prompt,) * n), 1, temperature=2.0, seed=1))]
    logits = model.execute(Forward((Capture("logits", Keep()),)), Batch((prompt,)))[0].arrays["value"][-1]
    expected = np.exp(log_softmax(logits.astype(float) / 2.0))
    share = np.bincount(first, minlength=D_VOCAB) / n
    assert (np.abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / n) + 1 / n).all()


def test_generation_stops_at_an_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, batch = tiny_model("llama-grouped"), texts_of((5, 12), D_VOCAB)
    plain = tiny.model.generate(batch, N_NEW)
    end = written(plain)[0][3]
    monkeypatch.setattr(tiny.module.generation_config, "eos_token_id", [end, 2])
    found = tiny.model.generate(batch, N_NEW)
    for ids, whole in zip(written(found), written(plain), strict=True):
        stop = whole.index(end) + 1 if end in whole else len(whole)
        assert ids == whole[:stop]
    assert found.data["ended"].values.tolist() == [ids[-1] == end for ids in written(found)]
    assert found.data["ended"].values[0] and not plain.data["ended"].values.any()


def test_what_comes_back_is_labelled() -> None:
    model, batch = tiny_model("gpt2").model, texts_of((3, 6), D_VOCAB).select([1, 0])
    found = pk.generate(model, batch, 4)
    assert found.n_prompt == (6, 3) and found.batch.index == (1, 0) and found.batch.lengths == (10, 7)
    assert [t.ids[:n] for t, n in zip(found.batch, found.n_prompt, strict=True)] == [t.ids for t in batch]
    data = found.data
    assert data["logprob_nats"].dims == ("token",) and data["logprob_nats"].attrs["units"] == "nats"
    assert data["token_id"].values.tolist() == [i for ids in written(found) for i in ids]
    assert data["pos"].values.tolist() == [6, 7, 8, 9, 3, 4, 5, 6] and data["text"].values.tolist() == [1] * 4 + [0] * 4
    assert (data["logprob_nats"].values <= 0).all() and (data["entropy_nats"].values > 0).all()
    assert found.texts[0].split() == [s.strip() for s in data["token_str"].values[:4]]
    assert "→" in repr(found) and "(4 tokens)" in repr(found)
    assert written(pk.generate(model, ["w3 w4", "w5"], 2))[1] == written(pk.generate(model, "w5", 2))[0]


def test_the_model_is_left_as_found() -> None:
    tiny = tiny_model("llama-grouped")
    before = (
        tiny.model.weights_hash(fresh=True),
        tiny.module.config.to_dict(),
        tiny.module.generation_config.to_dict(),
    )
    tiny.module.train()
    try:
        tiny.model.generate(texts_of((5,), D_VOCAB), 3, (*PATCHES["keys of the prompt"], CUTS["nothing but itself"]))
        assert all(m.training for m in tiny.module.modules())
    finally:
        tiny.module.eval()
    after = (tiny.model.weights_hash(fresh=True), tiny.module.config.to_dict(), tiny.module.generation_config.to_dict())
    assert before == after and tiny.module.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.module.modules())


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tokens": ({"n_tokens": 0}, InputError, "n_tokens=0 .* expected at least 1 token"),
    "cold": ({"temperature": -1.0}, InputError, r"temperature=-1.0; expected"),
    "context": ({"n_tokens": 250}, TextError, "A prompt of 12 tokens with 250 more exceeds the 256"),
    "position": ({"patches": (Patch("z.1", 0.0, positions=(5,)),)}, InputError, "text 0 has 5 tokens, 0 to 4"),
    "rows without positions": (
        {"patches": (Patch("z.1", Replace(np.ones((5, 4, 8))), texts=(0,)),)},
        InputError,
        "Without positions, a patch also acts on each written token by itself.* Name positions of the prompt",
    ),
    "read only": ({"patches": (Patch("final_norm", 0.0),)}, CapabilityError, "can be read but not changed"),
    "layer": ({"patches": (Patch("z.7", 0.0),)}, InputError, "Layer 7 of 'z' is outside this model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused(name: str) -> None:
    given, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        tiny_model("gpt2").model.generate(texts_of((5, 12), D_VOCAB), **({"n_tokens": 2} | given))


def test_a_model_that_cannot_write_says_so() -> None:
    with pytest.raises(CapabilityError, match="cannot generate; open a decoder with the native backend"):
        pk.generate(scripted(), Batch((TokenText((3, 4), ("a", "b")),)), 2)

"""What sub-layers write: the sum is the lens in every family, planted writes are found, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import D_VOCAB, N_LAYERS, assert_close, random_weights, scripted, tiny_model, words_tokenizer
from tiny_configs import KINDS

import probekit as pk
from probekit.backends.scripted import Script
from probekit.backends.transformers import TransformersModel
from probekit.core import Batch, CapabilityError, InputError, PlanError, TextError, TokenText

TEXT = "w3 w14 w15 w92 w65 w35"


def opened(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    module = random_weights(AutoModelForCausalLM.from_config(KINDS[kind].config())).eval().to(dtype)
    return TransformersModel.from_loaded(module, words_tokenizer(), name=kind).load()


@pytest.fixture(scope="module")
def writes() -> pk.Writes:
    return pk.sublayer_writes(tiny_model("llama-grouped").model, TEXT)


@pytest.mark.parametrize("kind", list(KINDS))
def test_entering_attention_and_mlp_sum_to_leaving_in_every_family(kind: str) -> None:
    """Against the model's own norm and unembedding, for RMSNorm and LayerNorm, post-norms, parallel blocks, factors."""
    model = opened(kind)
    found, seen = pk.sublayer_writes(model, TEXT, progress=False), pk.cache(model, TEXT, ("resid_pre", "resid_post"))
    unembed = model.unembed
    for layer in range(N_LAYERS):
        for token in (0, 3, -1):
            parts = found.logits(layer, token)
            assert parts.dims == ("case", "vocab") and parts.shape == (4, D_VOCAB)
            total = parts.sel(case=["entering", "attention", "mlp"]).sum("case").values
            assert_close(total, parts.sel(case="leaving").values, atol=2e-5, what=f"{kind} {layer} {token}")
            row = torch.as_tensor(seen["resid_post", layer].values[token])[None]
            with torch.no_grad():
                raw = unembed.norm(row) @ unembed.weight.T + (0 if unembed.bias is None else unembed.bias)
                expected = unembed.finish(raw)[0].numpy()
            assert_close(found.reader.capped_logits(parts.sel(case="leaving").values), expected, atol=2e-5)
            # The part that enters is the stream before the block, not merely what is left over.
            before = seen["resid_pre", layer].values[token]
            after = seen["resid_post", layer].values[token]
            added = found.added["attention"][layer, token] + found.added["mlp"][layer, token]
            assert_close(before + added, after, atol=1e-4 * np.abs(after).max())
    assert found.reader.capped == (kind in {"gemma2", "gemma3"})  # the multimodal model leaves its soft-cap out


@pytest.mark.parametrize("kind", ["llama", "gpt2", "granite", "cohere"])
def test_changes_equal_a_naive_reference(kind: str) -> None:
    """Float64, with the scale that the norm divides by worked out by hand."""
    model = opened(kind)
    found = pk.sublayer_writes(model, TEXT, progress=False)
    norm, head = model.part(model.architecture.final_norm), model.module.get_output_embeddings()
    eps = next(float(getattr(norm, n)) for n in ("variance_epsilon", "eps") if hasattr(norm, n))
    centres = kind in ("gpt2", "cohere")
    after = found.after[1, 4].astype(np.float64)
    centred = after - after.mean() * centres
    scale = np.sqrt((centred**2).mean() + eps)
    assert_close(found.reader.scale[1, 4], scale, rtol=1e-6)
    factor = {"granite": 1 / 4.0, "cohere": 0.25}.get(kind, 1.0)
    for part in ("attention", "mlp"):
        added = found.added[part][1, 4].astype(np.float64)
        read = (added - added.mean() * centres) * norm.weight.detach().double().numpy() / scale
        expected = factor * head.weight.detach().double().numpy() @ read
        best, worst = int(expected.argmax()), int(expected.argmin())
        here = found.at(1, 4, k=3).sel(case=part)
        assert (int(here["promoted_id"][0]), int(here["suppressed_id"][0])) == (best, worst)
        assert_close(here["promoted_logits"][0], expected[best], atol=1e-5)
        assert_close(here["suppressed_logits"].values, np.sort(expected)[:3], atol=1e-5)
        assert_close(here["mean_logits"], expected.mean(), atol=1e-5)
        assert_close(here["norm"], np.linalg.norm(added), rtol=1e-6)


def test_a_planted_write_promotes_exactly_its_token() -> None:
    """No norm, orthonormal unembedding: attention of block 1 writes 3 times row 5, the MLP takes away row 2."""

    def play(text: TokenText) -> Script:
        n = len(text)
        resid, mlp = np.zeros((2, n, 8)), np.zeros((2, n, 8))
        resid[1, :, 5], resid[1, :, 2], mlp[1, :, 2] = 3.0, -1.5, -1.5
        pattern = np.tile(np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None], (2, 1, 1, 1))
        return Script(resid, pattern, mlp=mlp)

    model = scripted(play=play, n_layers=2, n_heads=1, d_model=8, d_vocab=8, unembedding=np.eye(8))
    found = pk.sublayer_writes(model, Batch((TokenText((0, 1, 2), ("a", "b", "c")),)), progress=False)
    here = found.at(-1, 1, k=2)
    attention, mlp = here.sel(case="attention"), here.sel(case="mlp")
    assert attention["promoted_id"].values[0] == 5 and attention["promoted_str"].values[0] == " w5"
    assert attention["promoted_logits"].values.tolist() == [3.0, 0.0]
    assert mlp["suppressed_id"].values[0] == 2 and mlp["suppressed_logits"].values.tolist() == [-1.5, 0.0]
    assert mlp["promoted_logits"].values.tolist() == [0.0, 0.0] and mlp["promoted_id"].values.tolist() == [0, 1]
    assert not found.at(0, 1)["promoted_logits"].values.any()
    assert here.attrs == {"layer": 1, "token": 1, "softcap": False}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_following_a_token_gives_the_lens(kind: str) -> None:
    model = opened(kind)
    found = pk.sublayer_writes(model, TEXT, progress=False)
    lens = pk.run("logit-lens", model, TEXT, top_k=8, progress=False).dataset
    for token in (1, 4):
        next_id = int(lens["token_id"].values[token + 1])
        ids = [next_id, *lens["top_id"].values[-1, token, :3].tolist()]
        path = found.follow(token, ids)
        assert path["logprob_nats"].dims == ("layer", "vocab") and path["vocab"].values.tolist() == ids
        assert_close(path["logprob_nats"].values[:, 0], lens["logprob_nats"].values[:, token], atol=2e-5)
        assert path["rank"].values[:, 0].tolist() == lens["target_rank"].values[:, token].tolist()
        assert_close(path["logprob_nats"].values[-1, 1:], lens["top_logprob"].values[-1, token, :3], atol=2e-5)


def test_half_precision_is_close() -> None:
    fine, coarse = (
        pk.sublayer_writes(opened("llama", d), TEXT, progress=False) for d in (torch.float32, torch.bfloat16)
    )
    a, b = (w.logits(1, 3).sel(case=["attention", "mlp"]).values for w in (fine, coarse))
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.99 and np.abs(a - b).max() < 0.1 * np.abs(a).max()
    parts = coarse.logits(1, 3)
    assert_close(parts[:3].sum("case").values, parts[3].values, atol=1e-4)


def test_chosen_layers_are_those_of_all(writes: pk.Writes) -> None:
    some = pk.sublayer_writes(tiny_model("llama-grouped").model, TEXT, layers=[-1, 0], progress=False)
    assert some.layers == (0, 2) and some.nbytes < writes.nbytes
    for layer in (0, 2, -1):
        assert some.at(layer, 2).identical(writes.at(layer, 2))
    with pytest.raises(InputError, match=r"Block 1 is not among those kept: 0, 2"):
        some.at(1, 2)
    assert some.follow(2, [3])["layer"].values.tolist() == [0, 2]


def test_sizes_are_known_beforehand(writes: pk.Writes) -> None:
    info = tiny_model("llama-grouped").model.info
    assert writes.nbytes == pk.Writes.size(info, 6) == 3 * N_LAYERS * 6 * 32 * 4 + N_LAYERS * 6 * 8
    assert pk.Writes.size(info, 6, 1) == writes.nbytes // 3
    assert repr(writes) == "Writes of tiny-llama-grouped: attention and MLP of 3 blocks, 6 tokens, 7 KiB"


def test_k_is_bounded_by_the_vocabulary_and_sorted(writes: pk.Writes) -> None:
    found = writes.at(0, 0, k=10_000)
    assert found.sizes == {"case": 2, "rank": D_VOCAB}
    assert (np.diff(found["promoted_logits"].values) <= 0).all()
    assert_close(found["promoted_logits"].values[:, ::-1], found["suppressed_logits"].values)


def test_progress_is_told_and_can_end_the_run() -> None:
    model, steps = tiny_model("llama-grouped").model, []
    pk.sublayer_writes(model, TEXT, progress=steps.append)
    assert steps and isinstance(steps[0], pk.Step) and steps[-1].done == pytest.approx(steps[-1].total)

    def stop(step: pk.Step) -> None:
        raise pk.Cancelled("enough")

    with pytest.raises(pk.Cancelled):
        pk.sublayer_writes(model, TEXT, progress=stop)
    assert not any(m._forward_hooks for m in model.module.modules())


def test_what_cannot_be_done_is_refused(writes: pk.Writes) -> None:
    model = tiny_model("llama-grouped").model
    with pytest.raises(PlanError):
        pk.sublayer_writes(model, TEXT, memory_limit=1000)
    with pytest.raises(TextError, match="found 2"):
        pk.sublayer_writes(model, model.tokenize([TEXT, TEXT]))
    with pytest.raises(TextError, match="at most 256"):
        pk.sublayer_writes(model, " ".join(["w5"] * 300))
    with pytest.raises(InputError, match="0 to 2; found \\[3\\]"):
        pk.sublayer_writes(model, TEXT, layers=[0, 3])
    with pytest.raises(InputError, match="tokens 0 to 5; found 6"):
        writes.at(0, 6)
    with pytest.raises(InputError, match="k=0"):
        writes.at(0, 0, k=0)
    with pytest.raises(InputError, match="0 to 127"):
        writes.follow(0, [128])


def test_a_model_without_an_unembedding_is_refused() -> None:
    class Bare:
        info = tiny_model("llama-grouped").model.info
        tokenize = tiny_model("llama-grouped").model.tokenize
        decode = execute = provenance = None

    with pytest.raises((CapabilityError, InputError)):
        pk.sublayer_writes(Bare(), TEXT)

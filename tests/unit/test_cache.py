"""Raw activations of one text: the spellings, the axes, the numbers, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from helpers import D_VOCAB, assert_close, texts_of, tiny_model
from reference import allowed, attention_maps

import probekit as pk
from probekit.core import CapabilityError, Capture, Forward, InputError, Patch, PlanError, TextError, UnknownName
from probekit.reduce import Keep

TEXT = "w3 w14 w15 w92 w65 w35"
EVERYTHING = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_act", "q", "k", "v", "z")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama-grouped").model


@pytest.fixture(scope="module")
def seen(model: Any) -> pk.ActivationCache:
    return pk.cache(model, TEXT, (*EVERYTHING, "pattern", "final_norm", "logits"))


def test_the_default_is_the_stream_after_every_block_and_the_logits(model: Any) -> None:
    found = pk.cache(model, TEXT)
    assert list(found) == list(found.keys()) == ["resid_post.0", "resid_post.1", "resid_post.2", "logits"]
    assert isinstance(found, Mapping) and len(found) == 4
    assert [a.name for a in found.values()] == list(found)


def test_every_spelling_finds_the_same_array(seen: pk.ActivationCache) -> None:
    first = seen["resid_post", 1]
    for key in (("resid_post", -2), "resid_post.1", "resid_post.-2", "blocks.1.hook_resid_post", "layers_output[1]"):
        assert key in seen and seen[key] is first
    assert seen[pk.Point("resid_post", 1)] is first and seen.get("blocks.1.hook_resid_post") is first
    assert seen["blocks.2.attn.hook_pattern"] is seen["pattern", 2]


def test_axes_and_coordinates_are_named(seen: pk.ActivationCache) -> None:
    sizes = {"resid_post.1": (6, 32), "mlp_act.0": (6, 48), "q.2": (6, 4, 8), "k.2": (6, 2, 8), "pattern.0": (4, 6, 6)}
    axes = {
        "resid_post.1": ("token", "d_model"),
        "q.2": ("token", "head", "d_head"),
        "k.2": ("token", "head", "d_head"),
    }
    axes |= {"mlp_act.0": ("token", "d_mlp"), "pattern.0": ("head", "query", "key")}
    for key, dims in axes.items():
        assert seen[key].dims == dims and seen[key].shape == sizes[key] and seen[key].dtype == np.float32
    stream = seen["resid_post.1"]
    assert stream["token_str"].values.tolist() == TEXT.split() and stream["pos"].values.tolist() == list(range(6))
    assert stream["token_id"].values.tolist() == [3, 14, 15, 92, 65, 35]
    assert (
        seen["pattern.0"]["key_str"].values.tolist() == seen["pattern.0"]["query_str"].values.tolist() == TEXT.split()
    )
    assert seen.tokens.values.tolist() == TEXT.split() and seen.tokens["token_id"].values.tolist()[-1] == 35


def test_numbers_are_transformers_own(seen: pk.ActivationCache) -> None:
    """Hidden states, attention maps and logits of the reference model, eager and untouched."""
    with torch.no_grad():
        ids = torch.tensor([[3, 14, 15, 92, 65, 35]])
        plain = tiny_model("llama-grouped").reference(ids, output_hidden_states=True, output_attentions=True)
    for layer in range(3):
        assert_close(seen["resid_pre", layer], plain.hidden_states[layer][0], atol=1e-5)
        assert_close(seen["pattern", layer], plain.attentions[layer][0], atol=1e-6)
    assert_close(seen["final_norm"], plain.hidden_states[3][0], atol=2e-5)
    assert_close(seen.logits, plain.logits[0], atol=1e-4)


def test_maps_are_those_of_the_queries_and_keys() -> None:
    """With a sliding window, from text longer than a block of queries."""
    model, batch = tiny_model("mistral").model, texts_of((150,), D_VOCAB)
    found = pk.cache(model, batch, ("pattern.1", "q.1", "k.1"))
    q, k = (found[site, 1].values.transpose(1, 0, 2) for site in "qk")
    maps = attention_maps(q, k, allowed(150, 8), 8**-0.5)
    assert_close(found["pattern", 1], maps, atol=1e-5)


def test_layers_are_stacked(seen: pk.ActivationCache, model: Any) -> None:
    stacked = seen.stack("resid_post")
    assert stacked.dims == ("layer", "token", "d_model") and stacked["layer"].values.tolist() == [0, 1, 2]
    assert stacked["token_str"].values.tolist() == TEXT.split() and stacked.name == "resid_post"
    for layer in range(3):
        assert np.array_equal(stacked.sel(layer=layer), seen["resid_post", layer])
    assert seen["resid_post"].identical(stacked) and seen["hook_embed"] is seen["embed"]
    assert seen.stack("pattern").dims == ("layer", "head", "query", "key")
    some = pk.cache(model, TEXT, ("z.2", "z.0", "z.-1"))
    assert list(some) == ["z.0", "z.2"] and some.stack("z")["layer"].values.tolist() == [0, 2]


@pytest.mark.parametrize("points", ["resid_post.1", ("resid_post", 1), pk.Point("resid_post", 1), ["resid_post.1"]])
def test_one_point_needs_no_list(model: Any, points: Any) -> None:
    assert list(pk.cache(model, TEXT, points)) == ["resid_post.1"]


def test_a_site_takes_in_its_single_layers(model: Any) -> None:
    assert list(pk.cache(model, TEXT, ("resid_post.1", "resid_post", ("resid_post", -1)))) == [
        "resid_post.0",
        "resid_post.1",
        "resid_post.2",
    ]


def test_patches_are_seen(model: Any) -> None:
    """The patched point, and the logits of an ordinary patched pass; replacing from another cache works as it is."""
    patch, seen = Patch("resid_pre.1", 0.0, positions=(2,)), pk.cache(model, TEXT, ("resid_pre", "logits"))
    found = pk.cache(model, TEXT, ("resid_pre.1", "logits"), patches=(patch,))
    assert not found["resid_pre", 1][2].any() and np.array_equal(found["resid_pre", 1][3], seen["resid_pre", 1][3])
    part = model.execute(Forward((Capture("logits", Keep()),), (patch,)), found.batch)[0]
    assert np.array_equal(found.logits, part.arrays["value"])
    back = (patch, Patch("resid_pre.1", pk.Replace(seen["resid_pre", 1])))
    assert np.array_equal(pk.cache(model, TEXT, "logits", patches=back).logits, seen.logits)


def test_a_missing_key_says_what_there_is_and_how_to_ask(model: Any) -> None:
    found = pk.cache(model, TEXT, ("resid_post.0", "resid_post.2", "q"))
    holds = r"It holds resid_post \(layers 0, 2\), q \(layers 0 to 2\)\. Ask for it: pk.cache\(model, text, points="
    with pytest.raises(LookupError, match=rf"does not hold resid_post.1\. {holds}\(…, \"resid_post.1\"\)\)"):
        found["resid_post", 1]
    with pytest.raises(UnknownName, match=rf"does not hold logits\. {holds}\(…, \"logits\"\)\)"):
        _ = found.logits
    with pytest.raises(UnknownName, match=rf"holds no layer of resid_mid\. {holds}"):
        found.stack("resid_mid")
    with pytest.raises(InputError, match="Layer 3 of 'q' is outside this model: it has 3 layers"):
        found["q", 3]
    with pytest.raises(UnknownName, match=r"Unknown point 'resid_pst\.1'\. Did you mean 'resid_post'"):
        found["resid_pst.1"]
    for missing in ("resid_post.1", "logits", ("q", 3), "nonsense", "blocks.0.hook_attn_out", None, 3.5):
        assert missing not in found
    assert found.get("resid_post.1") is None and found.get("nonsense", 7) == 7


def test_shown_in_a_notebook(model: Any) -> None:
    found = pk.cache(model, "w3 w4", ("resid_post", "pattern.1", "logits"))
    lines = repr(found).splitlines()
    assert lines[0] == "ActivationCache of tiny-llama-grouped: 'w3w4', 2 tokens, 2 KiB"
    assert [line.split(maxsplit=1)[0] for line in lines[1:]] == ["resid_post", "pattern", "logits"]
    assert "layers 0 to 2" in lines[1] and "token 2 × d_model 32" in lines[1] and "query 2 × key 2" in lines[2]
    page = found._repr_html_()
    assert page.count("<tr>") == 4 and "<code>pattern</code>" in page and "head 4 × query 2 × key 2" in page


def test_names_are_escaped_in_html(model: Any) -> None:
    batch = texts_of((2,))
    odd = type(batch)((type(batch.texts[0])((3, 4), ("<b>", "&")),))
    assert "<b>" not in pk.cache(model, odd)._repr_html_()


def test_what_cannot_be_cached_is_refused(model: Any) -> None:
    with pytest.raises(TextError, match="A cache holds one text; found 2"):
        pk.cache(model, texts_of((3, 4)))
    with pytest.raises(TextError, match="Text 0 is empty"):
        pk.cache(model, " ")
    with pytest.raises(TextError, match="has 300 tokens; the model reads at most 256"):
        pk.cache(model, texts_of((300,)))
    with pytest.raises(InputError, match="No point was given"):
        pk.cache(model, TEXT, ())
    with pytest.raises(CapabilityError, match="has no point 'router'"):
        pk.cache(model, TEXT, "router")
    with pytest.raises(InputError, match="Layer 5"):
        pk.cache(model, TEXT, "q.5")
    with pytest.raises(InputError, match="text 0 has 6 tokens"):
        pk.cache(model, TEXT, patches=(Patch("resid_post.1", 0.0, positions=(6,)),))


def test_what_does_not_fit_is_refused_before_it_runs(model: Any) -> None:
    """Whole maps grow with the square of the text: the plan counts them, and the message says what is needed."""
    batch, ran = texts_of((250,), D_VOCAB), []
    handle = model.module.register_forward_pre_hook(lambda *_: ran.append(1))
    maps = 3 * 4 * 250**2 * 4
    try:
        with pytest.raises(PlanError, match=r"needs about .* MiB above the loaded model and 3 MiB are available"):
            pk.cache(model, batch, "pattern", memory_limit=3 << 20)
    finally:
        handle.remove()
    assert not ran and maps < 3 << 20 < 2 * maps
    assert pk.cache(model, batch, "pattern.1", memory_limit=8 << 20).nbytes == maps / 3


def test_several_texts_have_no_whole_maps(model: Any) -> None:
    from probekit.engine import run_pass
    from probekit.reduce import Maps

    request = Forward((Capture("pattern.1", Maps()),))
    with pytest.raises(InputError, match="keeps whole maps, of one text at a time; found 2 texts"):
        run_pass(model, request, texts_of((3, 4)))
    with pytest.raises(InputError, match="one text at a time; found 2 texts"):
        model.execute(request, texts_of((3, 4)))

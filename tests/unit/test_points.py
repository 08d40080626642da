"""Every spelling of a point resolves to one point, and what means something else is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probekit.core import AXES, SITES, CapabilityError, Capture, InputError, ModelInfo, Patch, Point, UnknownName
from probekit.reduce import Norm

LAYERED = sorted(s for s, site in SITES.items() if site.layered)
INFO = ModelInfo(
    name="m", kind="decoder", architecture="llama", n_layers=4, n_heads=2, n_kv_heads=2, d_model=8, d_head=4, d_mlp=16,
    d_vocab=32, n_params=1, context_length=64, dtype="float32", device="cpu", sites=frozenset({"resid_post", "logits"}),
)  # fmt: skip


@given(site=st.sampled_from(LAYERED), layer=st.integers(-99, 99))
def test_canonical_spelling_round_trips(site: str, layer: int) -> None:
    point = Point(site, layer)
    assert Point.of(str(point)) == Point.of((site, layer)) == Point.of(point) == point
    assert Point.of(site) == Point(site) != point


@pytest.mark.parametrize(
    ("spelling", "point"),
    [
        ("blocks.3.hook_resid_post", "resid_post.3"),
        ("blocks.3.hook_out", "resid_post.3"),
        ("blocks.0.hook_resid_pre", "resid_pre.0"),
        ("blocks.12.hook_in", "resid_pre.12"),
        ("blocks.-1.hook_resid_mid", "resid_mid.-1"),
        ("blocks.2.attn.hook_out", "attn_out.2"),
        ("blocks.2.mlp.hook_out", "mlp_out.2"),
        ("blocks.2.attn.hook_pattern", "pattern.2"),
        ("blocks.2.attn.hook_q", "q.2"),
        ("layers_output[3]", "resid_post.3"),
        ("layers_output[-1]", "resid_post.-1"),
        ("layers_input[3]", "resid_pre.3"),
        ("attentions_output[0]", "attn_out.0"),
        ("mlps_output[10]", "mlp_out.10"),
        ("attention_probabilities[1]", "pattern.1"),
        ("hook_embed", "embed"),
        ("token_embeddings", "embed"),
        ("ln_final.hook_out", "final_norm"),
        ("unembed.hook_out", "logits"),
    ],
)
def test_other_tools_spellings(spelling: str, point: str) -> None:
    assert str(Point.of(spelling)) == point


@pytest.mark.parametrize(
    ("spelling", "advice"),
    [
        ("ln_final.hook_normalized", "before the gain"),
        ("blocks.3.hook_attn_out", "blocks.L.attn.hook_out"),
        ("blocks.3.hook_mlp_out", "blocks.L.mlp.hook_out"),
    ],
)
def test_spellings_that_mean_something_else_are_refused(spelling: str, advice: str) -> None:
    with pytest.raises(InputError, match="no exact twin") as caught:
        Point.of(spelling)
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    "spelling", ["resid_pots.3", "resid_post.x", "resid_post.1.5", "blocks.hook_resid_post", "", "3"]
)
def test_unknown_spelling_names_close_ones(spelling: str) -> None:
    with pytest.raises(UnknownName, match="Unknown point"):
        Point.of(spelling)
    with pytest.raises(UnknownName, match="'resid_post'"):
        Point.of("resid_pst")


@pytest.mark.parametrize("spelling", ["logits.3", ("embed", 0), ("hook_embed", 2)])
def test_a_site_that_exists_once_has_no_layer(spelling: str | tuple[str, int]) -> None:
    with pytest.raises(InputError, match="exists once, not per layer"):
        Point.of(spelling)


def test_layers() -> None:
    assert Point("resid_post").layers(3) == (0, 1, 2)
    assert Point("resid_post", 1).layers(3) == (1,) and Point("resid_post", -1).layers(3) == (2,)
    assert Point("logits").layers(3) == (0,)
    for layer in (3, -4):
        with pytest.raises(InputError, match=rf"Layer {layer} of 'resid_post' .* 3 layers, 0 to 2 \(or -3 to -1"):
            Point("resid_post", layer).layers(3)


def test_model_refuses_points_it_lacks() -> None:
    assert INFO.require(Point("resid_post", -1)) == (3,)
    with pytest.raises(CapabilityError, match=r"'m' \(llama, a decoder\) has no point 'pattern'.*logits, resid_post"):
        INFO.require(Point("pattern"))


def test_sites_use_axes_of_the_closed_list() -> None:
    assert all(set(site.dims) <= set(AXES) and site.help for site in SITES.values())


def test_captures_and_patches_are_values() -> None:
    """Equal whatever the spelling; keys tell different ones apart; only a reducer can be captured with."""
    assert Capture("layers_output[3]", Norm()) == Capture(("resid_post", 3), Norm())
    assert Capture("resid_post.3", Norm()).key == "resid_post.3:norm()"
    with pytest.raises(InputError, match=r"Expected a reducer .* found 'norm'"):
        Capture("resid_post", "norm")  # type: ignore[arg-type]
    patches = [Patch("resid_post.3", s, p) for s in (0, 1, 0.5) for p in (None, (0,), (0, -1))]
    assert len({p.key for p in patches}) == len(set(patches)) == 9
    assert Patch("blocks.3.hook_out", 0) == Patch("resid_post.3", 0.0)

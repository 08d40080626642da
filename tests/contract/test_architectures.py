"""Every family of the table: what is captured is what the model computes, by the family's own identities.

The reference is the same weights under transformers' eager attention (`eager_families`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from eager_families import BATCH, HEADS, LENGTHS, Family, Naive, family_of, relative
from helpers import D_MODEL, D_VOCAB, N_HEADS, N_LAYERS, assert_close, random_weights, see, texts_of, words_tokenizer
from reference import allowed, attention_maps, attention_stats, readout
from tiny_configs import KINDS

from probekit.backends.transformers import TransformersModel, architectures
from probekit.core import (
    Add,
    Batch,
    Capture,
    Forward,
    KnockOut,
    LogitDifference,
    NextTokenEntropy,
    Patch,
)
from probekit.reduce import AttentionStats, Field, Keep, NextToken, Norm, Readout, Reducer

GROUPED = [name for name, kind in KINDS.items() if kind.takes_n_kv]


@pytest.fixture(params=KINDS)
def family(request: pytest.FixtureRequest) -> Family:
    return family_of(request.param)


# --- the table ----------------------------------------------------------------------------------------------------


def test_every_family_of_the_table_is_tried() -> None:
    """No row without a configuration here or, for families outside the registry, in a test file of their own."""
    by_registry = {name for name, row in architectures.ARCHITECTURES.items() if not getattr(row, "route", None)}
    assert by_registry - {kind.family for kind in KINDS.values()} == set()


def test_sizes_come_from_the_configuration(family: Family) -> None:
    """Also where a family calls them otherwise, gives heads a width of their own, or nests them in `text_config`."""
    kind, info = KINDS[family.name], family.model.info
    assert (info.n_layers, info.n_heads, info.d_model, info.d_vocab) == (N_LAYERS, N_HEADS, D_MODEL, D_VOCAB)
    assert (info.d_head, info.d_mlp) == (kind.d_head, kind.d_mlp)
    assert info.n_kv_heads == kind.own.get("num_key_value_heads", N_HEADS)
    assert family.values["k"].shape == (N_LAYERS, BATCH.n_tokens, info.n_kv_heads, info.d_head)
    assert family.values["z"].shape == (N_LAYERS, BATCH.n_tokens, N_HEADS, info.d_head)
    if "mlp_act" in info.sites:
        assert family.values["mlp_act"].shape[-1] == info.d_mlp
    unloaded = TransformersModel(KINDS[family.name].config(), words_tokenizer(), family.name, "", lambda: None)
    assert (unloaded.info.n_params, unloaded.info.sites) == (info.n_params, info.sites)


# --- the numbers --------------------------------------------------------------------------------------------------


def test_captured_values_are_the_models_own(family: Family) -> None:
    """Block outputs, q, k, v, z and logits of a padded batch equal those of the eager model, text by text."""
    seen = family.values
    relative(seen["logits"], family.packed([n.logits for n in family.naive]), what="logits")
    for layer in range(N_LAYERS):
        blocks = family.packed([n.blocks[layer] for n in family.naive])
        relative(seen["resid_post"][layer], blocks, what=f"resid_post.{layer}")
        for site in HEADS:
            expected = family.packed([n.heads[layer][site] for n in family.naive])
            relative(seen[site][layer], expected, what=f"{site}.{layer}")


def test_residual_stream_adds_up(family: Family) -> None:
    """Each block adds attn_out and mlp_out to the stream, after the family's own norm and factor, and hands over."""
    seen, row = family.values, family.model.architecture
    config = family.reference.config.get_text_config()
    scale = float(np.abs(seen["resid_post"]).max())

    def added(site: str, path: str | None) -> np.ndarray:
        rows = torch.as_tensor(seen[site])
        if path is not None:
            rows = torch.stack([block.get_submodule(path)(x) for block, x in zip(self_layers, rows, strict=True)])
        return rows.numpy() * getattr(config, "residual_multiplier", 1.0)

    self_layers = family.layers
    attention, mlp = added("attn_out", row.attn_post_norm), added("mlp_out", row.mlp_post_norm)
    assert np.array_equal(seen["resid_pre"][1:], seen["resid_post"][:-1])
    assert_close(seen["resid_post"], seen["resid_pre"] + attention + mlp, atol=2e-6 * scale)
    assert ("resid_mid" in seen) == (family.name not in SIDE_BY_SIDE)
    if "resid_mid" in seen:
        assert_close(seen["resid_mid"], seen["resid_pre"] + attention, atol=2e-6 * scale)
        assert_close(seen["resid_post"], seen["resid_mid"] + mlp, atol=2e-6 * scale)
    if family.name not in ("gpt2", "opt", "granite"):  # learned positions, and a multiplier
        assert np.array_equal(seen["resid_pre"][0], seen["embed"])
    if row.down is not None:
        down = torch.stack([b.get_submodule(row.down)(x) for b, x in zip(self_layers, _rows(seen), strict=True)])
        relative(seen["mlp_out"], down.numpy(), what="mlp_out = down(mlp_act)")
    assert not np.allclose(seen["final_norm"], seen["resid_post"][-1]), "resid_post is read before the final norm"


SIDE_BY_SIDE = {"gpt_neox", "phi", "stablelm-parallel", "cohere", "cohere2"}


def _rows(seen: dict[str, np.ndarray]) -> torch.Tensor:
    return torch.as_tensor(seen["mlp_act"])


@dataclass(frozen=True)
class _RowSums(Reducer):
    """Attention of each row on what it may see, and on what it may not."""

    reads: ClassVar = "attention"
    beyond: int = 8  # the tests' window

    def fields(self) -> dict[str, Field]:
        return {n: Field(("head", "token"), "share", n) for n in ("all", "future", "past_window")}

    def measure(self, piece: Any) -> dict[str, torch.Tensor]:
        query = torch.arange(piece.start, piece.start + piece.probs.shape[2])[:, None]
        distance = query - torch.arange(piece.probs.shape[-1])
        masked = {"all": distance >= 0, "future": distance < 0, "past_window": distance >= self.beyond}
        return {name: (piece.probs * mask).sum(-1) for name, mask in masked.items()}


def test_attention_rows_are_causal_and_sum_to_one(family: Family) -> None:
    """Nothing lies ahead or outside the window; rows sum to 1, or to less where a learned sink takes its share."""
    sums = see(family.model, [Capture("pattern", _RowSums())], BATCH)[0]
    assert np.abs(sums["future"].values).max() == 0
    if family.model.architecture.sinks:
        assert 0 < sums["all"].values.min() < 0.5 < sums["all"].values.max() < 1
    else:
        assert_close(sums["all"], np.ones_like(sums["all"]), atol=2e-6)
    for layer, window in enumerate(KINDS[family.name].windows):
        beyond = np.abs(sums["past_window"].values[layer]).max()
        assert beyond == 0 if window else beyond > 0.05, (layer, window)


def test_statistics_equal_a_naive_reference(family: Family) -> None:
    """Attention statistics, lens, next tokens and norms equal float64 ones from whole eager maps and logits."""
    captures = [
        Capture("pattern", AttentionStats()),
        Capture("resid_post", Readout(5)),
        Capture("logits", NextToken(5)),
        Capture("resid_post", Norm()),
        *(Capture(site, Norm()) for site in HEADS),
    ]
    stats, lens, own, norm, *heads = see(family.model, captures, BATCH)
    norm_of = family.reference.get_submodule(family.model.architecture.final_norm)
    head = family.reference.get_output_embeddings()
    for i, (text, naive) in enumerate(zip(BATCH, family.naive, strict=True)):
        at = slice(BATCH.starts[i], BATCH.starts[i] + len(text))
        next_ids = np.append(np.asarray(text.ids[1:], dtype=int), -1)
        for layer, window in enumerate(KINDS[family.name].windows):
            seen, parts = allowed(len(text), window), naive.heads[layer]
            q, k = (parts[site][0].swapaxes(0, 1) for site in ("q", "k"))
            maps = attention_maps(q, k, seen, **naive.how[layer])
            relative(naive.maps[layer][0], maps, what="the reference's own attention")
            for name, expected in attention_stats(maps, seen).items():
                relative(stats[name].values[layer, ..., at], expected, what=f"{name}, layer {layer}")
            rows = torch.as_tensor(naive.blocks[layer][0])
            read = _finished(family, head(norm_of(rows)).numpy().astype(np.float64))
            _same_readout(lens.isel(layer=layer, token=at), read, next_ids, naive.logits[0])
            relative(norm["norm"].values[layer, at], np.linalg.norm(rows.numpy(), axis=-1), what="norm")
            for site, found in zip(HEADS, heads, strict=True):
                expected = np.linalg.norm(parts[site][0], axis=-1)
                relative(found["norm"].values[layer, at], expected, what=f"norm of {site}")
        _same_readout(own.isel(token=at), naive.logits[0], next_ids, None)


def _finished(family: Family, logits: np.ndarray) -> np.ndarray:
    """What follows the unembedding, spelled out per family."""
    own = KINDS[family.name].own
    if family.name in ("gemma2", "gemma3"):
        return own["final_logit_softcapping"] * np.tanh(logits / own["final_logit_softcapping"])
    return logits * own.get("logit_scale", 1.0) / own.get("logits_scaling", 1.0)


def _same_readout(found: Any, logits: np.ndarray, next_ids: np.ndarray, final: np.ndarray | None) -> None:
    for name, expected in readout(logits, next_ids, 5, final).items():
        if name in found:
            exact = name == "target_rank"
            atol = 0.0 if exact else 1e-4 * float(np.nanmax(np.abs(expected), initial=0.1))
            assert_close(found[name], expected, atol=atol, what=name)


def test_lens_at_the_last_layer_is_the_model(family: Family) -> None:
    """It has the logits of the model's own forward, and a KL of zero to them; scaling and soft-cap included."""
    lens, logits = see(family.model, [Capture("resid_post", Readout(5)), Capture("logits", Keep())], BATCH)
    for i, text in enumerate(BATCH):
        at = slice(BATCH.starts[i], BATCH.starts[i] + len(text))
        own = family.model.own_logits(Batch((text,)))
        relative(logits["value"].values[at], own, what="logits")
        with torch.no_grad():
            entropy = torch.distributions.Categorical(logits=torch.as_tensor(own).double()).entropy()
        assert_close(lens["entropy_nats"].values[-1, at], entropy, atol=2e-5)
    assert np.abs(lens["kl_nats"].values[-1]).max() == 0 < lens["kl_nats"].values[:-1].max()


def test_padding_changes_nothing(family: Family) -> None:
    """A batch padded on the right, each text alone, and the eager model on a batch padded on the left agree."""
    sites = ("resid_post", "z", "logits")
    alone = see(family.model, [Capture(s, Keep()) for s in sites], BATCH, groups=[[i] for i in range(len(BATCH))])
    for site, data in zip(sites, alone, strict=True):
        relative(family.values[site], data["value"].values, what=f"{site}, alone")
    longest = max(LENGTHS)
    ids = torch.full((len(BATCH), longest), 3)
    mask = torch.zeros_like(ids)
    for row, seen, text in zip(ids, mask, BATCH, strict=True):
        row[longest - len(text) :] = torch.tensor(text.ids)
        seen[longest - len(text) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    left = Naive().run(family.reference, family.layers, input_ids=ids, attention_mask=mask, position_ids=positions)
    keep = mask.bool().numpy()
    relative(family.values["logits"], left.logits[keep], what="logits, padded on the left")
    for layer in range(N_LAYERS):
        relative(family.values["resid_post"][layer], left.blocks[layer][keep], what="resid_post, padded on the left")
        relative(family.values["z"][layer], left.heads[layer]["z"][keep], what="z, padded on the left")


@pytest.mark.parametrize("n_kv", [N_HEADS, 2, 1])
@pytest.mark.parametrize("name", GROUPED)
def test_full_grouped_and_single_key_value_heads(name: str, n_kv: int) -> None:
    """Attention statistics and logits hold for every number of key-value heads that the family allows."""
    family = family_of(name, num_key_value_heads=n_kv)
    assert family.model.info.n_kv_heads == n_kv
    batch = BATCH.select([2])
    stats, logits = see(family.model, [Capture("pattern", AttentionStats()), Capture("logits", Keep())], batch)
    naive = Naive().run(family.reference, family.layers, input_ids=torch.tensor([batch.texts[0].ids]))
    relative(logits["value"].values, naive.logits[0], what="logits")
    for layer, window in enumerate(KINDS[name].windows):
        for field_name, expected in attention_stats(naive.maps[layer][0], allowed(13, window)).items():
            relative(stats[field_name].values[layer], expected, what=field_name)


@pytest.mark.parametrize("name", KINDS)
def test_half_precision_passes_the_self_check(name: str) -> None:
    """Weights in bfloat16 load, and probabilities are still those of float32 attention."""
    from transformers import AutoModelForCausalLM

    module = random_weights(AutoModelForCausalLM.from_config(KINDS[name].config())).to(torch.bfloat16).eval()
    for parameter in module.parameters():
        if (
            parameter.ndim > 1
        ):  # milder than elsewhere: eager attention in bfloat16 is itself off by a share of its scores
            parameter.data *= 0.5
    model = TransformersModel.from_loaded(module, words_tokenizer(), name=name).load()
    sums = see(model, [Capture("pattern", _RowSums())], texts_of((9, 4), 100))[0]["all"].values
    assert np.abs(sums - 1).max() < 1e-5 or model.architecture.sinks


# --- changes ------------------------------------------------------------------------------------------------------


def test_identity_is_exact_and_zero_is_live_wherever_changes_are_offered(family: Family) -> None:
    """At every changeable site: multiplying by 1 changes no bit; a zero is seen at the point and reaches the logits."""
    batch = BATCH.select([1, 2])
    for site in sorted(family.model.info.sites - {"resid_mid", "final_norm", "logits", "router", "pattern"}):
        point = "embed" if site == "embed" else f"{site}.1"
        captures = (Capture("logits", Keep()), Capture(point, Keep()))

        def run(*patches: Patch, wanted: Any = captures) -> list[np.ndarray]:
            return [p.arrays["value"] for p in family.model.execute(Forward(wanted, patches), batch)]

        plain, same, gone = run(), run(Patch(point, 1.0)), run(Patch(point, 0.0))
        assert all(np.array_equal(a, b) for a, b in zip(same, plain, strict=True)), site
        assert np.abs(plain[1]).max() > 0 == np.abs(gone[1]).max(), site
        assert np.abs(gone[0] - plain[0]).max() > 1e-3, f"{site}: the patch is decorative"


def test_knocked_out_edges_leave_their_share_to_the_rest(family: Family) -> None:
    """Without key 0 in block 1, the rest of each row (and a learned sink) takes over, as in a float64 softmax."""
    batch = BATCH.select([2])
    cut = Patch("pattern.1", KnockOut(keys=[0], queries=range(1, 13)))
    captures = [Capture("pattern.1", AttentionStats())]
    found = family.model.execute(Forward(tuple(captures), (cut,)), batch)[0].arrays
    parts, how = family.naive[2].heads[1], family.naive[2].how[1]
    seen = allowed(13, KINDS[family.name].windows[1])
    seen[1:, 0] = False
    maps = attention_maps(*(parts[s][0].swapaxes(0, 1) for s in ("q", "k")), seen, **how)
    expected = attention_stats(maps, seen)
    for name in ("entropy_nats", "max", "first_share"):
        relative(found[name][0], expected[name], what=name)


@pytest.mark.parametrize("metric", [LogitDifference((7,), (9,)), NextTokenEntropy()], ids=["difference", "entropy"])
def test_gradients_are_slopes(family: Family, metric: LogitDifference | NextTokenEntropy) -> None:
    """Along a random direction at attn_out and mlp_out, the gradient of a number is its slope."""
    batch = BATCH.select([2])
    rng = np.random.default_rng(5)
    for point in ("attn_out.1", "mlp_out.1"):
        request = Forward((Capture(point, Keep()),), texts=(2,), gradient_of=metric)
        gradient = family.model.execute(request, batch)[0].arrays["value"][0]
        size = float(np.abs(see(family.model, [Capture(point, Keep())], batch)[0]["value"].values).mean())
        direction = rng.normal(size=gradient.shape).astype(np.float32) * size

        def difference(step: float, point: str = point, direction: np.ndarray = direction) -> float:
            request = Forward((Capture("logits", Keep()),), (Patch(point, Add(direction, step)),))
            last = family.model.execute(request, batch)[0].arrays["value"][-1].astype(np.float64)
            logprob = last - last.max() - np.log(np.exp(last - last.max()).sum())
            entropy = -float((np.exp(logprob) * logprob).sum())
            return entropy if isinstance(metric, NextTokenEntropy) else float(last[7] - last[9])

        slope = (difference(2e-3) - difference(-2e-3)) / 4e-3
        scale = float(np.linalg.norm(gradient * direction))
        assert scale > 0
        assert abs(float((gradient * direction).sum()) - slope) < 0.03 * scale, point

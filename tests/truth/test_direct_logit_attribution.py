"""Direct logit attribution: parts equal a naive sum in float64, add up in every family, and planted writers are found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    D_VOCAB,
    N_LAYERS,
    assert_close,
    random_weights,
    run,
    scripted,
    texts_of,
    tiny_model,
    words_tokenizer,
)
from tiny_configs import KINDS

from probekit.analysis import Result
from probekit.backends.scripted import Script, random_play
from probekit.backends.transformers import TransformersModel
from probekit.core import Batch, SelfCheckError, TokenText
from probekit.reduce import DirectRows, LogitDirection, pair_ids
from probekit.reduce.frozen_norm import FrozenNorm

NAME = "direct-logit-attribution"
LENGTHS = (24, 20, 31, 18, 40, 22)


def attribute(model: Any, batch: Batch | None = None, **params: Any) -> Result:
    return run(NAME, model, batch or texts_of(LENGTHS), **params)[NAME]


def total(result: Result) -> np.ndarray:
    data = result.dataset
    parts = data["attention_logits"].sum("layer") + data["mlp_logits"].sum("layer")
    return (parts + data["embedding_logits"] + data["bias_logits"]).values


def test_hand_computed_case() -> None:
    """Two blocks, no norm: block 0 writes (2, 0), block 1 (1, 1); logits are the entries, so the parts are 2 and 0."""

    def play(text: TokenText) -> Script:
        resid = np.tile(np.array([[[2.0, 0.0]], [[3.0, 1.0]]]), (1, len(text), 1))
        return Script(
            resid,
            np.tile(np.tril(np.ones((len(text), len(text)))) / np.arange(1, len(text) + 1)[:, None], (2, 1, 1, 1)),
        )

    model = scripted(play=play, n_layers=2, n_heads=1, d_model=2, d_vocab=2, unembedding=np.eye(2))
    result = attribute(model, Batch((TokenText((0, 1, 0, 1), ("a", "b", "a", "b")),)))
    assert result["plus_id"].values.tolist() == [0] * 4 and result["minus_id"].values.tolist() == [1] * 4
    assert result["attention_logits"].values.tolist() == [[2.0] * 4, [0.0] * 4]
    assert not result["mlp_logits"].values.any() and not result["embedding_logits"].values.any()
    assert_close(result["difference_logits"], np.full(4, 2.0), atol=1e-6)
    found = result.findings[0]
    assert found.where == {"component": "attention 0"} and found.value == 2


@pytest.mark.parametrize("pair", ["top", "target"])
@pytest.mark.parametrize("kind", ["llama-grouped", "gpt2"])
def test_parts_equal_a_naive_reference(kind: str, pair: str) -> None:
    """Float64, from transformers' own modules and their weights: RMSNorm and LayerNorm with bias, by hand."""
    tiny, batch = tiny_model(kind), texts_of((20, 14))
    result = attribute(tiny.model, batch, pair=pair)
    reference = tiny.reference
    blocks = reference.model.layers if kind != "gpt2" else reference.transformer.h
    norm = reference.model.norm if kind != "gpt2" else reference.transformer.ln_f
    start = 0
    for text in batch:
        seen: dict[str, torch.Tensor] = {}
        hooks = [blocks[0].register_forward_pre_hook(lambda _, args, s=seen: s.update(embed=args[0][0].double()))]
        for i, block in enumerate(blocks):
            for name, module in (("attn", getattr(block, "self_attn", None) or block.attn), ("mlp", block.mlp)):

                def keep(_: Any, __: Any, out: Any, key: str = f"{name}{i}", s: dict[str, Any] = seen) -> None:
                    s[key] = (out[0] if isinstance(out, tuple) else out)[0].double()

                hooks.append(module.register_forward_hook(keep))
        with torch.no_grad():
            logits = reference(torch.tensor([text.ids]), use_cache=False).logits[0].double()
        for hook in hooks:
            hook.remove()
        stream = torch.stack(list(seen.values())).sum(0)
        centre = (lambda x: x - x.mean(-1, keepdim=True)) if kind == "gpt2" else (lambda x: x)
        scale = (centre(stream).square().mean(-1) + (norm.eps if kind == "gpt2" else norm.variance_epsilon)).sqrt()
        order = logits.argsort(-1, descending=True)
        plus, minus = order[:, 0], order[:, 1]
        if pair == "target":
            plus = torch.tensor([*text.ids[1:], 0])
            minus = torch.where(order[:, 0] == plus, order[:, 1], order[:, 0])
        unembedding = reference.get_output_embeddings().weight.detach().double()
        reader = (unembedding[plus] - unembedding[minus]) * norm.weight.detach().double() / scale[:, None]
        known = len(text) - (pair == "target")
        here = slice(start, start + known)
        for i in range(N_LAYERS):
            for name, key in (("attention_logits", f"attn{i}"), ("mlp_logits", f"mlp{i}")):
                expected = (centre(seen[key]) * reader).sum(-1)[:known]
                assert_close(result[name].values[i, here], expected, atol=2e-5, what=key)
        assert_close(
            result["embedding_logits"].values[here], (centre(seen["embed"]) * reader).sum(-1)[:known], atol=2e-5
        )
        rows = torch.arange(len(text))
        assert_close(total(result)[here], (logits[rows, plus] - logits[rows, minus])[:known], atol=2e-5)
        start += len(text)


@pytest.mark.parametrize("kind", list(KINDS))
def test_parts_add_up_in_every_family(kind: str) -> None:
    """Post-norms, multipliers, parallel blocks, soft-caps and factors after the unembedding: within 1e-5 logits."""
    from transformers import AutoModelForCausalLM

    module = random_weights(AutoModelForCausalLM.from_config(KINDS[kind].config())).eval()
    result = attribute(TransformersModel.from_loaded(module, words_tokenizer(), name=kind).load(), texts_of((20, 13)))
    assert_close(total(result), result["difference_logits"].values, atol=1e-5)
    assert result.dataset.attrs["sum_error_logits"] < 1e-5
    assert np.abs(result["attention_logits"].values).max() > 1e-3 < np.abs(result["mlp_logits"].values).max()


def test_the_only_writer_is_found() -> None:
    """All sub-layers silenced but one MLP: everything else contributes exactly nothing."""
    from transformers import AutoModelForCausalLM

    module = random_weights(AutoModelForCausalLM.from_config(KINDS["llama"].config())).eval()
    model = TransformersModel.from_loaded(module, words_tokenizer(), name="planted").load()
    with torch.no_grad():
        for i, block in enumerate(module.model.layers):
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.mul_(20.0 * (i == 1))
    result = attribute(model)
    assert result.findings[0].where == {"component": "MLP 1"}
    assert not result["attention_logits"].values.any() and not result["mlp_logits"].values[[0, 2]].any()
    written = result["difference_logits"] - result["embedding_logits"]
    assert_close(result["mlp_logits"].values[1], written.values, atol=1e-5)


def test_random_pairs_are_a_null() -> None:
    """Between random tokens, streams without structure contribute nothing on average; the pairs belong to the text."""
    means = []
    for seed in range(30):
        result = attribute(scripted(play=random_play(seed=seed)), texts_of((30, 30), seed=seed))
        means.append(result["random_attention_logits"].values.sum(0).mean())
    assert abs(np.mean(means)) < 3 * np.std(means, ddof=1) / len(means) ** 0.5
    batch = texts_of((9, 5))
    first = pair_ids("random", np.zeros((14, 2)), batch, D_VOCAB)
    again = pair_ids("random", np.zeros((14, 2)), batch.select([1, 0]), D_VOCAB)
    assert_close(first[0][9:], again[0][:5])
    assert (first[0] != first[1]).all() and first[0].max() < D_VOCAB


def test_pairs_of_tokens() -> None:
    """The target against the likeliest other token, which is the second where the target itself is likeliest."""
    batch = Batch((TokenText((5, 6, 7), ("a", "b", "c")),))
    top = np.array([[6, 9], [8, 7], [1, 2]])
    plus, minus = pair_ids("target", top, batch, 10)
    assert plus.tolist() == [6, 7, -1] and minus.tolist() == [9, 8, -1]
    assert [ids.tolist() for ids in pair_ids("top", top, batch, 10)] == [[6, 8, 1], [9, 7, 2]]
    with pytest.raises(ValueError, match="one of top, target, random; found 'best'"):
        LogitDirection("best")  # type: ignore[arg-type]


def test_parts_that_do_not_add_up_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = LogitDirection.measure

    def wrong(self: LogitDirection, piece: DirectRows) -> dict[str, torch.Tensor]:
        return {"projection": 1.01 * measure(self, piece)["projection"]}

    monkeypatch.setattr(LogitDirection, "measure", wrong)
    with pytest.raises(SelfCheckError, match=r"contributions miss the logit difference by .* at token \d+"):
        attribute(tiny_model("llama-grouped").model)


@pytest.mark.parametrize("width", [8, 9])
@pytest.mark.parametrize("kind", ["layer", "rms", "plus-one", "none"])
def test_norms_are_found_out(kind: str, width: int) -> None:
    """Gain, bias, centring and scale of LayerNorm, RMSNorm, Gemma's RMSNorm and no norm."""
    generator = torch.Generator().manual_seed(width)
    gain, bias, rows = (torch.randn(s, generator=generator) for s in ((width,), (width,), (6, width)))

    def norm(x: torch.Tensor) -> torch.Tensor:
        if kind == "layer":
            return torch.nn.functional.layer_norm(x, (width,), gain, bias)
        scale = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return x if kind == "none" else x * scale * (gain if kind == "rms" else 1 + gain)

    found = FrozenNorm.of(norm, rows)
    scale = found.scale(rows, norm(rows))
    readers = torch.randn(6, width, generator=generator)
    expected = (norm(rows).double() * readers).sum(-1)
    assert_close((found.direction(readers, scale) * rows).sum(-1) + found.offset(readers), expected, atol=1e-5)
    if kind != "none":
        centred = rows - rows.mean(-1, keepdim=True) if kind == "layer" else rows
        assert_close(scale, centred.square().mean(-1).sqrt(), rtol=1e-4)
        assert_close(found.gain, 1 + gain if kind == "plus-one" else gain, rtol=1e-5, atol=1e-6)
    assert found.centres == (kind == "layer")


def test_a_norm_of_another_form_is_refused() -> None:
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(SelfCheckError, match="no LayerNorm or RMSNorm"):
        FrozenNorm.of(torch.tanh, rows).scale(rows, torch.tanh(rows))

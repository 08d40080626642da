"""The table of families: a wrong row does not load, what it does not describe is refused by name, vocabularies fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from eager_families import BATCH, family_of
from helpers import D_VOCAB, random_weights, see, words_tokenizer
from tiny_configs import KINDS

from probekit.backends.transformers import TransformersModel, architectures
from probekit.core import Batch, Capture, ModelError, SelfCheckError, TokenText
from probekit.reduce import Keep, NextToken

# --- the self-check -----------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "no norm after attention": ("gemma2", {"attn_post_norm": None}, r"resid_mid = resid_pre \+ attn_out"),
    "no norm after the MLP": ("olmo2", {"mlp_post_norm": None}, r"resid_post = resid_mid \+ mlp_out"),
    "no factor on sub-layers": ("granite", {"residual_multiplier": None}, r"resid_mid = resid_pre \+ attn_out"),
    "no factor, side by side": ("cohere", {"residual_multiplier": "logit_scale"}, r"resid_pre \+ attn_out \+ mlp_out"),
    "no soft-cap": ("gemma3", {"logit_softcap": None}, "the lens at the last layer"),
    "no divisor": ("granite", {"logit_divisor": None}, "the lens at the last layer"),
    "no multiplier": ("cohere2", {"logit_multiplier": None}, "the lens at the last layer"),
    "no sinks": ("gpt_oss", {"sinks": False}, "attention rows sum to one"),
    "sequential instead of parallel": ("gpt_neox", {"parallel": None}, r"resid_mid = resid_pre \+ attn_out"),
    "the MLP's first projection": ("opt", {"down": "fc1"}, r"mlp_act has 32 entries per token, expected d_mlp = 40"),
}


@pytest.mark.parametrize("name", WRONG)
def test_self_check_refuses_a_wrong_detail_of_a_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thing that a row says of its family is held against what the model computes."""
    kind, wrong, message = WRONG[name]
    module = family_of(kind).model.module
    row = architectures.ARCHITECTURES[KINDS[kind].family]
    monkeypatch.setitem(architectures.ARCHITECTURES, KINDS[kind].family, dataclasses.replace(row, **wrong))
    model = TransformersModel.from_loaded(module, words_tokenizer(), name="wrong")
    with pytest.raises(SelfCheckError, match=message) as caught:
        model.load()
    assert "'wrong' fails the self-check" in str(caught.value)


# --- what is refused ----------------------------------------------------------------------------------------------

REFUSED = {
    "opt, post-norm": ("opt", {"do_layer_norm_before": False}, r"norms after the residual sums, as in opt-350m"),
    "opt, no final norm": ("opt", {"_remove_final_layer_norm": True}, r"no final norm"),
    "opt, projected": ("opt", {"word_embed_proj_dim": 16}, r"embeddings of another width than the stream"),
    "gpt2, cross-attention": ("gpt2", {"add_cross_attention": True}, r"cross-attention"),
    "gemma3, looking ahead": ("gemma3", {"use_bidirectional_attention": True}, r"attention that looks ahead"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_variants_that_are_laid_out_otherwise_are_refused_by_name(name: str) -> None:
    kind, option, message = REFUSED[name]
    family = KINDS[kind].family
    with pytest.raises(ModelError, match=message) as caught:
        TransformersModel(KINDS[kind].config(**option), words_tokenizer(), "tried", "", lambda: None)
    assert f"'tried' is of the family '{family}'" in str(caught.value)
    assert "Families that probekit captures: " in str(caught.value)
    assert all(known in str(caught.value) for known in architectures.ARCHITECTURES)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("bert", r"is an encoder \(bert\); expected a decoder"),
        ("t5", r"is an encoder-decoder \(t5\); expected a decoder"),
        ("mamba", r"is of the family 'mamba', which probekit cannot capture yet"),
        ("llava", r"a 'llama' decoder inside a larger model"),
    ],
)
def test_other_kinds_of_models_are_refused_by_name(model_type: str, message: str) -> None:
    from transformers import AutoConfig

    with pytest.raises(ModelError, match=message) as caught:
        TransformersModel(AutoConfig.for_model(model_type), words_tokenizer(), "tried", "", lambda: None)
    assert all(known in str(caught.value) for known in architectures.ARCHITECTURES)


# --- padded vocabularies ------------------------------------------------------------------------------------------


def test_a_vocabulary_padded_beyond_the_tokenizer() -> None:
    """The lens has every row of the unembedding; ids that the tokenizer lacks show a placeholder."""
    family = family_of("qwen2")
    tokenizer = words_tokenizer(100)
    assert len(tokenizer) == 100
    model = TransformersModel.from_loaded(family.model.module, tokenizer, name="padded").load()
    assert model.info.d_vocab == D_VOCAB
    assert model.decode([3, 99, 100, 127]) == ("w3", "w99", "<unused 100>", "<unused 127>")
    batch = Batch((TokenText((5, 120, 7), ("a", "b", "c")),))
    logits, own = see(model, [Capture("logits", Keep()), Capture("logits", NextToken(D_VOCAB))], batch)
    assert logits["value"].shape == (3, D_VOCAB)
    assert own["top_id"].values.max() == D_VOCAB - 1


def test_the_unembedding_counts_where_the_configuration_says_otherwise() -> None:
    """A model whose embeddings were resized by hand has as many logits as its unembedding has rows."""
    from transformers import AutoModelForCausalLM

    module = random_weights(AutoModelForCausalLM.from_config(KINDS["llama"].config())).eval()
    module.resize_token_embeddings(136)
    module.config.vocab_size = D_VOCAB
    model = TransformersModel.from_loaded(module, words_tokenizer(), name="resized").load()
    assert model.info.d_vocab == 136
    assert see(model, [Capture("logits", Keep())], BATCH)[0]["value"].shape[-1] == 136

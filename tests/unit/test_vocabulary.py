"""Vocabularies decoded and encoded again, and rows read off files without loading the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_weights, words_tokenizer
from tiny_configs import KINDS
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from probekit.backends.transformers import TransformersModel
from probekit.backends.transformers.vocabulary import vocabulary_table
from probekit.methods.token_categories import OK, UNREACHABLE_SINGLE, UNUSED, categories


def sentencepiece_like(extra: tuple[str, ...] = ()) -> Any:
    """A Unigram tokenizer that puts a space in front of every text, as Llama's and Mistral's do."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = ["<unk>", "▁cat", "cat", "▁", "c", "a", "t", "s", "e", "«", "»", "▁«", "▁test", "Cat", *extra]
    own = Tokenizer(models.Unigram([(p, -1.0 if len(p) > 2 else -3.0) for p in pieces], unk_id=0))
    own.normalizer = normalizers.Lowercase()
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    own.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="always"), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")


def test_a_space_in_front_is_kept_apart_from_the_token() -> None:
    """Behind the mark "cat" and "▁cat" are two tokens; at the start of a text both would become "▁cat"."""
    tokenizer = sentencepiece_like()
    table = vocabulary_table(tokenizer, 15)
    pieces = list(table.pieces)
    with_space, without = pieces.index("▁cat"), pieces.index("cat")
    assert (table.decoded[with_space], table.decoded[without]) == (" cat", "cat")
    assert (table.encoded[with_space], table.encoded[without]) == ((with_space,), (without,))
    assert tokenizer("cat", add_special_tokens=False)["input_ids"] == [with_space], "without the mark they are one"
    kinds = categories(table)
    assert kinds[with_space] == kinds[without] == OK
    assert kinds[pieces.index("Cat")] == UNREACHABLE_SINGLE and table.encoded[pieces.index("Cat")] == (without,)
    assert kinds[14] == UNUSED and table.pieces[14] == "" and table.shown[14] == "<unused 14>"


def test_a_token_that_merges_with_the_mark_is_tried_behind_the_other() -> None:
    """With a piece "«cat", "cat" behind "«" would vanish; behind "»" it is itself."""
    table = vocabulary_table(sentencepiece_like(("▁«cat", "«cat")), 16)
    cat = table.pieces.index("cat")
    assert table.encoded[cat] == (cat,)


def test_a_tokenizer_without_such_a_space_needs_no_mark() -> None:
    table = vocabulary_table(words_tokenizer(20), 24)
    assert [e == (i,) for i, e in enumerate(table.encoded)] == [True] * 20 + [False] * 4
    assert table.special.nonzero()[0].tolist() == [0, 1, 2] and table.encoded[23] == ()


# --- rows off files -----------------------------------------------------------------------------------------------

FAMILIES = {
    "llama": {}, "llama-tied": {"tie_word_embeddings": True}, "gpt2": {}, "gpt2-untied": {"tie_word_embeddings": False},
    "gpt_neox": {}, "opt": {}, "phi": {}, "gemma2": {}, "qwen2": {}, "cohere": {}, "nemotron": {}, "gemma3-multimodal": {},
}  # fmt: skip


def saved(name: str, folder: Path, **how: Any) -> Any:
    kind = KINDS[name.removesuffix("-tied").removesuffix("-untied")]
    module: Any = random_weights(AutoModelForCausalLM.from_config(kind.config(**FAMILIES[name]))).eval()
    module.save_pretrained(folder, **how)
    words_tokenizer().save_pretrained(folder)
    return module


def opened(folder: Path) -> TransformersModel:
    return TransformersModel.from_folder(folder, name="tiny")


def compared(folder: Path) -> tuple[bool, bool]:
    """Whether rows could be read without loading, and whether they are tied; asserts that both ways agree."""
    model = opened(folder)
    off_files = model.vocabulary_weights()
    unloaded = not model.loaded
    loaded = opened(folder).load().vocabulary_weights()
    assert off_files.tied == loaded.tied == (off_files.embedding is off_files.unembedding)
    for name in ("embedding", "unembedding", "bias"):
        a, b = getattr(off_files, name), getattr(loaded, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == np.float32
            np.testing.assert_array_equal(a, b, err_msg=name)
    return unloaded, loaded.tied


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_off_files_are_those_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    module = saved(name, tmp_path)
    unloaded, tied = compared(tmp_path)
    assert unloaded or name == "gemma3-multimodal", "only names that differ in the files may need the model"
    assert tied == bool(module.config.get_text_config().tie_word_embeddings)


def test_tied_and_untied_and_a_bias_are_among_the_families(tmp_path: Path) -> None:
    seen = set()
    for name in ("llama", "llama-tied", "phi"):
        saved(name, tmp_path / name)
        weights = opened(tmp_path / name).vocabulary_weights()
        seen.add((weights.tied, weights.bias is not None))
    assert seen == {(False, False), (True, False), (False, True)}


def test_rows_in_several_files(tmp_path: Path) -> None:
    saved("llama", tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert compared(tmp_path) == (True, False)


def test_rows_in_half_precision_become_float32(tmp_path: Path) -> None:
    module = saved("llama", tmp_path)
    module.to(torch.bfloat16).save_pretrained(tmp_path)
    assert compared(tmp_path) == (True, False)


def test_a_configuration_that_says_tied_of_files_that_are_not(tmp_path: Path) -> None:
    """transformers then believes the files; so do we."""
    import json

    saved("llama", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert compared(tmp_path) == (True, False)


def test_other_files_are_loaded(tmp_path: Path) -> None:
    """Weights of another form fall back to the model itself."""
    module = saved("llama", tmp_path)
    expected = opened(tmp_path).vocabulary_weights()
    (tmp_path / "model.safetensors").unlink()
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    model = opened(tmp_path)
    found = model.vocabulary_weights()
    assert model.loaded
    np.testing.assert_array_equal(found.unembedding, expected.unembedding)
    assert model.provenance()["weights_hash"].startswith("sha256:")

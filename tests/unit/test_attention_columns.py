"""Attention columns of text embedders: those of eager attention, without padding, and the model is left as it was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import words_tokenizer

from probekit.backends.sentence_transformers import SentenceTransformersModel
from probekit.core import AttentionColumns, CapabilityError, Columns, InputError, TextError
from probekit.engine.look_up import answer

TEXTS = ("w3 w4 w5 w6 w9", "w7", "w8 w9 w10")
AT = (1, 0, 2)
_SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "pad_token_id": 0}
KINDS: dict[str, dict[str, Any]] = {
    "bert": _SIZES,
    "mpnet": _SIZES,
    "xlm-roberta": _SIZES,
    "modernbert": _SIZES | {"local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
    "t5": _T5,
    "mistral": _SIZES | {"num_key_value_heads": 2},  # a decoder
}


def tiny(kind: str, folder: Path) -> SentenceTransformersModel:
    """A random embedder of one family, saved as sentence-transformers saves it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoConfig, AutoModel, T5EncoderModel

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **KINDS[kind])
    module = T5EncoderModel(config) if kind == "t5" else AutoModel.from_config(config)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(0, 0.3)
    module.save_pretrained(folder / "plain")
    words_tokenizer().save_pretrained(folder / "plain")
    SentenceTransformer(modules=[Transformer(str(folder / "plain")), Pooling(32)], device="cpu").save(
        str(folder / "st")
    )
    return SentenceTransformersModel.from_folder(folder / "st", name=kind, device="cpu")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformersModel:
    return tiny("bert", tmp_path_factory.mktemp("bert"))


def state(module: Any) -> dict[str, Any]:
    """What a look at attention could have changed."""
    return {
        "attention": [m.config._attn_implementation for m in module.modules() if hasattr(m, "config")],
        "hooks": [list(m._forward_hooks) for m in module.modules()],
        "training": [m.training for m in module.modules()],
        "own": [sorted(vars(m)) for m in module.modules()],
        "weights": {n: t.data_ptr() for n, t in module.state_dict().items()},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_those_of_an_eager_copy(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModel, T5EncoderModel

    model = tiny(kind, tmp_path)
    inner, embedded = model.module[0].model, model.embed_texts(TEXTS).values
    before = state(inner)
    found = model.attention_columns(TEXTS, AT)
    assert state(inner) == before
    np.testing.assert_array_equal(model.embed_texts(TEXTS).values, embedded)
    load = (T5EncoderModel if kind == "t5" else AutoModel).from_pretrained
    eager = load(tmp_path / "plain", attn_implementation="eager").eval()
    assert found.values.dtype == np.float32 and found.values.shape == (3, 4, 9)
    assert found.lengths.tolist() == [5, 1, 3]
    for i, (text, at) in enumerate(zip(TEXTS, AT, strict=True)):
        ids = torch.tensor([model.ids_of([text], special=True)[0]])
        with torch.no_grad():  # alone, so that nothing is padding
            maps = eager(input_ids=ids, attention_mask=torch.ones_like(ids), output_attentions=True).attentions
        expected = torch.stack(maps)[:, 0, :, :, at].numpy()
        np.testing.assert_allclose(found.of(i), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "mistral"])
def test_all_columns_of_a_text_sum_to_one_for_each_query(kind: str, tmp_path: Path) -> None:
    found = tiny(kind, tmp_path).attention_columns([TEXTS[0]] * 5, range(5))
    np.testing.assert_allclose(sum(found.of(i) for i in range(5)), 1, atol=1e-6)
    queries_in_front = found.of(3)[..., :3]
    assert (queries_in_front == 0).all() == (kind == "mistral")  # a decoder's queries see nothing behind them


def test_company_and_batches_change_nothing(bert: SentenceTransformersModel, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, at, told = TEXTS * 4, AT * 4, []
    together = bert.attention_columns(texts, at, progress=told.append)
    assert told == [12]
    monkeypatch.setattr("probekit.backends.attention_columns._ENTRIES", 3 * 12 * 25)
    told.clear()
    parts = bert.attention_columns(texts, at, progress=told.append)
    assert len(told) > 2 and sum(told) == 12
    np.testing.assert_allclose(parts.values, together.values, atol=1e-6)


def test_the_model_is_left_as_found_after_an_error_and_in_training_mode(bert: SentenceTransformersModel) -> None:
    inner = bert.module[0].model
    expected = bert.attention_columns(TEXTS, AT).values
    inner.train()
    before = state(inner)
    np.testing.assert_array_equal(bert.attention_columns(TEXTS, AT).values, expected)  # without dropout
    assert state(inner) == before

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("boom")

    handle = inner.encoder.layer[1].register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="boom"):
        bert.attention_columns(TEXTS, AT)
    assert list(inner.encoder.layer[1]._forward_hooks) == [handle.id]
    handle.remove()
    assert state(inner) == before
    inner.eval()


def test_hooks_of_others_stay(bert: SentenceTransformersModel) -> None:
    """Also those of transformers itself, where somebody has asked it for attention before."""
    inner = bert.module[0].model
    ids = torch.tensor([[3, 4]])
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner.config, "_attn_implementation_internal", "eager")
        inner(input_ids=ids, output_attentions=True)
    before = state(inner)
    assert any(before["hooks"])
    bert.attention_columns(TEXTS, AT)
    assert state(inner) == before
    added = []

    def meanwhile(_: int) -> None:
        added.append(inner.register_forward_hook(lambda *_: None))

    bert.attention_columns(TEXTS, AT, progress=meanwhile)
    assert [h.id in inner._forward_hooks for h in added] == [True]
    added[0].remove()


@pytest.mark.parametrize("shown", ["nothing", "too few", "rows of another sum", "refused"])
def test_a_model_without_attention_is_refused_or_says_why(
    bert: SentenceTransformersModel, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = bert.module[0].model
    own = inner.forward

    def forward(*args: Any, **more: Any) -> Any:
        if shown == "refused":
            raise TypeError("unexpected keyword 'output_attentions'")
        found = own(*args, **more)
        maps = {"nothing": None, "too few": found.attentions[:2]}.get(shown, tuple(m / 2 for m in found.attentions))
        found["attentions"] = maps
        return found

    monkeypatch.setattr(inner, "forward", forward)
    expected = {
        "nothing": "found 0 of shapes", "too few": "found 2 of shapes", "refused": r"found an error \(unexpected",
        "rows of another sum": r"found rows of layer 0 that sum to 0\.5",
    }[shown]  # fmt: skip
    with pytest.raises(
        CapabilityError, match=f"BertModel shows no attention probabilities: expected 3 maps.*{expected}"
    ):
        answer(bert, Columns(TEXTS, AT))
    found = answer(bert, Columns(TEXTS, AT, optional=True))
    assert isinstance(found, AttentionColumns) and "shows no attention" in found.missing and not found.values.size


def test_a_model_that_embeds_only_is_refused_or_says_why() -> None:
    class Other:
        class info:
            name = "other"

    other: Any = Other()
    with pytest.raises(CapabilityError, match=r"'other' .* cannot show attention columns; open a text-embedding model"):
        answer(other, Columns(("a",), (0,)))
    assert "cannot show attention columns" in answer(other, Columns(("a",), (0,), optional=True)).missing


def test_positions_have_to_fit(bert: SentenceTransformersModel) -> None:
    with pytest.raises(InputError, match="Text 1 has the positions 0 to 0; found 1"):
        bert.attention_columns(TEXTS, (1, 1, 1))
    with pytest.raises(TextError, match="Text 0 has 65 tokens; 'bert' reads at most 64"):
        bert.attention_columns(["w3 " * 65], (0,))
    for texts, at in (((), ()), (TEXTS, (0,)), (TEXTS, (0, -1, 0))):
        with pytest.raises(InputError, match="Attention columns need texts, and a position from 0 for each"):
            Columns(texts, at)
    assert hash(Columns(TEXTS, AT)) == hash(Columns(TEXTS, AT, why="other", total=9))

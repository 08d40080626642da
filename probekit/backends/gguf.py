"""GGUF files: de-quantised to a folder of float32 safetensors and tokenizer files, by transformers."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from probekit.core import ModelError

_MAGIC = b"GGUF"
# What transformers and gguf raise on files that they cannot read; they have no error class for it.
_UNREADABLE = (
    ValueError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    struct.error,
)


def convert_gguf(gguf: Path, out: Path) -> None:
    """Write the model in `gguf` to the folder `out`, in the form in which models usually come.

    Loading `out` gives the token ids and logits that transformers gives for the GGUF file itself.

    Raises:
        ModelError: the file is no GGUF file, is damaged, or is of an architecture that transformers
            does not read from GGUF.
    """
    _check_magic(gguf)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **where)
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **where)
    except _UNREADABLE as error:
        raise ModelError(
            f"{gguf} cannot be read as a language model ({type(error).__name__}: {error}). It is damaged, or of an "
            "architecture that transformers does not read from GGUF. Download it again, or use the model's "
            "original safetensors files."
        ) from error
    _forget_quantisation(model)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _check_magic(gguf: Path) -> None:
    try:
        with gguf.open("rb") as file:
            found = file.read(len(_MAGIC))
    except OSError as error:
        raise ModelError(f"{gguf} cannot be read: {error}") from error
    if found != _MAGIC:
        raise ModelError(
            f"{gguf} is no GGUF file: it starts with {found!r}, expected {_MAGIC!r}. "
            "Download it again; a web page or a Git LFS pointer may have been saved in its place."
        )


def _forget_quantisation(model: Any) -> None:
    # The weights are plain float32 by now; the marks would make save_pretrained refuse.
    model.hf_quantizer = None
    for mark in ("is_quantized", "_is_quantized"):
        setattr(model, mark, False)
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")

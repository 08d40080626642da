"""What a tokenizer does with each of its ids, and the rows of embedding and unembedding, off the files where possible."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from probekit.core import VocabularyTable, VocabularyWeights

from .tokens import _piece, token_strings
from .weights import unembedding

if TYPE_CHECKING:
    from .model import TransformersModel

_MARKS = ("«", "»")  # put in front, so that no space is added to a word at the start of a text
_PREFIXES = ("", "model.", "transformer.", "gpt_neox.")


def vocabulary_table(tokenizer: Any, d_vocab: int) -> VocabularyTable:
    """Every id, decoded alone and encoded again.

    A tokenizer that puts a space in front of a text is given a mark to put it in front of, which is taken away again
    (arXiv 2405.05417, released code).

    Args:
        tokenizer: a transformers tokenizer.
        d_vocab: ids of the model; some may have no token.
    """
    ids = list(range(d_vocab))
    pieces = tuple(_piece(tokenizer, i) or "" for i in ids)
    mark = _mark(tokenizer)
    decoded = tuple(_decoded(tokenizer, i, mark) if pieces[i] else "" for i in ids)
    known = [i for i in ids if decoded[i]]
    encoded: list[tuple[int, ...]] = [()] * d_vocab
    for i, some in zip(known, _encoded(tokenizer, [decoded[i] for i in known], mark), strict=True):
        encoded[i] = some
    special = np.zeros(d_vocab, dtype=bool)
    special[[i for i in tokenizer.all_special_ids if i < d_vocab]] = True
    return VocabularyTable(pieces, token_strings(tokenizer, ids), decoded, tuple(encoded), special)


def ids_of(tokenizer: Any, texts: Sequence[str], *, special: bool = False) -> tuple[tuple[int, ...], ...]:
    """Token ids of texts, with the special tokens that the tokenizer adds by itself if wanted."""
    found = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"] if texts else []
    return tuple(tuple(map(int, ids)) for ids in found)


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return list(tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]) if texts else []


def _mark(tokenizer: Any) -> str:
    """What stands in front of a text, so that its first word is spelt as in the middle of one; "" if nothing need be."""
    first = _ids(tokenizer, ["test"])[0][0]
    if not str(_piece(tokenizer, first)).startswith(("▁", "Ġ", " ")):
        return ""
    return next((m for m in _MARKS if len(_ids(tokenizer, [m])[0]) <= 2), _MARKS[0])


def _decoded(tokenizer: Any, token: int, mark: str) -> str:
    front = _ids(tokenizer, [mark])[0] if mark else []
    text = tokenizer.decode([*front, token], clean_up_tokenization_spaces=False)
    whole = tokenizer.decode(front, clean_up_tokenization_spaces=False) if mark else ""
    return str(text)[len(whole) :]


def _encoded(tokenizer: Any, texts: Sequence[str], mark: str) -> list[tuple[int, ...]]:
    n = len(_ids(tokenizer, [mark])[0]) if mark else 0
    return [tuple(one[n:]) for one in _ids(tokenizer, [mark + t for t in texts])]


def vocabulary_weights(model: TransformersModel) -> VocabularyWeights:
    """Embedding and unembedding; read off safetensors files while the model is not loaded, if they are there."""
    found = _from_files(model) if model.folder is not None and not model.loaded else None
    if found is not None:
        return found
    module = model.module
    weight, bias = unembedding(module.get_output_embeddings())
    rows = module.get_input_embeddings().weight
    tied = weight.data_ptr() == rows.data_ptr()
    out = _float(weight)
    return VocabularyWeights(out if tied else _float(rows), out, None if bias is None else _float(bias), tied)


def _float(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _from_files(model: TransformersModel) -> VocabularyWeights | None:
    """None where the files are of another kind, quantised, or name the matrices otherwise."""
    assert model.folder is not None
    skeleton: Any = model.skeleton()
    names: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    rows, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    if rows is None or head is None or getattr(model._whole_config, "quantization_config", None) is not None:
        return None
    tied = bool(skeleton.config.get_text_config().tie_word_embeddings)
    try:
        embedding = _read(model.folder, names[id(rows.weight)])
        out = embedding if tied else _read(model.folder, names[id(head.weight)])
        bias = None if getattr(head, "bias", None) is None else _read(model.folder, names[id(head.bias)])
    except (OSError, KeyError, SafetensorError, ValueError):
        return None
    return VocabularyWeights(embedding, out, bias, tied)


def _read(folder: Path, names: Sequence[str]) -> np.ndarray:
    """A matrix under any of its names, with or without the prefix of the model inside."""
    index = folder / "model.safetensors.index.json"
    where: dict[str, str] = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
    for name in names:
        bare = name
        for prefix in _PREFIXES[1:]:
            bare = bare.removeprefix(prefix)
        for spelling in (name, *(f"{prefix}{bare}" for prefix in _PREFIXES)):
            with safe_open(folder / where.get(spelling, "model.safetensors"), "pt") as content:
                if spelling in content.keys():  # noqa: SIM118 - not a mapping
                    return _float(content.get_tensor(spelling))
    raise KeyError(names)

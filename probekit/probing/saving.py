"""Fitted estimators on disk: arrays and JSON in one .npz file, without pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

import numpy as np

from probekit._version import __version__
from probekit.core import InputError, StoreError

FORMAT, VERSION = "probekit estimator", 1
_ABOUT = "about"


class Saved:
    """`save` and `load` for an estimator whose parameters are plain values and whose fitted attributes are arrays."""

    def save(self, path: str | Path) -> Path:
        """Write parameters and fitted attributes to a .npz file; nothing in it is executed when it is loaded.

        Raises:
            InputError: it is not fitted, or classes are neither numbers nor strings.
            StoreError: the file cannot be written.
        """
        path = Path(path)
        fitted = {k: v for k, v in vars(self).items() if k.endswith("_") and not k.startswith("_")}
        if not fitted:
            raise InputError(f"This {type(self).__name__} is not fitted. Call fit first.")
        arrays = {name: _plain(name, value) for name, value in fitted.items()}
        params = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in self.get_params(deep=False).items()}  # type: ignore[attr-defined]
        about = {"format": FORMAT, "version": VERSION, "probekit": __version__, "estimator": type(self).__name__}
        try:
            words = json.dumps(about | {"params": params})
        except TypeError as error:
            raise InputError(f"A parameter of this {type(self).__name__} is no plain value: {error}.") from error
        try:
            with path.open("wb") as file:
                np.savez(file, allow_pickle=False, **{_ABOUT: np.frombuffer(words.encode(), np.uint8)}, **arrays)
        except OSError as error:
            raise StoreError(f"Cannot write {path}: {error.strerror or error}.") from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The estimator that `save` wrote.

        Raises:
            StoreError: it is no such file, of another estimator, of a newer version, or damaged.
        """
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as stored:
                about = json.loads(stored[_ABOUT].tobytes().decode())
                arrays = {name: stored[name] for name in stored.files if name != _ABOUT}
        except (OSError, ValueError, KeyError, EOFError, AttributeError, BadZipFile) as error:
            raise StoreError(f"{path} holds no estimator of probekit's ({type(error).__name__}: {error}).") from error
        if about.get("format") != FORMAT or about.get("estimator") != cls.__name__:
            found = about.get("estimator") or about.get("format")
            raise StoreError(f"{path} holds {found!r}; expected {cls.__name__!r}. Load it with its own class.")
        if about["version"] > VERSION:
            raise StoreError(f"{path} was written by a newer probekit; upgrade to read it.")
        found = cls(**about["params"])
        for name, value in arrays.items():
            setattr(found, name, value.item() if value.ndim == 0 else value)
        return found


def _plain(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype == object and all(isinstance(v, str) for v in array.ravel()):
        array = array.astype(str)
    if array.dtype == object:
        raise InputError(f"{name} holds {array.ravel()[:3].tolist()}; only numbers and strings are saved.")
    return array

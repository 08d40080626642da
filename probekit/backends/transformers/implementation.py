"""Which attention function a model asks for, changed for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def attention_by(module: nn.Module, name: str) -> Iterator[str]:
    """Let a model ask for another attention function; afterwards every configuration says what it said.

    Args:
        module: the model.
        name: of the function, among those that transformers knows.

    Yields:
        The name that the model used before.
    """
    configs: dict[int, Any] = {id(m.config): m.config for m in module.modules() if hasattr(m, "config")}
    before = {key: getattr(c, "_attn_implementation_internal", None) for key, c in configs.items()}
    try:
        for key, config in configs.items():
            if before[key] is not None:
                config._attn_implementation_internal = name
        yield next((own for own in before.values() if own), "sdpa")
    finally:
        for key, config in configs.items():
            if before[key] is not None:
                config._attn_implementation_internal = before[key]

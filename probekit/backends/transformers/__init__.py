"""The native backend: a transformers decoder, left as it is, watched through hooks."""

from .model import TransformersModel

__all__ = ["TransformersModel"]

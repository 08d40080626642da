"""The backend on TransformerLens bridges: `TransformerLensModel`."""

from .bridge import build_bridge as build_bridge
from .model import TransformerLensModel as TransformerLensModel

__all__ = ["TransformerLensModel", "build_bridge"]

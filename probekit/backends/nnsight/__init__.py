"""Models wrapped by nnsight; nnsight is imported with this package, and only then."""

from .model import NnsightModel, nnsight_twin

__all__ = ["NnsightModel", "nnsight_twin"]

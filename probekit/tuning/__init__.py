"""Models made from a model: a pair tuned on its own right and wrong answers (LoRA, through peft)."""

from .pair import Pair, TuneParams, tune_pair

__all__ = ["Pair", "TuneParams", "tune_pair"]

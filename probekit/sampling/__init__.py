"""What continuations say, and how many of them are enough."""

from .outcomes import Choice, Contains, LastNumber, Pattern, Rule
from .params import WritingParams
from .rounds import Draws, base_answers, half_width, sampled_until

__all__ = [
    "Choice",
    "Contains",
    "Draws",
    "LastNumber",
    "Pattern",
    "Rule",
    "WritingParams",
    "base_answers",
    "half_width",
    "sampled_until",
]

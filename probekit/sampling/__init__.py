"""What continuations say, how many of them are enough, and what they say of the places where a text may fork."""

from .change_points import STRONG, Changes, find_changes
from .forks import OTHER, Alternative, Distance, ForkMap, Position, distance
from .outcomes import Choice, Contains, LastNumber, Pattern, Rule
from .params import WritingParams
from .released import ReleasedForks, read_released
from .rounds import Draws, base_answers, half_width, sampled_until

__all__ = [
    "OTHER",
    "STRONG",
    "Alternative",
    "Changes",
    "Choice",
    "Contains",
    "Distance",
    "Draws",
    "ForkMap",
    "LastNumber",
    "Pattern",
    "Position",
    "ReleasedForks",
    "Rule",
    "WritingParams",
    "base_answers",
    "distance",
    "find_changes",
    "half_width",
    "read_released",
    "sampled_until",
]

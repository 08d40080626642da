"""Small models that are made here, for tasks whose answer is known.

    import probekit as pk

    model = pk.toys.open_bigram_backcopy("3-layer")   # shipped; a sink, a drain and a peak, all on <s>
    task = pk.toys.BigramBackcopy()
    pk.run("attention-sinks", model, task.batch(task.sample(16, 64, seed=0)))

    trained = pk.toys.train(pk.toys.SMALL, "1-layer", seed=1)   # a minute on one core
    trained.measured[-1].appears

The task and its models are those of arXiv 2410.13835, section 2. `BigramBackcopy` needs no torch; training does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bigram_backcopy import BigramBackcopy as BigramBackcopy
    from .bigram_backcopy import Losses as Losses
    from .bigram_backcopy import losses as losses
    from .measures import CRITERIA as CRITERIA
    from .measures import ExtremeTokens as ExtremeTokens
    from .measures import appears as appears
    from .measures import extreme_tokens as extreme_tokens
    from .measures import measured_sequences as measured_sequences
    from .presets import PAPER as PAPER
    from .presets import PHENOMENA as PHENOMENA
    from .presets import PRESETS as PRESETS
    from .presets import SMALL as SMALL
    from .presets import Preset as Preset
    from .presets import Setting as Setting
    from .shipped import open_bigram_backcopy as open_bigram_backcopy
    from .shipped import shipped_toys as shipped_toys
    from .training import Trained as Trained
    from .training import train as train

_WHERE = {
    "BigramBackcopy": "bigram_backcopy",
    "CRITERIA": "measures",
    "ExtremeTokens": "measures",
    "Losses": "bigram_backcopy",
    "PAPER": "presets",
    "PHENOMENA": "presets",
    "PRESETS": "presets",
    "Preset": "presets",
    "SMALL": "presets",
    "Setting": "presets",
    "Trained": "training",
    "appears": "measures",
    "extreme_tokens": "measures",
    "losses": "bigram_backcopy",
    "measured_sequences": "measures",
    "open_bigram_backcopy": "shipped",
    "shipped_toys": "shipped",
    "train": "training",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

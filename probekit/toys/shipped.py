"""The trained Bigram-Backcopy models that come with the package."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any

from probekit.core import Model, unknown

from .bigram_backcopy import BigramBackcopy
from .presets import SMALL, Preset, Setting

UNTRAINED = "untrained"


def shipped_toys() -> dict[str, str]:
    """What `open_bigram_backcopy` opens, and what each is, by name."""
    about = {s.name: f"{s.title}, {s.steps:,} updates" for s in SMALL.settings}
    return about | {UNTRAINED: "3 layers, softmax, as initialised: none of the phenomena"}


def open_bigram_backcopy(name: str = "3-layer") -> Model:
    """A Bigram-Backcopy model of the preset `small`, whose phenomena are known (arXiv 2410.13835).

    "1-layer" and "3-layer-sgd" have an attention sink and a value drain, "3-layer" a residual peak as well,
    "1-layer-relu" neither sink nor drain, "untrained" nothing. The weights are those of seed 0 after the preset's
    steps, rounded to float16 and widened to float32. A text is any string of the characters of tiny-shakespeare;
    `BigramBackcopy().batch(...)` makes one from sequences of the task.

    Args:
        name: one of `shipped_toys()`.

    Raises:
        UnknownName: there is no such toy.

    Example:
        >>> model = open_bigram_backcopy("3-layer")  # doctest: +SKIP
        >>> task = BigramBackcopy()  # doctest: +SKIP
        >>> run("attention-sinks", model, task.batch(task.sample(16, 64, seed=0)))  # doctest: +SKIP
    """
    from probekit.backends.transformers.toy import load_weights, open_toy

    if name not in shipped_toys():
        raise unknown("toy", name, shipped_toys())
    task, untrained = BigramBackcopy(), name == UNTRAINED
    module = untrained_module(SMALL, SMALL.setting("3-layer" if untrained else name), seed=0)
    if not untrained:
        with as_file(files("probekit.toys") / "weights" / f"{name}.safetensors") as file:
            load_weights(module, file)
    return open_toy(module, task.vocabulary, f"bigram-backcopy-{name}")


def untrained_module(preset: Preset, setting: Setting, seed: int) -> Any:
    """The transformers module of a setting as it is before training."""
    from probekit.backends.transformers.toy import ToyShape, build_toy

    d_vocab = len(BigramBackcopy().vocabulary)
    return build_toy(ToyShape(setting.n_layers, preset.d_model, preset.context, d_vocab, setting.relu), seed)

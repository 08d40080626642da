"""One line to the person who waits. Progress bars are tqdm's."""

from __future__ import annotations

import sys

from tqdm import tqdm


def say(message: str) -> None:
    """Write one line to stderr, without tearing a progress bar that is on the screen."""
    tqdm.write(message, file=sys.stderr)


def size_text(n_bytes: int) -> str:
    """A size for people, in decimal units: `93 MB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.3g} {unit}"
    return f"{n_bytes} B"

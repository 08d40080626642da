"""Extreme tokens over depth: sinks, massive entries, drained values and norm peaks of any models, one report each.

    python analyses/extreme_tokens_over_depth.py
    python analyses/extreme_tokens_over_depth.py smollm2-135m-instruct path/to/model --texts texts.jsonl --intervene

Models are anything that `probekit run` takes. With `--intervene`, massive entries and attention heads are removed
too: many passes over the texts instead of one.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from corpora import python_texts

import probekit as pk
from probekit.texts import read_texts

LOOK = ("attention-sinks", "massive-activations", "secondary-sinks", "value-drain", "residual-peaks")
INTERVENE = ("sink-anatomy", "dormant-heads")
PARAMS: dict[str, Any] = {"sink-anatomy": {"ratio": 300.0}}  # the earlier, smaller phase of some models as well


def study(name: str, texts: Any, out: Path, options: argparse.Namespace) -> Path:
    """Run everything on one model and write its report."""
    names = [*LOOK, *(INTERVENE if options.intervene else ())]
    params = {name: PARAMS[name] for name in names if name in PARAMS}
    results = pk.run(names, pk.open_model(name), texts, bos=options.bos, window=options.window, **params)
    return pk.report(results, out / re.sub(r"[^\w.-]+", "-", name).strip("-."))


def main() -> None:
    """Read the command line, run the models in turn, say where the reports are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["smollm2-135m-instruct"], help="names, hub ids or folders")
    parser.add_argument("--texts", type=Path, help=".txt or .jsonl; texts of the Python installation if not given")
    parser.add_argument("--n-texts", type=int, default=8, help="texts of each domain, without --texts")
    parser.add_argument("--window", type=int, help="cut texts into windows of so many tokens")
    parser.add_argument("--bos", choices=("model", "always", "never"), default="model")
    parser.add_argument("--intervene", action="store_true", help="also remove massive entries and heads")
    parser.add_argument("--out", type=Path, default=Path("reports/extreme-tokens-over-depth"))
    options = parser.parse_args()
    texts = python_texts(options.n_texts) if options.texts is None else read_texts(options.texts)
    for name in options.models:
        print(f"{name}: {study(name, texts, options.out, options)}", flush=True)


if __name__ == "__main__":
    main()

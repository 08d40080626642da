"""Lenses beside one another on held-out text: how near each block's reading is to the final distribution.

python analyses/lens_comparison.py --plan                      # what would be trained and read
python analyses/lens_comparison.py                             # trains on texts that Python carries, reads others of them
python analyses/lens_comparison.py --model gpt2 --lens tuned-lens:gpt2 --lens path/to/jacobian.pt --texts held_out.jsonl

Without `--lens`, a tuned lens is trained on `--train` (or loaded, if `--out` holds it already). Texts that are read must
not be among those that a lens was trained on.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from corpora import python_texts
from lens_comparison_tables import row_of, table_of

import probekit as pk
from probekit.texts import read_texts

HELD_OUT = 10  # texts of prose and of code, in the default corpus, that are read and not trained on


def corpus(options: argparse.Namespace) -> tuple[Any, list[str]]:
    """Texts to train on, and texts to read."""
    carried = python_texts(10_000, n_chars=3_000)
    whole = {domain: some[HELD_OUT:] for domain, some in carried.items() if domain != "licence"}
    train: Any = read_texts(options.train) if options.train else _flat({**carried, **whole})
    read = [text for domain in whole for text in carried[domain][:HELD_OUT]]
    return train, _flat(read_texts(options.texts)) if options.texts else read


def _flat(texts: Any) -> list[str]:
    listed = [t for some in texts.values() for t in some] if isinstance(texts, dict) else texts
    return [t["text"] if isinstance(t, dict) else t for t in listed]  # lines with answers are records


def openings(model: Any, texts: list[str], n: int) -> Any:
    """The first `n` tokens of each text; shorter ones as they are, from 16 tokens on."""
    batch = model.tokenize(texts)
    cut = tuple(replace(t, ids=t.ids[:n], strings=t.strings[:n]) for t in batch if len(t) >= 16)
    return replace(batch, texts=cut, index=())


def trained(model: Any, train: Any, options: argparse.Namespace) -> str:
    """The folder of a tuned lens: that of an earlier call, or a new one."""
    folder = options.out / "lens"
    if not (folder / "lens.json").is_file():
        pk.train_lens(model, train, folder, steps=options.steps, fit_tokens=options.fit_tokens)
    return str(folder)


def main() -> None:
    """Train or load, read with every lens, compare, write one report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="what open_model takes")
    parser.add_argument("--lens", action="append", help="folder, .pt file or hub id of a lens; repeat for several")
    parser.add_argument("--train", type=Path, help=".txt or .jsonl to train on; texts that Python carries if left out")
    parser.add_argument("--texts", type=Path, help=".txt or .jsonl to read; others that Python carries if left out")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each text that are read")
    parser.add_argument("--steps", type=int, default=32, help="updates of the training")
    parser.add_argument("--fit-tokens", type=int, default=24_000, help="tokens of the least squares before it")
    parser.add_argument("--transfer", action="store_true", help="read with lenses of another model of the same sizes")
    parser.add_argument("--plan", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--out", type=Path, default=Path("reports/lens-comparison"))
    options = parser.parse_args()
    model = pk.open_model(options.model, lazy=True)
    train, texts = corpus(options)
    batch = openings(model, texts, options.tokens)
    if options.plan:
        lens = ", ".join(
            options.lens or [f"a tuned lens, trained for {options.steps} updates into {options.out / 'lens'}"]
        )
        print(f"lenses    the logit lens; {lens}", *pk.plan("logit-lens", model, batch), sep="\n")
        return
    lenses = ["", *(options.lens or [trained(model, train, options)])]
    results = [
        pk.run("logit-lens", model, batch, lens=lens, lens_transfer=bool(lens) and options.transfer) for lens in lenses
    ]
    study = pk.result_of("lens-comparison", table_of([row_of(r) for r in results]), results[-1].provenance)
    print(*(f.claim for f in study.findings), sep="\n")
    print("Report:", pk.report([study, results[-1]], options.out))


if __name__ == "__main__":
    main()

"""Zero and the mean in the place of massive activations, at several blocks, beside what was published.

python analyses/massive_activation_intervention.py                               # texts that Python carries
python analyses/massive_activation_intervention.py --model gpt2 --texts wiki.jsonl --window 1024 --blocks 2,9
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from corpora import python_texts
from massive_activation_tables import CASES, Row, published, table

import probekit as pk
from probekit.texts import read_texts

NAME = "massive-activations"


def held(result: pk.Result, ratio: float) -> np.ndarray:
    """After which blocks half of the texts hold an entry above this multiple of the median; axis layer."""
    largest, text = np.abs(result["value"].values[..., 0]), result["text"].values
    hit = (largest > result.params.as_dict()["min_magnitude"]) & (result["times_median"].values > ratio)
    return np.mean([hit[:, text == t].any(axis=1) for t in np.unique(text)], axis=0) >= 0.5


def phases(*kinds: np.ndarray) -> list[int]:
    """The first block of every run of blocks that hold massive entries, of each kind."""
    return sorted({int(i) for kind in kinds for i in np.flatnonzero(np.diff(kind.astype(int), prepend=0) == 1)})


def row_of(result: pk.Result, block: int) -> Row:
    """One block's row: perplexities, and the findings on the intervention."""
    perplexity = {case: float(result["perplexity"].sel(case=case)) for case in result["case"].values}
    findings = [f.as_dict() for f in result.findings if f.where.get("block") == block]
    model = result.provenance["model"]["name"]
    return f"{model}, block {block}", tuple(perplexity.get(c, np.nan) for c in CASES), findings


def main() -> None:
    """Find the blocks, intervene at each, write one report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="what open_model takes")
    parser.add_argument(
        "--texts", type=Path, help=".txt or .jsonl; the licence and prose that Python carries if left out"
    )
    parser.add_argument("--window", type=int, default=64, help="tokens of each text")
    parser.add_argument("--blocks", help="such as 2,11; where phases begin if left out")
    parser.add_argument("--ratio", type=float, default=1000.0, help="strict multiple of the median")
    parser.add_argument("--loose-ratio", type=float, default=500.0, help="looser multiple of the median")
    parser.add_argument("--out", type=Path, default=Path("reports/massive-activation-intervention"))
    options = parser.parse_args()
    carried = {domain: some for domain, some in python_texts(6).items() if domain != "code"}
    texts: Any = read_texts(options.texts) if options.texts else carried
    model = pk.open_model(options.model)
    how = {"window": options.window, "loose_ratio": options.loose_ratio}
    seen = pk.run(NAME, model, texts, ratio=options.ratio, **how)
    strict, loose = held(seen, options.ratio), held(seen, options.loose_ratio)
    rows = []
    for block in [int(b) for b in options.blocks.split(",")] if options.blocks else phases(strict, loose):
        ratio = options.ratio if strict[block] else options.loose_ratio
        result = pk.run(NAME, model, texts, intervene=True, at_block=block, ratio=ratio, **how)
        rows.append(row_of(result, block))
        print(rows[-1][0], *(f["claim"] for f in rows[-1][2]), sep="\n  ", flush=True)
    study = pk.result_of("massive-activation-intervention", table([*rows, *published()]), seen.provenance)
    print("Report:", pk.report([study, seen], options.out))


if __name__ == "__main__":
    main()

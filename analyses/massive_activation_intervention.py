"""Zero and the mean in the place of massive activations, at several blocks, beside what was published.

python analyses/massive_activation_intervention.py --plan
python analyses/massive_activation_intervention.py                               # texts that Python carries
python analyses/massive_activation_intervention.py --models gpt2 --corpus wiki=wiki.jsonl --window 1024 --blocks 2,9
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
from corpora import python_texts
from massive_activation_tables import CASES, Row, published, table
from study_command import arguments, conduct, write

import probekit as pk
from probekit.studies import StudyRun

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


def looked(options: argparse.Namespace) -> pk.Study:
    """The phenomenon as it is, in every model: where entries are massive."""
    carried = {domain: some for domain, some in python_texts(6).items() if domain != "code"}
    return pk.Study(
        name="Massive activations, taken away",
        analyses=[NAME],
        models=options.models,
        corpora={"texts": dict(options.corpus) if options.corpus else carried},
        params={"ratio": options.ratio, "loose_ratio": options.loose_ratio},
        how={"window": options.window},
    )


def taken_away(options: argparse.Namespace, model: str, seen: pk.Result) -> list[StudyRun]:
    """The intervention at every block, strict where half of the texts hold a strictly massive entry, loose elsewhere."""
    strict, loose = held(seen, options.ratio), held(seen, options.loose_ratio)
    blocks = [int(b) for b in options.blocks.split(",")] if options.blocks else phases(strict, loose)
    if strange := [b for b in blocks if not 0 <= b < len(strict)]:
        raise SystemExit(f"--blocks names {strange}; {model} has blocks 0 to {len(strict) - 1}.")
    study, done = looked(options), []
    for ratio, some in ((options.ratio, strict), (options.loose_ratio, ~strict)):
        if at := [b for b in blocks if some[b]]:
            params = study.params | {"ratio": ratio, "intervene": True}
            done.append(replace(study, models=[model], params=params, vary={"at_block": at}).run(options.out))
    return done


def main() -> None:
    """Find the blocks, intervene at each, write one report."""
    parser = arguments(__doc__, "massive-activation-intervention")
    parser.add_argument("--window", type=int, default=64, help="tokens of each text")
    parser.add_argument("--blocks", help="such as 2,11; where phases begin if left out")
    parser.add_argument("--ratio", type=float, default=1000.0, help="strict multiple of the median")
    parser.add_argument("--loose-ratio", type=float, default=500.0, help="looser multiple of the median")
    options = parser.parse_args()
    seen = conduct(looked(options), options)
    rows = []
    for cell, results in seen.results.items():
        for run in taken_away(options, cell.model, results[NAME]):
            rows += [row_of(made[NAME], int(at.params["at_block"])) for at, made in run.results.items()]
    first = next(iter(seen.results.values()))[NAME]
    write(seen, pk.result_of("massive-activation-intervention", table([*rows, *published()]), first.provenance))


if __name__ == "__main__":
    main()

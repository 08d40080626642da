"""Drift, survival and forks recomputed from released draws: the files of forking-fast (arXiv 2608.19611).

python analyses/released_forks.py FOLDER          # a folder of row*.json.gz, or one file
"""

from __future__ import annotations

import argparse
from pathlib import Path

from released_forks_tables import table_of

import probekit as pk


def main() -> None:
    """Read the release and write one report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder of released files, or one of them")
    parser.add_argument("--out", type=Path, default=Path("reports/released-forks"))
    options = parser.parse_args()
    questions = pk.sampling.read_released(options.path)
    origin = {
        "draws": {"files": [q.name for q in questions], "per token": _draws(questions)},
        "texts": {"n_texts": len(questions), "n_tokens": sum(len(q.tokens) for q in questions)},
    }
    study = pk.result_of("released-forks", table_of(questions), origin)
    print(*(f.claim for f in study.findings), sep="\n")
    print("Report:", pk.report([study], options.out))


def _draws(questions: list[pk.sampling.ReleasedForks]) -> list[int]:
    """Smallest and largest number of draws per token."""
    n = [len(a.outcomes) for q in questions for p in q.forks.positions for a in p.alternatives]
    return [min(n), max(n)]


if __name__ == "__main__":
    main()

"""What the commands of studies have in common: models, corpora, `--plan`, `--out`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import probekit as pk
from probekit.studies import StudyRun
from probekit.texts import read_texts


def arguments(doc: str | None, out: str, *, corpora: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that every study has.

    Args:
        doc: the docstring of the study.
        out: the last part of the default folder.
        corpora: whether the study reads texts that a user may give.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m-instruct"], help="names, hub ids or folders")
    if corpora:
        parser.add_argument(
            "--corpus", action="append", type=corpus_of, help="NAME=FILE, .txt or .jsonl; repeat for more"
        )
    parser.add_argument("--out", type=Path, default=Path("reports") / out, help="where runs and report go")
    parser.add_argument("--plan", action="store_true", help="say what every run would cost, and stop")
    return parser


def corpus_of(option: str) -> tuple[str, list[str]]:
    """Name and texts of NAME=FILE."""
    name, _, path = option.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, found {option!r}")
    try:
        return name, plain_texts(read_texts(path))
    except pk.ProbekitError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def plain_texts(texts: Any) -> list[str]:
    """The texts of a file without domains and answers."""
    listed = [t for some in texts.values() for t in some] if isinstance(texts, dict) else texts
    return [t["text"] if isinstance(t, dict) else t for t in listed]


def conduct(study: pk.Study, options: argparse.Namespace) -> StudyRun:
    """Print the plan and stop, if that is asked for; otherwise run what is missing and say what could not run.

    Raises:
        SystemExit: after the plan, or if no run could be made.
    """
    if options.plan:
        print(study.plan(options.out))
        raise SystemExit(0)
    try:
        found = study.run(options.out)
    except pk.ProbekitError as error:
        raise SystemExit(f"{study.name}: {error}") from None
    for cell, error in found.failed.items():
        print(f"{cell.label}: not run. {error}")
    return found


def write(found: StudyRun, *tables: pk.Result) -> None:
    """Write the report, and print what the tables say, or, without any, what the runs have in common and do not."""
    told: Sequence[Any] = tables or ([found.comparison] if found.comparison is not None else [])
    for table in told:
        print(*(f.claim for f in table.findings), sep="\n")
    print("Report:", found.report(*tables))

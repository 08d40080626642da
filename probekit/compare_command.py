"""The command `probekit compare`: folders of runs side by side."""

from __future__ import annotations

from pathlib import Path

import click

from probekit.core import InputError


@click.command("compare")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the report.")
@click.option("--load", "files", multiple=True, type=click.Path(path_type=Path), help="Your analyses, a .py file.")
def compare_command(folders: tuple[Path, ...], out: Path | None, files: tuple[Path, ...]) -> None:
    r"""Lay runs side by side that `probekit run --out` wrote.

    Two runs are compared where they differ in one thing alone (model, texts, a parameter, chat template, dtype), as
    their manifests tell; for all others it is said why not.

    \b
    probekit run attention-sinks --model gpt2 --texts news.jsonl --out reports/gpt2
    probekit run attention-sinks --model EleutherAI/pythia-160m --texts news.jsonl --out reports/pythia
    probekit compare reports/gpt2 reports/pythia --out reports/side-by-side
    """
    from probekit.analysis import load_file
    from probekit.api import report
    from probekit.studies import compare

    for file in files:
        load_file(file)
    if len(folders) < 2:
        raise InputError(f"A comparison needs the folders of at least two runs; found {len(folders)}.")
    found = compare(folders)
    for finding in found.findings:
        click.echo(f"{finding.claim} [{finding.evidence}]")
    for remark in found.analysis.remarks(found):
        click.echo(f"note: {remark}")
    if out is not None:
        title = f"{len(folders)} runs side by side"
        click.echo(f"Report: {report(found, out, title=title, subtitle=', '.join(map(str, folders)))}")

"""The command `probekit figures`: the figures of a stored run as files for a paper."""

from __future__ import annotations

from pathlib import Path

import click

from probekit.analysis import load_results

FORMATS = ("svg", "pdf", "png", "html")


@click.command("figures")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("names", nargs=-1, metavar="[ANALYSIS]…")
@click.option("--format", "kind", type=click.Choice(FORMATS), default="svg", show_default=True, help="Of the files.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="Folder for them; FOLDER/figures if left out."
)
@click.option(
    "--width", type=click.FloatRange(min=60), default=None, help="Pixels, of which 96 are an inch; 720 if left out."
)
@click.option("--no-title", is_flag=True, help="Leave titles out, where the paper sets them.")
def figures_command(
    folder: Path, names: tuple[str, ...], kind: str, out: Path | None, width: float | None, no_title: bool
) -> None:
    r"""Write the figures of a stored run: vectors as .svg or .pdf, pixels as .png, live ones as .html.

    \b
    probekit figures reports/essay
    probekit figures reports/essay logit-lens --format pdf --width 320 --out paper/figures
    """
    results = load_results(folder)
    out = out or folder / "figures"
    for name in names or tuple(results):
        for path in results[name].figures().save(out / name, kind, width=width, title=not no_title):
            click.echo(str(path))

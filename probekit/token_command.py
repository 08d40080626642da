"""The command `probekit token`: what is known about one token."""

from __future__ import annotations

import json

import click

from probekit.cards import TokenCard, token_card
from probekit.models import default_model


@click.command("token")
@click.argument("tokens", nargs=-1, required=True, metavar="TOKEN…")
@click.option("--model", default=None, help="Name, hub id, folder or .gguf file; the embedded model if left out.")
@click.option("--as-text", is_flag=True, help="Read digits as a text; without it they are an id.")
@click.option("--neighbours", default=8, show_default=True, type=click.IntRange(min=0), help="Neighbours to name.")
@click.option("--verify", is_flag=True, help="Ask the model to write it, which loads its weights.")
@click.option(
    "--results", multiple=True, type=click.Path(), help="Folder of a stored run, whose numbers by token are shown."
)
@click.option("--json", "as_json", is_flag=True, help="Print plain data.")
def token_command(
    tokens: tuple[str, ...],
    model: str | None,
    as_text: bool,
    neighbours: int,
    verify: bool,
    results: tuple[str, ...],
    as_json: bool,
) -> None:
    r"""Show everything known about a token: an id, its exact text, or a text whose tokens are shown each.

    \b
    probekit token 36744 --verify
    probekit token " pvproperty" --results reports/undertrained
    """
    wanted = [int(t) if t.isdecimal() and not as_text else t for t in tokens]
    found = token_card(model or default_model(), wanted, n_neighbours=neighbours, verify=verify, results=results)
    cards = (found,) if isinstance(found, TokenCard) else found
    if as_json:
        click.echo(json.dumps([card.as_dict() for card in cards], indent=2))
    else:
        click.echo("\n\n".join(map(str, cards)))

"""The command `probekit train-lens`: a tuned lens from a text file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from probekit.core import InputError


class _TrainCommand(click.Command):
    """`train-lens` with a flag for every parameter of the training."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from probekit.lenses import LensTraining

        flags = []
        for spec in LensTraining.specs().values():
            notes = [spec.bounds, *spec.choices, f"default {spec.default}{f' {spec.unit}' if spec.unit else ''}"]
            text = f"{spec.help} ({', '.join(n for n in notes if n)})"
            flags.append(click.Option([f"--{spec.name.replace('_', '-')}", f"with__{spec.name}"], help=text))
        return [*super().get_params(ctx), *flags]


@click.command("train-lens", cls=_TrainCommand)
@click.argument("model")
@click.option(
    "--text", "text", required=True, type=click.Path(path_type=Path, exists=True), help="A .txt or .jsonl file."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the lens.")
@click.option("--dtype", help="Type of the model's weights, such as bfloat16; as stored if left out.")
@click.option(
    "--bos", type=click.Choice(["model", "always", "never"]), default="model", help="Beginning-of-text token."
)
def lens_command(model: str, text: Path, out: Path, dtype: str | None, bos: Any, **parameters: Any) -> None:
    r"""Train a tuned lens for MODEL; a call that broke off goes on where it was.

    \b
    probekit train-lens smollm2-135m-instruct --text corpus.txt --out lenses/smollm2
    probekit run logit-lens --lens lenses/smollm2 --text "The capital of France is" --out reports/france
    """
    from probekit.lenses import train_lens
    from probekit.models import open_model

    given = {k.removeprefix("with__"): v for k, v in parameters.items() if v is not None}
    opened = open_model(model, lazy=True, dtype=dtype)
    try:
        lens = train_lens(opened, text, out, bos=bos, **given)
    except KeyboardInterrupt:
        raise InputError(f"Stopped. The same command goes on where it was, at most a minute earlier: {out}.") from None
    found = lens.manifest["training"]["held_out"]
    click.echo(f"KL(final ‖ layer) in nats, mean over {found['n_tokens']:,} held-out tokens")
    click.echo("block   tuned lens   logit lens")
    for block, (tuned, logit) in enumerate(zip(found["kl_nats"]["tuned"], found["kl_nats"]["logit"], strict=True)):
        click.echo(f"{block:>5}{tuned:>13.3f}{logit:>13.3f}")
    click.echo(f"Lens: {out} ({lens.manifest['training']['seconds']:,.0f} s)")

"""`probekit run --stream`: a corpus of any size, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from probekit.analysis import strongest
from probekit.core import InputError
from probekit.terminal import about_tokens, beginning

STORE = "stream.zarr"
_OPTIONS = ("stream", "chunk", "keep", "skip_bad")


def stream_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a streamed run."""
    for option in (
        click.option("--skip-bad", is_flag=True, help="Streaming: leave out and count lines that cannot run."),
        click.option(
            "--keep",
            type=click.Choice(["tokens", "texts", "nothing"]),
            help="Streaming: rows kept beside the statistics: of every token, of every text (the default), or none.",
        ),
        click.option(
            "--chunk", type=int, help="Streaming: texts of a shard, after which all is safe; 256 if left out."
        ),
        click.option(
            "--stream",
            is_flag=True,
            help="Read one .jsonl file shard by shard, in memory that does not grow with it; the same command goes on "
            "after a kill, or when texts were added.",
        ),
    ):
        command = option(command)
    return command


def streamed(
    values: dict[str, Any], text: Sequence[str], texts: Sequence[Path], role: Sequence[str]
) -> dict[str, Any] | None:
    """What was said about streaming, taken out of the flags; None if the run is an ordinary one.

    Raises:
        InputError: flags that do not go together.
    """
    given = {name: values.pop(name) for name in _OPTIONS}
    if not given.pop("stream"):
        if any(given.values()):
            raise InputError("--chunk, --keep and --skip-bad go with --stream.")
        return None
    if text or len(texts) != 1 or role:
        raise InputError("--stream reads one .jsonl file: give --texts once, and neither --text nor --role.")
    return {"texts": texts[0], **{name: value for name, value in given.items() if value is not None}}


def stream_run(
    names: Sequence[str], model: tuple[str | None, Mapping[str, Any]], out: Path | None, how: dict[str, Any],
    params: dict[str, Any],
) -> None:  # fmt: skip
    """Stream a corpus and write a report, or say what that would take.

    Args:
        names: the analyses.
        model: its spelling, and how it is opened.
        out: the folder of the report; the corpus' store lies in it.
        how: the arguments of `stream`, and `only_plan`.
        params: parameters of the analyses.
    """
    from probekit.api import report
    from probekit.models import default_model, open_model
    from probekit.reporting import check_writable
    from probekit.streaming import plan_stream, stream

    spec, opening = model
    texts, only_plan, gib = how.pop("texts"), how.pop("only_plan"), how.pop("memory_gib")
    if gib is not None and not gib > 0:
        raise InputError(f"--memory-gib must be above 0, found {gib}.")
    if out is None and not only_plan:
        raise InputError("Say where the report goes with --out DIR, or ask for --plan.")
    if out is not None:
        check_writable(out)
    how["memory_limit"] = None if gib is None else int(gib * 2**30)
    opened = open_model(spec or default_model(), lazy=True, **opening)
    if only_plan:
        plan = plan_stream(names, opened, texts, None if out is None else out / STORE, **how, **params)
        click.echo("\n".join([*about_tokens(plan.first), str(plan)]))
        return
    assert out is not None
    try:
        results = stream(names, opened, texts, out / STORE, **how, **params)
    except KeyboardInterrupt:
        raise InputError(f"Stopped. What was committed is kept in {out / STORE}; the same command goes on.") from None
    written = report(results, out)
    about = next(iter(results.values())).provenance["texts"]
    click.echo(beginning(about.get("beginning_of_sequence", ""), about.get("chat_template", "")))
    left_out = ", ".join(f"{n:,} {why}" for why, n in about.get("left out", {}).items())
    shards = f"{about['shards']:,} shard{'s' * (about['shards'] != 1)}"
    click.echo(
        f"streamed  {about['n_texts']:,} texts, {about['n_tokens']:,} tokens, {shards}; left out: {left_out or 'none'}"
    )
    for finding in strongest(results.findings, 3):
        click.echo(f"• {finding.claim}\n  {finding.evidence}")
    click.echo(f"Report: {written}")

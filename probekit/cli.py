"""The command line: app, compare, demo, figures, list, models, run, token, train-lens, tune-pair."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from probekit import __version__
from probekit.analysis import Analysis, ParamSpec, analyses, get_analyses, load_file, strongest
from probekit.app_command import app_command
from probekit.compare_command import compare_command
from probekit.core import Chat, InputError, ProbekitError
from probekit.figures_command import figures_command
from probekit.lens_command import lens_command
from probekit.stream_command import stream_options, stream_run, streamed
from probekit.terminal import about_tokens, beginning
from probekit.token_command import token_command

DEMO_FOLDER = Path("reports/demo")
_PARTS = "similarities.jsonl"  # journal of analyses that embed
_OWN, _ALL = "own__", "all__"  # prefixes of click's names for the flags of one analysis and of all


class _Group(click.Group):
    """Turns probekit's errors into one clear message and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ProbekitError as error:
            raise _Refused(str(error)) from error


class _Refused(click.ClickException):
    exit_code = 2


class _RunCommand(click.Command):
    """`run` with a flag for every parameter of every analysis, also of the files given with --load."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        files = [value for flag, value in zip(args, args[1:], strict=False) if flag == "--load"]
        files += [a.split("=", 1)[1] for a in args if a.startswith("--load=")]
        try:
            for file in files:
                load_file(file)
        except ProbekitError as error:
            raise _Refused(str(error)) from error
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = super().get_params(ctx)
        taken = {flag for option in own for flag in option.opts}
        return [*own, *(flag for flag in parameter_flags(analyses()) if not taken & set(flag.opts))]


class _TuneCommand(click.Command):
    """`tune-pair` with a flag for every parameter of a pair."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from probekit.tuning import TuneParams

        return [*super().get_params(ctx), *(_flag(spec) for spec in TuneParams.specs().values())]


def _flag(spec: ParamSpec) -> click.Parameter:
    text = f"{spec.help} ({_fine_print(spec)})"
    return click.Option([f"--{spec.name.replace('_', '-')}", f"{_ALL}{spec.name}"], help=text)


def parameter_flags(known: dict[str, Analysis]) -> list[click.Parameter]:
    """One flag per parameter name; `--logit-lens.top-k` reaches one analysis only, `--top-k` all that have it.

    A parameter that is called like an option of `run` itself (`--window`) is reached by the longer flag only.
    """
    shared: dict[str, dict[str, ParamSpec]] = {}
    flags: list[click.Parameter] = []
    for name, analysis in known.items():
        for spec in analysis.Params.specs().values():
            shared.setdefault(spec.name, {})[name] = spec
            flag = f"--{name}.{spec.name.replace('_', '-')}"
            flags.append(click.Option([flag, f"{_OWN}{name.replace('-', '_')}__{spec.name}"], hidden=True))
    for parameter, owners in shared.items():
        text = "; ".join(f"{name}: {spec.help} ({_fine_print(spec)})" for name, spec in owners.items())
        flags.append(click.Option([f"--{parameter.replace('_', '-')}", f"{_ALL}{parameter}"], help=text))
    return flags


def _fine_print(spec: ParamSpec) -> str:
    unit = f" {spec.unit}" if spec.unit not in ("", "1") else ""
    return ", ".join(note for note in (spec.bounds, f"default {spec.default}{unit}") if note)


def gather(values: dict[str, Any]) -> dict[str, Any]:
    """Parameters as `probekit.run` takes them, from the flags that were given."""
    params: dict[str, Any] = {}
    for key, value in values.items():
        if value is None:
            continue
        if key.startswith(_OWN):
            name, _, parameter = key.removeprefix(_OWN).partition("__")
            params.setdefault(name, {})[parameter] = value
        else:
            params[key.removeprefix(_ALL)] = value
    return params


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="probekit")
def cli() -> None:
    """Look inside a language model, token by token.

    One instrumented forward pass captures, per layer and token, attention sinks, activations,
    uncertainty and the logit lens; analyses turn that into findings with units, nulls and intervals.
    """


@cli.command("list")
def list_command() -> None:
    """Show every analysis, the question it answers and its parameters."""
    for name, analysis in analyses().items():
        click.secho(name, bold=True)
        click.echo(f"  {analysis.summary()}")
        for spec in analysis.Params.specs().values():
            click.echo(f"    --{spec.name.replace('_', '-'):<18} {spec.help} ({_fine_print(spec)})")
        for preset, values in analysis.Params.presets.items():
            shown = ", ".join(f"{k.replace('_', '-')} {v}" for k, v in values.items())
            click.echo(f"    --preset {preset:<11} {shown}")


@cli.command("models")
def models_command() -> None:
    """Show the embedded models: licence, size, what they can do, whether they are cached."""
    from probekit.catalog import listing

    rows = [("NAME", "LICENCE", "SIZE", "CAN DO", "CACHED")]
    rows += [
        (f"{m.name}{' (default)' if m.default else ''}", m.licence, m.size, m.capabilities, "yes" if m.cached else "no")
        for m in listing()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    click.echo("Beside these: any Hugging Face hub id (owner/name), a local folder, or a .gguf file.")


@cli.command("run", cls=_RunCommand)
@click.argument("names", nargs=-1, metavar="NAME…")
@click.option("--model", default=None, help="Name, hub id, folder or .gguf file; the embedded model if left out.")
@click.option("--role", multiple=True, help="A further model for analyses that compare models: base=NAME.")
@click.option(
    "--preset", help="Values of parameters that go together, such as quick or published; see `probekit list`."
)
@click.option("--backend", help="Who runs a decoder: transformers (the default), transformer_lens or nnsight.")
@click.option("--dtype", help="Type of the weights, such as bfloat16; as stored if left out.")
@click.option("--device-map", help='Spread a decoder over devices: auto, balanced, …, or JSON such as {"": "cpu"}.')
@click.option("--text", "--prompt", "text", multiple=True, help="A text, or a prompt; repeat for several.")
@click.option(
    "--texts",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A .txt file (one text), .jsonl file, whose lines may name a domain and an answer, or .csv file of pairs.",
)
@click.option("--chat", is_flag=True, help="Make each text (or JSON list of messages) a turn in the chat template.")
@click.option("--system", help="System message of the chats; implies --chat.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for report.html and the numbers.")
@click.option("--plan", "only_plan", is_flag=True, help="Print exact tokens and cost, and stop.")
@click.option(
    "--bos", type=click.Choice(["model", "always", "never"]), default="model", help="Beginning-of-text token."
)
@click.option("--window", type=int, help="Cut texts into windows of so many tokens.")
@click.option("--memory-gib", type=float, help="Memory that may be used above the loaded model.")
@click.option("--load", multiple=True, type=click.Path(), help="A Python file of yours that registers analyses.")
@stream_options
def run_command(
    names: tuple[str, ...],
    model: str | None,
    role: tuple[str, ...],
    preset: str | None,
    backend: str | None,
    dtype: str | None,
    device_map: str | None,
    text: tuple[str, ...],
    texts: tuple[Path, ...],
    chat: bool,
    system: str | None,
    out: Path | None,
    only_plan: bool,
    bos: str,
    window: int | None,
    memory_gib: float | None,
    load: tuple[str, ...],  # imported before the flags are known, see _RunCommand
    **parameters: Any,
) -> None:
    r"""Run analyses (or: all) over texts and write a report.

    \b
    probekit run all --texts essay.txt --out reports/essay
    probekit run logit-lens --text "The capital of France is" --top-k 5 --out reports/france
    probekit run token-uncertainty logit-lens --stream --texts corpus.jsonl --out reports/corpus
    """
    how = {"backend": backend, "dtype": dtype, "device_map": _device_map(device_map)}
    turns = chat if system is None else system
    if preset is not None:
        parameters["preset"] = preset
    if stream := streamed(parameters, text, texts, role):
        limit = {"bos": bos, "chat": turns, "window": window, "memory_gib": memory_gib, "only_plan": only_plan}
        stream_run(names, (model, how), out, stream | limit, gather(parameters))
        return
    needed = any(a.reads_texts for a in get_analyses(names))
    found = _texts(text, texts, chats=turns is not False) if needed or text or texts else None
    _execute(names, model, found, out, only_plan, bos, window, memory_gib, gather(parameters), how, turns, _roles(role))


def _roles(given: Sequence[str]) -> dict[str, str]:
    found = dict(r.split("=", 1) for r in given if "=" in r)
    if len(found) < len(given) or not all(k and v for k, v in found.items()):
        raise InputError(f"--role names a model by its role, once each, as in --role base=NAME; found {list(given)}.")
    return found


def _device_map(given: str | None) -> Any:
    if given is None or not given.lstrip().startswith("{"):
        return given
    try:
        return json.loads(given)
    except json.JSONDecodeError as error:
        raise InputError(f"--device-map: not valid JSON ({error.msg} at column {error.colno}).") from None


def _texts(given: Sequence[str], files: Sequence[Path], *, chats: bool = False) -> list[Any] | dict[str, list[str]]:
    from probekit.texts import read_texts

    read = [read_texts(file, chats=chats) for file in files]
    plain = [*given, *(t for texts in read if isinstance(texts, list) for t in texts)]
    by_domain: dict[str, list[str]] = {}
    if any(isinstance(t, dict) for t in plain):  # lines with answers: everything becomes records
        return plain + [
            {"text": t, "domain": d} for texts in read if isinstance(texts, dict) for d, ts in texts.items() for t in ts
        ]
    for texts in read:
        for domain, some in texts.items() if isinstance(texts, dict) else ():
            by_domain.setdefault(domain, []).extend(some)
    if by_domain and plain:
        raise InputError(
            f"Some lines name a domain ({', '.join(by_domain)}) and others ({len(plain)}) have none. Give all of them one."
        )
    if not (by_domain or plain):
        raise InputError('No text was given. Use --text "…" or --texts FILE.txt|.jsonl.')
    return by_domain or plain


def _execute(
    names: Sequence[str],
    spec: str | None,
    texts: list[Any] | dict[str, list[str]] | None,
    out: Path | None,
    only_plan: bool,
    bos: Any,
    window: int | None,
    memory_gib: float | None,
    params: dict[str, Any],
    how: dict[str, Any] | None = None,
    chat: Chat = False,
    roles: dict[str, str] | None = None,
) -> None:
    """Check everything that can be checked, in the order of what it costs; then run and write."""
    from probekit import api
    from probekit.batches import make_batch
    from probekit.models import default_model, open_model
    from probekit.reporting import check_writable

    jobs = api.make_jobs(names, params)
    if memory_gib is not None and not memory_gib > 0:
        raise InputError(f"--memory-gib must be above 0, found {memory_gib}.")
    if out is None and not only_plan:
        raise InputError("Say where the report goes with --out DIR, or ask for --plan.")
    if out is not None:
        check_writable(out)
    listed = [t for some in texts.values() for t in some] if isinstance(texts, dict) else texts or []
    for i, text in enumerate(listed):
        if not (text["text"] if isinstance(text, dict) else text).strip():
            raise InputError(f"Text {i} is empty. Every text needs at least one visible character.")
    common: dict[str, Any] = {
        "bos": bos,
        "chat": chat,
        "window": window,
        "memory_limit": None if memory_gib is None else int(memory_gib * 2**30),
    }
    opened = open_model(spec or default_model(), lazy=True, **(how or {}))
    if only_plan:
        click.echo("\n".join(about_tokens(make_batch(opened, jobs, texts, bos, window, chat))))
        look = [f"{job.analysis.name} begins with vocabulary and weights, which need no pass" for job in jobs]
        click.echo("\n".join(map(str, api.plan(names, opened, texts, **common, **params) or look)))
        return
    assert out is not None
    journal = _journal_of(out, [job.analysis for job in jobs])
    try:
        results = api.run(list(names), opened, texts, journal=journal, models=roles, **common, **params)
    except KeyboardInterrupt:
        if journal is None or not journal.exists():
            raise
        raise InputError(f"Stopped. {_kept(journal)}") from None
    report = api.report(results, out)
    corpus = next(iter(results.values())).provenance["texts"]
    click.echo(beginning(corpus.get("beginning_of_sequence", ""), corpus.get("chat_template", "")))
    for finding in strongest(results.findings, 3):
        click.echo(f"• {finding.claim}\n  {finding.evidence}")
    click.echo(f"Report: {report}")


@cli.command("tune-pair", cls=_TuneCommand)
@click.option("--model", default=None, help="Name, hub id, folder or .gguf file; the embedded model if left out.")
@click.option(
    "--texts",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="A .jsonl file of questions, whose lines say in 'answer' what a right answer is.",
)
@click.option("--chat", is_flag=True, help="Make each question a turn in the chat template.")
@click.option("--system", help="System message of the chats; implies --chat.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the pair.")
@click.option("--dtype", help="Type of the weights, such as bfloat16; as stored if left out.")
@click.option("--memory-gib", type=float, help="Memory that may be used above the loaded model, for sampling.")
def tune_pair_command(
    model: str | None,
    texts: tuple[Path, ...],
    chat: bool,
    system: str | None,
    out: Path,
    dtype: str | None,
    memory_gib: float | None,
    **parameters: Any,
) -> None:
    r"""Tune a positive and a negative model on a model's own right and wrong answers.

    
    probekit tune-pair --texts questions.jsonl --chat --samples 16 --out pair
    probekit run contrastive-estimation --text "…" --chat --role positive=pair/positive --role negative=pair/negative --out reports/pair
    """
    from probekit.models import default_model, open_model
    from probekit.tuning import tune_pair
    from probekit.tuning.folder import JOURNAL, partial_of

    turns = chat if system is None else system
    found = _texts((), texts, chats=turns is not False)
    limit = None if memory_gib is None else int(memory_gib * 2**30)
    opened = open_model(model or default_model(), lazy=True, dtype=dtype)
    try:
        pair = tune_pair(opened, found, out, chat=turns, memory_limit=limit, **gather(parameters))
    except KeyboardInterrupt:
        raise InputError(f"Stopped. {_kept(partial_of(out.absolute()) / JOURNAL)}") from None
    sampled = pair.manifest["sampled"]
    click.echo(", ".join(f"{n:,} {what}" for what, n in sampled.items()))
    for side, path in pair.models.items():
        run = pair.manifest[side]
        losses = f"{run['loss_before_nats']:.3f} → {run['loss_after_nats']:.3f} nats per token"
        click.echo(f"{side:<9} {run['examples']:,} answers, {losses}: {path}")


def _journal_of(out: Path, chosen: Sequence[Analysis]) -> Path | None:
    if any(a.writes for a in chosen):
        return out / "continuations.jsonl"
    return out / _PARTS if any(not a.reads_texts for a in chosen) else None


def _kept(journal: Path) -> str:
    n = max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0
    what = "parts of the work" if journal.name == _PARTS else "continuations"
    return f"{n:,} {what} are kept in {journal}; the same command goes on from there."


@cli.command("demo")
@click.option("--out", type=click.Path(path_type=Path), default=DEMO_FOLDER, show_default=True, help="Report folder.")
def demo_command(out: Path) -> None:
    """Run every analysis on the embedded model over six short texts, and write a report."""
    from probekit.demo import demo_texts

    _execute(("all",), None, demo_texts(), out, False, "model", None, None, {})


for _own in (token_command, app_command, compare_command, figures_command, lens_command):
    cli.add_command(_own)


def main() -> None:
    """Entry point of the `probekit` command."""
    cli(prog_name="probekit")

"""Bigram-Backcopy transformers: which extreme-token phenomena appear in which setting, against the publication.

    python analyses/bigram_backcopy.py --preset small                     # 2 cores, under 30 minutes
    python analyses/bigram_backcopy.py --preset paper --device cuda       # the published sizes and steps
    python analyses/bigram_backcopy.py --preset small --save-models DIR   # and keep every model; open_model opens them
    python analyses/bigram_backcopy.py --preset small --weights probekit/toys/weights   # remake the shipped weights

Models are trained from scratch on the task of arXiv 2410.13835, section 2, and measured through probekit's captures.
Nothing is downloaded: the bigram table comes with the package.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from bigram_backcopy_tables import Run, study_table

import probekit as pk
from probekit.toys import PHENOMENA, PRESETS, BigramBackcopy, Preset, train


def one_run(preset: Preset, setting: str, seed: int, options: dict[str, Any]) -> Run:
    """Train and measure one model, in a process of its own; one thread, so that it can be repeated exactly."""
    torch.set_num_threads(options["threads"])
    begin = time.perf_counter()
    trained = train(preset, setting, seed, device=options["device"])
    seconds = time.perf_counter() - begin
    about = {"task": "bigram-backcopy", "preset": preset.name, "setting": setting, "seed": seed}
    if options["save_models"] is not None:
        from probekit.backends.transformers.toy import save_toy

        folder = options["save_models"] / f"{setting}-seed{seed}"
        save_toy(trained.model.module, BigramBackcopy().vocabulary, folder, about)  # type: ignore[attr-defined]
    if options["weights"] is not None and seed == 0:
        from probekit.backends.transformers.toy import save_weights

        save_weights(trained.model.module, options["weights"] / f"{setting}.safetensors", about)  # type: ignore[attr-defined]
    return Run(setting, seed, trained.steps, trained.measured, seconds)


def all_runs(preset: Preset, options: dict[str, Any]) -> Iterator[Run]:
    """Every setting with every seed; the longest first, some at a time."""
    jobs = [(s, seed) for s in preset.settings for seed in range(options["seeds"] or s.n_seeds)]
    jobs.sort(key=lambda job: -job[0].steps * job[0].n_layers)
    if options["processes"] == 1:
        for setting, seed in jobs:
            yield one_run(preset, setting.name, seed, options)
        return
    fresh = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(options["processes"], mp_context=fresh) as pool:
        running = [pool.submit(one_run, preset, setting.name, seed, options) for setting, seed in jobs]
        for done in as_completed(running):
            yield done.result()


def plan_of(preset: Preset, options: dict[str, Any]) -> str:
    """What would be trained: settings, seeds, updates and tokens."""
    lines = [f"preset {preset.name}, {options['processes']} at a time; a result is kept only when all have ended"]
    for s in preset.settings:
        seeds = options["seeds"] or s.n_seeds
        lines.append(f"  {s.name:<16} {s.n_layers} layers, {seeds} seed{'s' * (seeds != 1)}, {s.steps:,} updates each")
    return "\n".join(lines)


def said_of(run: Run) -> str:
    """One line on a finished run."""
    end = run.measured[-1]
    found = ", ".join(f"{p} {end.value(p):.3g}" for p in PHENOMENA)
    return f"{run.setting:14} seed {run.seed}: {found}; excess {end.losses.excess:.3f} nats; {run.seconds:.0f} s"


def main() -> None:
    """Train, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--seeds", type=int, help="runs of each setting; the preset's own numbers if left out")
    parser.add_argument("--steps", type=int, help="updates of every setting, to try the study out; the report says so")
    parser.add_argument("--processes", type=int, default=2, help="models trained at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save-models", type=Path, help="folder for the trained models")
    parser.add_argument("--weights", type=Path, help="folder for the weights of seed 0 in float16, as they are shipped")
    parser.add_argument("--out", type=Path, default=Path("reports/bigram-backcopy"))
    parser.add_argument("--plan", action="store_true", help="say what would be trained, and stop")
    options = vars(parser.parse_args())
    preset = PRESETS[options["preset"]]
    if options["steps"]:
        shorter = tuple(replace(s, steps=options["steps"]) for s in preset.settings)
        changes = (*preset.changes, f"For a trial, every setting stops after {options['steps']:,} updates.")
        preset = replace(preset, settings=shorter, changes=changes)
    if options["plan"]:
        print(plan_of(preset, options))
        return
    begin = time.perf_counter()
    runs = []
    for run in all_runs(preset, options):
        runs.append(run)
        print(said_of(run), flush=True)
    minutes = (time.perf_counter() - begin) / 60
    provenance = {
        "preset": asdict(preset),
        "seconds": {f"{r.setting}/{r.seed}": round(r.seconds) for r in runs},
        "minutes": round(minutes, 1),
        "processes": options["processes"],
        "threads": options["threads"],
        "device": options["device"],
        "torch": torch.__version__,
    }
    result = pk.result_of("bigram-backcopy", study_table(preset, runs), provenance)
    for finding in result.findings:
        print(finding.claim)
    print(f"{minutes:.1f} minutes. Report:", pk.report([result], options["out"]))


if __name__ == "__main__":
    main()

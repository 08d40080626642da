"""What the shared-prefix sampler costs: paired ratios against `generate`, what skipping and stopping save, memory.

    python analyses/branching_benchmark.py --out reports/branching-benchmark     # about half an hour on two cores

Every speed is a ratio of two things that ran in turn in one process; medians over pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from branching_tables import BranchingBenchmark
from capture_tables import Case, cost_table
from timing import paired, processor

import probekit as pk

PROMPT = "Explain step by step how a bicycle is repaired after a flat tyre, with a few numbers."
N_PREFIXES, N_SAMPLES, N_ANSWER, N_TOKENS = 20, 16, 200, 32
MIB = 2**20


class Bench:
    """The model and one greedy answer of 200 tokens."""

    def __init__(self, n_answer: int = N_ANSWER, n_prefixes: int = N_PREFIXES) -> None:
        self.model: Any = pk.open_model("smollm2-135m-instruct")
        self.hf = self.model.module
        self.ends = self.hf.generation_config.eos_token_id
        prompt = self.model.tokenize([PROMPT], "model", True).texts[0].ids
        with self._without_end():
            greedy = pk.Branch(
                (pk.Base(prompt, len(prompt)),), (pk.Fork(0, len(prompt)),), 1, 0, pk.Sampling(n_answer, 0.0)
            )
            answer = self._write(greedy)[0][0].ids
        self.base = pk.Base((*prompt, *answer), len(prompt))
        places = np.linspace(len(prompt), len(self.base.ids), n_prefixes, endpoint=False).astype(int)
        self.forks = tuple(pk.Fork(0, int(p)) for p in places)

    def _without_end(self) -> Any:
        bench = self

        class Without:
            def __enter__(self) -> None:
                bench.hf.generation_config.eos_token_id = bench.hf.config.eos_token_id = None

            def __exit__(self, *_: object) -> None:
                bench.hf.generation_config.eos_token_id = bench.hf.config.eos_token_id = bench.ends

        return Without()

    def _write(self, request: pk.Branch) -> Any:
        return pk.branch(self.model, request, progress=False).continuations

    def request(self) -> pk.Branch:
        """16 continuations of 32 tokens from every prefix."""
        return pk.Branch((self.base,), self.forks, N_SAMPLES, 0, pk.Sampling(N_TOKENS))

    def sampler(self) -> int:
        """Shared prefixes; the number of tokens written."""
        with self._without_end():
            return sum(len(c.ids) for some in self._write(self.request()) for c in some)

    def generate(self) -> int:
        """One call per prefix; the number of tokens written."""
        written = 0
        with self._without_end(), torch.no_grad():
            for fork in self.forks:
                ids = torch.tensor([self.base.ids[: fork.position]])
                out = self.hf.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    num_return_sequences=N_SAMPLES, max_new_tokens=N_TOKENS, pad_token_id=0,
                )  # fmt: skip
                written += N_SAMPLES * (out.shape[1] - ids.shape[1])
        return written

    def speed_case(self, n: int) -> Case:
        """The sampler against `generate`, the same number of tokens. Both are large enough to need no warm-up."""
        written: dict[str, int] = {}

        def counted(name: str, run: Callable[[], int]) -> Callable[[], None]:
            def once() -> None:
                written[name] = run()

            return once

        values, a, b = paired(counted("ours", self.sampler), counted("theirs", self.generate), n, warm=False)
        if written["ours"] != written["theirs"]:
            raise SystemExit(f"unequal numbers of tokens, so an unfair comparison: {written}")
        note = f"{a:.1f} s / {b:.1f} s for {written['ours']:,} tokens"
        what = f"{len(self.forks)} prefixes × {N_SAMPLES} × {N_TOKENS} tokens"
        return Case(what, "generate(num_return_sequences=16) per prefix", 0.27, values=values, note=note)

    def stop_case(self, n: int) -> Case:
        """Continuations that stop at the end of a sentence, against the same ones written to their end."""
        outcome = pk.sampling.Pattern(r"[.!?]")
        ids = self.base.ids
        bases = tuple(pk.Base(ids[: f.position], f.position) for f in self.forks)  # what stood before is no answer
        forks = tuple(pk.Fork(i, len(base.ids)) for i, base in enumerate(bases))
        tokens: dict[bool, int] = {}

        def write(early: bool) -> Callable[[], None]:
            def run() -> None:
                said = outcome if early else None
                with self._without_end():
                    found = self._write(pk.Branch(bases, forks, N_SAMPLES, 0, pk.Sampling(N_TOKENS), said))
                tokens[early] = sum(len(c.ids) for some in found for c in some)

            return run

        values, a, b = paired(write(True), write(False), n, warm=False)
        note = f"{a:.1f} s / {b:.1f} s; {tokens[True]:,} / {tokens[False]:,} tokens"
        return Case(
            "early stops, at a sentence's end", "the same continuations to their end", None, values=values, note=note
        )

    def skip_case(self, n: int) -> Case:
        """Only positions where a second token has at least 5 %, against all positions; 2 continuations of 16 tokens."""
        every = tuple(pk.Fork(0, p) for p in range(self.base.n_prompt, len(self.base.ids)))
        several = tuple(f for f in every if self._plausible(f) > 1)

        def write(forks: tuple[pk.Fork, ...]) -> Callable[[], None]:
            def run() -> None:
                sampling = pk.Sampling(16)
                with self._without_end():
                    self._write(pk.Branch((self.base,), forks, 2, 0, sampling))

            return run

        values, a, b = paired(write(several), write(every), n)
        note = f"{a:.1f} s / {b:.1f} s; {len(several)} of {len(every)} positions have a second token of 5 % or more"
        return Case("skipped positions", "every position", None, values=values, note=note)

    def _plausible(self, fork: pk.Fork) -> int:
        if not hasattr(self, "_probs"):
            with torch.no_grad():
                self._probs = torch.softmax(self.hf(torch.tensor([self.base.ids])).logits[0].float(), -1)
        return int((self._probs[fork.position - 1] > 0.05).sum())


def worker(limit_mib: int) -> None:
    """Peak memory of the sampler above the loaded model, and the largest plan that fits a limit, in a fresh process."""
    bench = Bench()
    bench._write(pk.Branch((bench.base,), bench.forks[:1], 1, 0, pk.Sampling(2)))
    process, peak, done = psutil.Process(), 0, threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    with bench._without_end():
        pk.branch(bench.model, bench.request(), memory_limit=limit_mib * MIB, progress=False)
    done.set()
    thread.join()
    print(json.dumps({"peak_mib": (peak - before) / MIB}))


def memory_case(limit_mib: int) -> Case:
    """Peak memory under a stated budget."""
    command = [sys.executable, __file__, "--worker", str(limit_mib)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    value = float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])
    what = f"peak memory under a budget of {limit_mib} MiB"
    return Case(what, "the loaded model", float(limit_mib), "MiB", [value])


def refusal(bench: Bench) -> str:
    """What a budget that is too small is told."""
    try:
        pk.branch(bench.model, bench.request(), memory_limit=4 * MIB, progress=False)
    except pk.ProbekitError as error:
        return str(error)
    raise SystemExit("a budget of 4 MiB was not refused")


def main() -> None:
    """Measure, and write a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="pairs of every comparison")
    parser.add_argument("--out", type=Path, default=Path("reports/branching-benchmark"))
    parser.add_argument("--worker", type=int, metavar="MIB", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.worker:
        worker(options.worker)
        return
    bench, cases = Bench(), []
    for make in (
        lambda: bench.speed_case(options.pairs),
        lambda: bench.stop_case(max(2, options.pairs // 2)),
        lambda: bench.skip_case(max(2, options.pairs // 2)),
        lambda: memory_case(256),
        lambda: memory_case(1024),
    ):
        cases.append(make())
        print(f"{cases[-1].what}: {cases[-1].median:.3f} {cases[-1].unit} ({cases[-1].note})", flush=True)
    provenance = {
        **bench.model.provenance(),
        "machine": {"processor": processor(), "cores": psutil.cpu_count(), "threads": 2},
        "refused at 4 MiB": refusal(bench),
    }
    result = pk.result_of(BranchingBenchmark.name, cost_table(cases), provenance)
    print(provenance["refused at 4 MiB"])
    print("Report:", pk.report([result], options.out))


if __name__ == "__main__":
    main()

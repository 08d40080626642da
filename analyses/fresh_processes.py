"""What only a fresh process can tell: the cost of an import, and peak memory above a loaded model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from capture_tables import Case

MIB = 2**20
SCRIPT = Path(__file__).with_name("capture_benchmark.py")


def import_case(n: int) -> Case:
    """Seconds that `import probekit` adds to starting Python, and that it brings no torch."""

    def start(code: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - begin

    lean = "import sys, probekit; assert 'torch' not in sys.modules"
    start(lean)
    values = [start(lean) - start("pass") for _ in range(n)]
    return Case("import probekit, without torch", "starting Python", 0.3, "s", values)


def peak_mib(kind: str, n_tokens: int) -> float:
    """Peak memory above the loaded model, in MiB, of one job in a fresh process."""
    command = [sys.executable, str(SCRIPT), "--worker", kind, str(n_tokens)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


def memory_cases(quick: bool, has_peer: bool) -> list[Case]:
    """Peak memory over the length of the text, and probekit's share of what the TransformerLens path takes."""
    kinds = {"attention": "probekit, attention + residual statistics", "all": "probekit, all core statistics"}
    lengths = {"attention": (256, 4096, 8192), "all": (256, 1024)} if not quick else {"all": (256,)}
    if has_peer:
        kinds |= {"transformer_lens": "TransformerLens path, all core statistics"}
        lengths |= {"transformer_lens": lengths["all"]}
    peak = {(kind, t): peak_mib(kind, t) for kind, some in lengths.items() for t in some}
    cases = [
        Case(
            f"peak memory, {kinds[kind]}, T = {t}",
            "the loaded model",
            2048.0 if (kind, t) == ("attention", 8192) else None,
            "MiB",
            [mib],
            curve=kinds[kind],
            n_tokens=t,
        )
        for (kind, t), mib in peak.items()
    ]
    for t in lengths["all"] if has_peer else ():
        ours, theirs, target = peak["all", t], peak["transformer_lens", t], 0.2 if t == 1024 else None
        note = f"{ours:.0f} MiB / {theirs:.0f} MiB above the loaded model"
        what = f"peak memory of all core statistics, T = {t}"
        cases.append(Case(what, "TransformerLens path", target, values=[ours / theirs], note=note))
    return cases

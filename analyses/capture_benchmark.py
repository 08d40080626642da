"""What capture costs: paired ratios against the bare model, memory in fresh processes, and agreement with others.

    python analyses/capture_benchmark.py --out reports/capture-benchmark          # about half an hour on two cores
    python analyses/capture_benchmark.py --quick --out reports/capture-benchmark  # about two minutes

Every speed is a ratio of two things that ran in turn in one process; medians over pairs. Comparisons with
TransformerLens and nnsight need `pip install "probekit[compare]"` and are left out, by name, without it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import xarray as xr
from capture_tables import LENS, STATS, Case, cost_table
from fresh_processes import MIB, import_case, memory_cases
from peers import NNsight, TransformerLens, naive
from timing import paired, processor

import probekit as pk
from probekit.reduce import Norm

DEMO = pk.demo_texts()


def text_of(model: Any, n_tokens: int) -> Any:
    """A batch of one text of exactly `n_tokens` tokens of plain English."""
    words = " ".join(DEMO * (1 + n_tokens // 900))
    return model.tokenize([words]).windows(n_tokens).select([0])


class Bench:
    """The model, and the bare computations that everything is held against."""

    def __init__(self) -> None:
        self.model = pk.open_model("smollm2-135m-instruct")
        self.hf = self.model.module
        self.weight = self.hf.get_output_embeddings().weight
        info = self.model.info
        self.n_layers, self.d_model, self.d_vocab = info.n_layers, info.d_model, info.d_vocab

    def forward(self, batch: Any) -> Callable[[], Any]:
        """The bare forward pass (SDPA, no unembedding)."""
        ids = torch.tensor([t.ids for t in batch])

        def run() -> None:
            with torch.no_grad():
                self.hf.base_model(input_ids=ids, use_cache=False)

        return run

    def gemms(self, n_rows: int) -> Callable[[], Any]:
        """The fastest bare matrix products for `n_rows` rows × vocabulary; results are thrown away."""
        rows, out = torch.randn(512, self.d_model), torch.empty(512, self.d_vocab)

        def run() -> None:
            with torch.no_grad():
                for start in range(0, n_rows, 512):
                    n = min(512, n_rows - start)
                    for a in range(0, self.d_vocab, 2048):
                        torch.mm(rows[:n], self.weight[a : a + 2048].T, out=out[:n, a : a + 2048])

        return run

    def capture(self, captures: tuple[pk.Capture, ...], batch: Any) -> Callable[[], Any]:
        """One instrumented pass through the engine's backend."""
        return lambda: self.model.execute(pk.Forward(captures), batch)

    def attention_case(self, n_tokens: int, target: float | None, n: int) -> Case:
        """Attention and residual statistics against the bare forward."""
        batch = text_of(self.model, n_tokens)
        values, a, b = paired(self.capture(STATS, batch), self.forward(batch), n, warm=n_tokens < 4096)
        what = f"attention + residual statistics, T = {n_tokens}"
        note, curve = f"{a:.2f} s / {b:.2f} s", "attention + residual statistics / bare forward"
        return Case(what, "bare SDPA forward", target, values=values, note=note, curve=curve, n_tokens=n_tokens)

    def lens_case(self, n_tokens: int, n: int) -> Case:
        """The all-layer lens, its forward pass taken off, against bare matrix products."""
        batch = text_of(self.model, n_tokens)
        forward, lens, gemms = (
            self.forward(batch),
            self.capture(LENS, batch),
            self.gemms(n_tokens * self.n_layers),
        )
        forward(), lens(), gemms()
        rows = []
        for _ in range(n):
            marks = [time.perf_counter()]
            for run in (forward, lens, gemms):
                run()
                marks.append(time.perf_counter())
            rows.append(np.diff(marks))
        f, a, b = np.array(rows).T
        note = f"({np.median(a):.2f} s - {np.median(f):.2f} s forward) / {np.median(b):.2f} s"
        values = ((a - f) / b).tolist()
        return Case(f"all-layer lens statistics, T = {n_tokens}", "bare GEMMs", 1.20, values=values, note=note)

    def all_case(self, n_tokens: int, target: float | None, n: int) -> Case:
        """Everything in one pass against the bare forward and the bare matrix products."""
        batch = text_of(self.model, n_tokens)
        forward, gemms = self.forward(batch), self.gemms(n_tokens * self.n_layers)
        ours = self.capture((*STATS, *LENS), batch)
        values, a, b = paired(ours, lambda: (forward(), gemms()), n, warm=n_tokens < 1024)
        what = f"all core statistics in one pass, T = {n_tokens}"
        note, curve = f"{a:.2f} s / {b:.2f} s", "all core statistics / bare forward + GEMMs"
        return Case(what, "bare forward + bare GEMMs", target, values=values, note=note, curve=curve, n_tokens=n_tokens)

    def peer_case(self, n_tokens: int, target: float | None, n: int) -> Case:
        """The same outputs the way a TransformerLens user gets them, against probekit."""
        batch = text_of(self.model, n_tokens)
        ids, peer = torch.tensor(batch.texts[0].ids), TransformerLens(self.hf.config._name_or_path)
        ours = self.capture((*STATS, *LENS), batch)
        values, a, b = paired(lambda: peer.run(ids), ours, n, warm=n_tokens < 1024)
        what = f"TransformerLens path for the same outputs, T = {n_tokens}"
        note, curve = f"{a:.2f} s / {b:.2f} s", "TransformerLens / probekit, all core statistics"
        return Case(what, "probekit", target, values=values, at_least=True, note=note, curve=curve, n_tokens=n_tokens)

    def overhead_case(self, n: int) -> Case:
        """What plan, requests and results add to an 8-token text, in milliseconds."""
        batch = text_of(self.model, 8)
        forward = self.forward(batch)

        def whole() -> None:
            pk.run("token-norms", self.model, batch, progress=False)

        with_pass = self.capture(TokenNorms.captures, batch)
        whole(), with_pass(), forward()
        values = []
        for _ in range(n):
            marks = [time.perf_counter()]
            for run in (forward, whole):
                run()
                marks.append(time.perf_counter())
            base, ours = np.diff(marks)
            values.append(1000 * (ours - base))
        return Case("engine overhead, 8-token text", "bare forward", 30.0, "ms", values)

    def batching_case(self, n_texts: int, n: int) -> Case:
        """Seconds per token of many short texts against one text of 512 tokens."""
        long, short = text_of(self.model, 512), self.model.tokenize([" ".join(DEMO * 40)]).windows(64)
        short = short.select(range(n_texts))

        def many() -> None:
            pk.run("token-norms", self.model, short, progress=False)

        def one() -> None:
            for _ in range(n_texts * 64 // 512):
                pk.run("token-norms", self.model, long, progress=False)

        values, a, b = paired(many, one, n, warm=False)
        what = f"{n_texts} texts of 64 tokens, per token"
        return Case(what, "texts of 512 tokens", 1.0, values=values, note=f"{a:.2f} s / {b:.2f} s")


@pk.register
class TokenNorms(pk.Analysis):
    """How long is the residual stream (the smallest analysis, for measuring the engine)?"""

    name, title = "token-norms", "Token norms"
    measures = {"norm": pk.Measure(("layer", "token"), "activation", "norm of the residual stream")}
    captures = (pk.Capture("resid_post", Norm()),)

    def observe(self, params: Any, info: Any) -> pk.Forward:
        """Norms."""
        return pk.Forward(self.captures)

    def compute(self, trace: Any, params: Any) -> xr.Dataset:
        """Norms as they came."""
        return trace[self.captures[0]]

    def findings(self, result: pk.Result) -> list[pk.Finding]:
        """None: it only measures the engine."""
        return []

    def draw(self, result: pk.Result) -> dict[str, Any]:
        """None."""
        return {}


def worker(kind: str, n_tokens: int) -> None:
    """Load, then run one job while another thread watches the process' memory; print the peak above the load."""
    if kind == "transformer_lens":
        model = pk.open_model("smollm2-135m-instruct", lazy=True)
        batch = text_of(model, n_tokens)
        peer, ids = TransformerLens(str(model.folder)), torch.tensor(batch.texts[0].ids)
        peer.run(ids[:8])

        def job() -> Any:
            return peer.run(ids)

    else:
        bench = Bench()
        batch = text_of(bench.model, n_tokens)
        job = bench.capture(STATS if kind == "attention" else (*STATS, *LENS), batch)
        bench.capture(STATS, text_of(bench.model, 8))()
    process, done, peak = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            done.wait(0.002)

    before = process.memory_info().rss
    thread = threading.Thread(target=watch)
    thread.start()
    job()
    done.set()
    thread.join()
    print(json.dumps({"peak_mib": (peak[0] - before) / MIB}))


PARITY = {
    "received": (STATS[0], "received"),
    "row_entropy_nats": (STATS[0], "entropy_nats"),
    "row_max": (STATS[0], "max"),
    "first_share": (STATS[0], "first_share"),
    "norm": (STATS[1], "norm"),
    "top_magnitudes": (STATS[2], "value"),
    "entropy_nats": (LENS[0], "entropy_nats"),
    "logprob_nats": (LENS[0], "logprob_nats"),
    "target_rank": (LENS[0], "target_rank"),
    "kl_nats": (LENS[0], "kl_nats"),
    "top_logprob": (LENS[0], "top_logprob"),
}


def parity(bench: Bench, n_tokens: int, peers: dict[str, Any]) -> xr.Dataset:
    """Largest difference of every statistic to a naive float64 reference, for probekit, eager float32 and others."""
    batch = text_of(bench.model, n_tokens)
    ids = torch.tensor(batch.texts[0].ids)
    reference = naive(bench.hf, ids, torch.float64)
    parts = dict(zip((*STATS, *LENS), bench.model.execute(pk.Forward((*STATS, *LENS)), batch), strict=True))
    ours: dict[str, Any] = {}
    for name, (capture, field_name) in PARITY.items():
        values = torch.as_tensor(parts[capture].arrays[field_name])
        values = values.abs() if name == "top_magnitudes" else values
        ours[name] = values[:, :-1] if name in ("logprob_nats", "target_rank") else values
    found = {"probekit": ours, "eager float32": naive(bench.hf, ids, torch.float32)}
    found |= {name: peer(bench.hf.config._name_or_path).run(ids) for name, peer in peers.items()}
    table = np.array(
        [
            [
                float((torch.stack([*map(torch.as_tensor, f[s])]).double() - torch.stack(reference[s])).abs().max())
                for s in PARITY
            ]
            for f in found.values()
        ]
    )
    sizes = [float(torch.stack(reference[s]).abs().max()) for s in PARITY]
    return xr.Dataset(
        {"largest_difference": (("sample", "case"), table), "largest_value": ("case", sizes)},
        coords={"sample": list(found), "case": list(PARITY)},
    )


def measure(quick: bool) -> tuple[list[Case], xr.Dataset, list[str]]:
    """All rows of the table, the parity table, and what was left out."""
    bench, cases, left_out = Bench(), [], []
    has_peer = importlib.util.find_spec("transformer_lens") is not None
    peers: dict[str, Any] = {"TransformerLens": TransformerLens} if has_peer else {}
    if importlib.util.find_spec("nnsight") is not None:
        peers["nnsight"] = NNsight
    n, many = (3, 3) if quick else (5, 9)

    def add(make: Callable[[], Case]) -> None:
        case = make()
        cases.append(case)
        print(f"{case.what:58} {case.median:8.3f} {case.unit} of {case.against} {case.note}", flush=True)

    for n_tokens, target in ((64, None), (256, 1.10), (1024, 1.12), *(() if quick else ((4096, 1.20),))):
        add(
            lambda n_tokens=n_tokens, target=target: bench.attention_case(
                n_tokens, target, many if n_tokens < 4096 else n
            )
        )
    add(lambda: bench.lens_case(64 if quick else 256, many))
    for n_tokens, target in ((64, None), *(() if quick else ((256, 1.20), (1024, 1.20)))):
        add(lambda n_tokens=n_tokens, target=target: bench.all_case(n_tokens, target, many if n_tokens < 1024 else n))
    for n_tokens, target in ((64, None), *(() if quick else ((256, 2.5), (1024, 3.0)))):
        if has_peer:
            add(lambda n_tokens=n_tokens, target=target: bench.peer_case(n_tokens, target, n))
        else:
            left_out.append(f"TransformerLens at T = {n_tokens}: not installed")
    add(lambda: bench.overhead_case(20))
    add(lambda: import_case(5))
    add(lambda: bench.batching_case(32 if quick else 512, 3 if quick else 2))
    for case in memory_cases(quick, has_peer):
        add(lambda case=case: case)
    return cases, parity(bench, 48 if quick else 128, peers), left_out


def plan_of(quick: bool) -> str:
    """What would be measured, and what is left out because it is not installed."""
    sizes = "64, 256 and 1,024 tokens" if quick else "64, 256, 1,024 and 4,096 tokens"
    peers = [p for p in ("transformer-lens", "nnsight") if importlib.util.find_spec(p.replace("-", "_")) is not None]
    return "\n".join(
        [
            "paired ratios against a bare pass of smollm2-135m-instruct, on two threads:",
            f"  attention statistics at {sizes}; the lens; all analyses together; overhead; import; batching",
            f"  beside {' and '.join(peers) or 'no other library (none is installed)'}; memory in fresh processes",
            f"  about {'two minutes' if quick else 'half an hour'} on two cores",
        ]
    )


def main() -> None:
    """Measure, and write a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter texts and fewer pairs")
    parser.add_argument("--out", type=Path, default=Path("reports/capture-benchmark"))
    parser.add_argument("--plan", action="store_true", help="say what would be measured, and stop")
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        print(plan_of(options.quick))
        return
    torch.set_num_threads(2)
    if options.worker:
        worker(options.worker[0], int(options.worker[1]))
        return
    cases, agreement, left_out = measure(options.quick)
    machine = {"processor": processor(), "cores": psutil.cpu_count(), "threads": 2}
    model = pk.open_model("smollm2-135m-instruct")
    provenance = {**model.provenance(), "machine": machine, "left_out": left_out, "quick": options.quick}
    for package in ("transformer-lens", "nnsight"):
        if importlib.util.find_spec(package.replace("-", "_")) is not None:
            provenance["versions"][package] = importlib.metadata.version(package)
    results = [
        pk.result_of(name, data, provenance)
        for name, data in (("capture-benchmark", cost_table(cases)), ("capture-parity", agreement))
    ]
    print("Report:", pk.report(results, options.out))


if __name__ == "__main__":
    main()

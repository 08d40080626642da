"""What capture costs on an accelerator: paired ratios against the bare model, and memory above the weights.

    python analyses/device_benchmark.py --out reports/device-benchmark                 # Llama-3-8B's shape, random
    python analyses/device_benchmark.py --shape tiny --tokens 64 --out reports/device  # any machine, to try it out

The model is random: cost depends on shapes alone. Nothing is downloaded. The report names the device.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from capture_tables import LENS, STATS, Case, cost_table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import probekit as pk

SHAPES: dict[str, dict[str, int]] = {
    "llama-3-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
}


class DeviceBench:
    """A random model of one shape on one device.

    Args:
        shape: a name from `SHAPES`.
        device: where it goes, such as "cuda".
        dtype: type of the weights.
        n_tokens: length of the text.
    """

    def __init__(self, shape: str, device: str, dtype: torch.dtype, n_tokens: int) -> None:
        self.device, self.dtype, self.n_tokens = torch.device(device), dtype, n_tokens
        with self.device:
            self.hf = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=dtype).eval()
        words = {f"w{i}": i for i in range(SHAPES[shape]["vocab_size"])}
        own = Tokenizer(models.WordLevel(words, unk_token="w0"))
        own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.model = pk.open_model((self.hf, PreTrainedTokenizerFast(tokenizer_object=own)))
        ids = np.random.default_rng(0).integers(0, len(words), n_tokens)
        self.batch = self.model.tokenize([" ".join(f"w{i}" for i in ids)])
        self.ids = torch.tensor([self.batch.texts[0].ids], device=self.device)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forward(self) -> None:
        """The bare forward pass, no unembedding."""
        with torch.no_grad():
            self.hf.base_model(input_ids=self.ids, use_cache=False)

    def products(self) -> None:
        """The lens' bare matrix products in the weights' type; results are thrown away."""
        weight = self.hf.get_output_embeddings().weight
        rows = torch.randn(2048, weight.shape[1], device=self.device).to(self.dtype)
        with torch.no_grad():
            for start in range(0, self.n_tokens * self.hf.config.num_hidden_layers, 2048):
                n = min(2048, self.n_tokens * self.hf.config.num_hidden_layers - start)
                for a in range(0, len(weight), 16_384):
                    torch.mm(rows[:n], weight[a : a + 16_384].T)

    def seconds(self, run: Callable[[], Any]) -> float:
        """How long it takes until the device is done."""
        self.wait()
        begin = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - begin

    def cases(self, n: int) -> list[Case]:
        """Ratios of `n` rounds, and the peak of device memory above the weights."""

        def stats() -> Any:
            return self.model.execute(pk.Forward(STATS), self.batch)

        def lens() -> Any:
            return self.model.execute(pk.Forward(LENS), self.batch)

        runs = (self.forward, stats, lens, self.products)
        for run in runs:
            self.seconds(run)  # kernels are compiled and buffers allocated outside the measurement
        rows = np.array([[self.seconds(run) for run in runs] for _ in range(n)])
        f, s, r, p = rows.T
        t = self.n_tokens
        note = " / ".join(f"{v:.3f} s" for v in np.median(rows, axis=0)) + " (forward, statistics, lens, products)"
        found = [
            Case(f"attention + residual statistics, T = {t}", "bare forward", 1.15, values=(s / f).tolist(), note=note),
            Case(
                f"all-layer lens statistics, T = {t}", "bare products", 1.25, values=((r - f) / p).tolist(), note=note
            ),
        ]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.model.execute(pk.Forward((*STATS, *LENS)), self.batch)
            above = (torch.cuda.max_memory_allocated(self.device) - before) / 2**20
            found.append(Case("peak device memory, all core statistics", "the weights", 4096.0, "MiB above", [above]))
        return found


def main() -> None:
    """Measure, and write a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("reports/device-benchmark"))
    options = parser.parse_args()
    if options.shape != "tiny" and options.device == "cpu":
        parser.error("no accelerator was found; give --shape tiny to try the study out on a CPU")
    bench = DeviceBench(options.shape, options.device, getattr(torch, options.dtype), options.tokens)
    cases = bench.cases(options.pairs)
    for case in cases:
        print(f"{case.what:48} {case.median:8.3f} {case.unit} of {case.against}  {case.note}")
    named = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU"
    provenance = {**bench.model.provenance(), "device": named, "shape": SHAPES[options.shape]}
    print("Report:", pk.report([pk.result_of("capture-benchmark", cost_table(cases), provenance)], options.out))


if __name__ == "__main__":
    main()

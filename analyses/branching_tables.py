"""What the benchmark of the shared-prefix sampler found, as a result like any other."""

from __future__ import annotations

import json
from typing import Any

from capture_tables import CaptureBenchmark, Case

import probekit as pk


@pk.register
class BranchingBenchmark(CaptureBenchmark):
    """What does writing on from shared prefixes cost, against generating from each prefix?

    Question:
        How much faster than one call of `generate` per prefix is the shared-prefix sampler, and what do skipped
        positions and early stops save on top?

    Method:
        SmolLM2-135M-Instruct, float32, two threads; 20 prefixes along a greedy answer of 200 tokens, 16 continuations of
        32 tokens each, drawn at temperature 1; no end token counts, so that both write the same number of tokens. The
        baseline is `generate(num_return_sequences=16)` of transformers with its cache, one prefix after the other.
        Ratios of computations that run in turn in one process; the table gives the median. Memory is the peak resident
        size of a fresh process above its size after loading.

    Null:
        No difference: ratio 1.

    Known failure modes:
        Shared machines are noisy. The ratio depends on the lengths: a long prompt favours the sampler, long
        continuations bring both together.

    References:
        None; this is a measurement of the software itself.
    """

    name, title = "branching-benchmark", "What writing on from shared prefixes costs"

    def draw(self, result: pk.Result) -> dict[str, Any]:
        """Ratios to the baselines."""
        rows = [Case(**json.loads(row)) for row in result["row"].values]
        ratios = [c for c in rows if c.unit.startswith("×")]
        machine = result.provenance.get("machine", {}).get("processor", "")
        return {
            "ratios": pk.plots.bars(
                {c.what: c.median for c in ratios},
                title="Time of the shared-prefix sampler, as multiples of the baseline",
                unit="× baseline",
                quantity="median ratio",
                intervals={c.what: (min(c.values), max(c.values)) for c in ratios},
                reference=(1.0, "the baseline itself"),
                caption=f"SmolLM2-135M-Instruct, float32. {machine}. Whiskers: smallest and largest pair.",
                alt="Bars of time ratios of the sampler against its baselines.",
            )
        }

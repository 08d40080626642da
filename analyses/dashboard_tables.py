"""What the benchmark of the dashboard found, as a result like any other."""

from __future__ import annotations

import json
from typing import Any

from capture_tables import CaptureBenchmark, Case

import probekit as pk


@pk.register
class DashboardBenchmark(CaptureBenchmark):
    """What does the dashboard add to the analyses it shows?

    Question:
        How much longer than the bare run of the same analyses does a reader wait, how long does a click take, and how
        much is sent?

    Method:
        SmolLM2-135M-Instruct, float32. The dashboard runs in a process of its own and is driven through a headless
        browser. Texts of about 200 tokens, each used once, go to `pk.run` in this process and to the dashboard in turn;
        the row is the second minus the first, from the click on the button until spine and page stand. A click on a
        token ends when the token is the selected one and the script has run. Payload is what comes through the page's
        websocket.

    Null:
        Nothing added: 0 s.

    Known failure modes:
        Shared machines are noisy. The browser shares the two cores with the model, so that drawing slows the run.

    References:
        None; this is a measurement of the software itself.
    """

    name, title = "dashboard-benchmark", "What the dashboard adds"

    def draw(self, result: pk.Result) -> dict[str, Any]:
        """Seconds."""
        rows = [Case(**json.loads(row)) for row in result["row"].values]
        some = [c for c in rows if c.unit == "s"]
        machine = result.provenance.get("machine", {}).get("processor", "")
        return {
            "seconds": pk.plots.bars(
                {c.what: c.median for c in some},
                title="Seconds that a reader waits",
                unit="s",
                quantity="median",
                intervals={c.what: (min(c.values), max(c.values)) for c in some},
                caption=f"SmolLM2-135M-Instruct, float32. {machine}. Whiskers: smallest and largest.",
                alt="Bars of seconds: what the dashboard adds to a run, and clicks.",
            )
        }

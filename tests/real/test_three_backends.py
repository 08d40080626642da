"""Every analysis, on SmolLM2-135M through three libraries: the numbers agree.

Native hooks, TransformerLens' bridge and nnsight's trace run the same float32 weights on the same token ids and differ
in how they reach an activation and in the attention kernel (streamed, eager in the bridge, eager in the trace). Each
variable of each result is compared with the native one. Tolerances, in this order:

- nats (entropies, surprisals, log-probabilities, divergences): 2e-4 in absolute terms, and squared nats 2e-3. Where the
  model is sure, such a value is a difference of logits near 30, so its size says nothing about its rounding.
- everything else that is continuous: 1e-4 of the entry, and 1e-6 of the array's largest for entries near 0; 1e-4 of the
  largest where analyses change activations, whose numbers are differences between two runs.
- `layer_entropy_rest_nats`: 0.005 nats. It divides by the attention that position 0 leaves, which goes down to 1e-3, and
  with it the rounding of the entropies, 3e-6 nats, grows.
- ids: equal, but where the values that order them are within that tolerance of each other.
- ranks: equal, but for tokens that tie with the one that is ranked; one, and one in a thousand of the rank.
- integers, and what is decided by a threshold or an argmax (shares of heads, layers, counts): equal.

Most differences are 0 to the last bit: a head is 64 wide, so scaling by 1/8 rounds nothing, and on short texts all three
multiply the same matrices in the same order. Entropies of attention rows are computed along two formulas.

Run as a script, it prints the table of largest differences: `python tests/real/test_three_backends.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import xarray as xr

import probekit as pk
from probekit.analysis import Result, analyses
from probekit.demo import demo_texts
from probekit.models import BACKENDS

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("threads")]
MODEL = "smollm2-135m-instruct"
OTHERS = tuple(b for b in BACKENDS if b != "transformers")
NATS, SQUARED_NATS, RELATIVE, FLOOR = 2e-4, 2e-3, 1e-4, 1e-6
DIFFERENCES = 1e-4  # the floor where a number is a difference between two runs
AMPLIFIED = {"layer_entropy_rest_nats": 0.005}
RANKS = {"target_rank"}
IDS = {"top_id": "top_logprob", "dim": "value"}  # ids, and the values that order them
DECIDED = {"sink_share", "sink_rate", "sink_rate_by_key", "sink_rate_by_epsilon", "settled_layer", "agreement"}
DECIDED |= {"sink_pos", "main_pos"}  # of value-drain
DECIDED |= {"agreement_null", "n_massive", "n_massive_loose", "peak_pos", "peak_dim", "peak_layer", "writer"}


@dataclass(frozen=True)
class Difference:
    """How far one variable of one result is from the native one.

    Args:
        statistic: analysis and variable.
        backend: whose numbers are compared.
        absolute: largest difference of two entries.
        relative: largest difference, as a share of the native entry.
        allowed: the tolerance, in words.
        beyond: entries that differ by more than is allowed.
    """

    statistic: str
    backend: str
    absolute: float
    relative: float
    allowed: str
    beyond: int


def texts() -> list[str]:
    """A story and some arithmetic, about 70 tokens each."""
    return [text[:320].rsplit(" ", 1)[0] for text in (demo_texts()[0], demo_texts()[3])]


CAPITALS = ("The capital of France is Paris", "The capital of Italy is Rome")
CONTRASTS = tuple(
    f"{name} says the {thing} is {word}"
    for name, thing in (("Ann", "film"), ("Ben", "meal"), ("Eve", "book"), ("Tom", "song"))
    for word in ("great", "awful")
)
# Texts and parameters on which an analysis that changes activations takes few passes; nnsight has no gradients and
# no swapped blocks, so both are left to the native backend's own tests.
INTERVENING: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "activation-patching": (CAPITALS, {"attribution": False}),
    "layer-ablation": (CAPITALS, {"swap": False, "stride": 6}),
    "dormant-heads": (tuple(texts()), {"n_heads": 4, "n_permutations": 50}),
    "sink-anatomy": (tuple(texts()), {"horizon": 32, "phases": 1}),
    "steering": (CONTRASTS, {"n_neutral": 0, "layers": "15", "doses": "0.5", "n_controls": 1}),
}


# nnsight shows no keys: one analysis is refused there, and what another measures of them is NaN.
REFUSED = {"nnsight": {"sink-anatomy"}}
WITHOUT = {("nnsight", name) for name in ("key_norm", "key_ratio", "first_key_ratio", "key_typical")}


def run_all(model: Any, refused: set[str]) -> dict[str, Result]:
    """Every analysis there is, with this model, but for those that it refuses."""
    found = dict(pk.run(["all"], model, texts(), progress=False))
    for name, (some, params) in INTERVENING.items():
        if name in refused:
            with pytest.raises(pk.ProbekitError, match="has no point"):
                pk.run(name, model, list(some), progress=False, **params)
            continue
        found[name] = pk.run(name, model, list(some), progress=False, **params)
    return found


def results() -> dict[str, dict[str, Result]]:
    """All analyses of the same texts and weights, by backend."""
    native: Any = pk.open_model(MODEL, dtype="float32")
    models = {"transformers": native}
    for backend in OTHERS:
        models[backend] = pk.open_model((native.module, native.tokenizer), backend=backend)
    return {backend: run_all(model, REFUSED.get(backend, set())) for backend, model in models.items()}


def compare(backend: str, found: dict[str, Result], expected: dict[str, Result]) -> list[Difference]:
    """Every variable of every result."""
    assert set(found) == set(expected) - REFUSED.get(backend, set())
    rows = []
    for name in found:
        result = expected[name]
        assert set(found[name].dataset.variables) == set(result.dataset.variables)
        for variable in map(str, result.dataset.data_vars):
            if result[variable].dtype.kind in "fiub" and (backend, variable) not in WITHOUT:
                rows.append(_difference(f"{name} · {variable}", backend, found[name].dataset, result.dataset))
    return rows


def _difference(statistic: str, backend: str, found: xr.Dataset, expected: xr.Dataset) -> Difference:
    name, _, variable = statistic.partition(" · ")
    a, b = (d[variable].values.astype(np.float64) for d in (found, expected))
    assert a.shape == b.shape and found[variable].attrs == expected[variable].attrs, statistic
    assert np.array_equal(np.isnan(a), np.isnan(b)), f"{statistic}: NaN at other places"
    a, b = np.nan_to_num(a), np.nan_to_num(b)
    off = np.abs(a - b)
    allowed, words = _allowed(name, variable, b, expected)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.nan_to_num(off / np.abs(b), nan=0.0, posinf=0.0)
    worst = (float(x.max(initial=0.0)) for x in (off, relative))
    return Difference(statistic, backend, *worst, words, int((off > allowed).sum()))


def _allowed(name: str, variable: str, values: np.ndarray, dataset: xr.Dataset) -> tuple[np.ndarray, str]:
    """The tolerance of each entry, and in words."""
    unit = str(dataset[variable].attrs.get("units", ""))
    if variable in IDS and IDS[variable] in dataset:
        tied = _tied(np.abs(dataset[IDS[variable]].values.astype(np.float64)), variable == "top_id")
        return np.where(tied, np.inf, 0.0), "equal, but at ties"
    if variable in RANKS:
        return 1 + 1e-3 * values, "1 + 0.001 · rank"
    if (variable in DECIDED and name not in INTERVENING) or dataset[variable].dtype.kind in "iub":
        return np.zeros_like(values), "equal"
    if variable in AMPLIFIED:
        return np.full_like(values, AMPLIFIED[variable]), f"{AMPLIFIED[variable]:g} nats"
    if unit == "nats":
        return np.full_like(values, NATS), f"{NATS:g} nats"
    if unit == "nats²":
        return np.full_like(values, SQUARED_NATS), f"{SQUARED_NATS:g} nats²"
    share = FLOOR if name not in INTERVENING else DIFFERENCES
    floor = share * float(np.abs(values).max(initial=0.0))
    return floor + RELATIVE * np.abs(values), f"{RELATIVE:g} · value + {share:g} · largest"


def _tied(values: np.ndarray, nats: bool) -> np.ndarray:
    """Entries whose neighbour in rank is within the tolerance; the last one has an unseen neighbour."""
    size = NATS if nats else RELATIVE * values[..., :-1]
    close = np.abs(np.diff(values, axis=-1)) <= size
    end = np.ones((*values.shape[:-1], 1), dtype=bool)
    return np.concatenate([close, end], -1) | np.concatenate([~end, close], -1)


def table(rows: list[Difference]) -> str:
    """Largest difference per statistic, the backends side by side, as Markdown."""
    lines = [f"| statistic | {' | '.join(f'{b}: absolute | relative' for b in OTHERS)} | allowed |"]
    lines.append("|---" * (2 + 2 * len(OTHERS)) + "|")
    for statistic in dict.fromkeys(r.statistic for r in rows):
        mine = {r.backend: r for r in rows if r.statistic == statistic}
        cells = [f"{mine[b].absolute:.1e} | {mine[b].relative:.1e}" if b in mine else "refused |" for b in OTHERS]
        lines.append(f"| {statistic} | {' | '.join(cells)} | {mine[OTHERS[0]].allowed} |")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Result]]:
    return results()


def test_three_backends_agree(found: dict[str, dict[str, Result]]) -> None:
    """No entry of any variable of any result is further from the native one than the tolerances above."""
    native = found["transformers"]
    rows = [row for backend in OTHERS for row in compare(backend, found[backend], native)]
    print("\n" + table(rows))
    looking = {name for name, a in analyses().items() if a.reads_texts and not (a.writes or a.roles)}
    assert {r.statistic.partition(" ")[0] for r in rows} == set(native) == looking
    assert len(rows) >= 80, "variables of all results, twice"
    assert not [r for r in rows if r.beyond]


def test_each_backend_did_the_work_itself(found: dict[str, dict[str, Result]]) -> None:
    """The same weights and token ids, and numbers that are not one array seen three times."""
    by_backend = {b: next(iter(r.values())).provenance for b, r in found.items()}
    assert [p["backend"] for p in by_backend.values()] == list(BACKENDS)
    assert len({p["weights_hash"] for p in by_backend.values()}) == 1
    assert len({str(p["texts"]) for p in by_backend.values()}) == 1
    entropy = [r["attention-sinks"]["row_entropy_nats"].values for r in found.values()]
    assert not np.array_equal(entropy[0], entropy[1]) and not np.array_equal(entropy[0], entropy[2])


def test_a_difference_is_noticed(found: dict[str, dict[str, Result]]) -> None:
    """Each kind of variable, moved by a little more than its tolerance, is counted; moved by less, it is not."""
    native = found["transformers"]
    for name, variable, much, little in (
        ("logit-lens", "entropy_nats", 3e-4, 1e-4),
        ("logit-lens", "target_rank", 60.0, 0.5),
        ("massive-activations", "norm", 1e-3, 0.0),
        ("massive-activations", "n_massive", 1.0, 0.0),
        ("attention-sinks", "received", 2e-4, 5e-7),
    ):
        dataset = native[name].dataset
        for by, expected in ((much, True), (little, False)):
            moved = dataset.copy(deep=True)
            scale = float(np.nanmax(np.abs(dataset[variable].values))) if variable == "norm" else 1.0
            moved[variable] = dataset[variable] + by * scale
            moved[variable].attrs = dataset[variable].attrs
            if variable == "target_rank":  # a rank of thousands may move by some
                moved, dataset = (d.isel(layer=[-1]) for d in (moved, dataset))
            row = _difference(f"{name} · {variable}", "moved", moved, dataset)
            assert (row.beyond > 0) == expected, (variable, by, row)


if __name__ == "__main__":
    everything = results()
    print(table([r for b in OTHERS for r in compare(b, everything[b], everything["transformers"])]))

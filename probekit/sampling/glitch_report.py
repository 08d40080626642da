"""What glitch-tokens draws of its tasks, and what it says and draws of its mining, beside searches without a gradient."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Finding, Result
from probekit.stats import wilson

SEARCHES = {"mined": "along the gradient", "walked": "a walk without it", "drawn": "drawn at random"}
_LISTED = 12


def mining_findings(result: Result) -> list[Finding]:
    """Hits against random tokens and against the walk without the gradient, recall, the tokens."""
    if not np.isfinite(result["mined"].values).any():
        return []
    return [*_hits(result), *_of_all(result), *_recall(result), _strict(result)]


def mining_drawings(result: Result) -> dict[str, plots.Drawing]:
    """What was found so far by each search, and the entropies along the walk."""
    if not np.isfinite(result["mined"].values).any():
        return {}
    return {"mining": _found(result), "entropy": _entropies(result)}


def _visited(result: Result, search: str) -> np.ndarray:
    return np.isfinite(result[search].values)


def _called(result: Result) -> np.ndarray:
    wrote = result["wrote"].values
    return (wrote >= 0) & (wrote != np.arange(len(wrote)))


def _counts(result: Result, search: str) -> tuple[int, int, int]:
    """Tokens that a search evaluated, those the model would not repeat, those that fail the strict check, too."""
    visited, strict = _visited(result, search), result["strict"].values == 1
    return int(visited.sum()), int((visited & _called(result)).sum()), int((visited & strict).sum())


def _hits(result: Result) -> list[Finding]:
    (n, k, s), (n1, k1, s1), (n0, k0, s0) = (_counts(result, search) for search in SEARCHES)
    steps = int(np.nanmax(result["mined"].values))
    return [
        Finding(
            f"Mining along the gradient of the entropy evaluated {n:,} tokens in {steps} steps; {k} of them the model "
            f"does not repeat ({s} in no prompt of the strict check), and {k0} ({s0}) of {n0:,} drawn at random.",
            k / n, "share of tokens", k0 / n0, "tokens drawn at random", wilson(k, n), n, "tokens",
            quantity="mined tokens not repeated, against random ones",
        ),
        Finding(
            f"A walk of the same rules that does without the gradient evaluated {n1:,} tokens, of which the model does "
            f"not repeat {k1} ({s1} in no prompt); along the gradient, {k} ({s}) of {n:,}.",
            k / n, "share of tokens", k1 / n1, "the walk without the gradient", wilson(k, n), n, "tokens",
            quantity="mined tokens not repeated, against a blind walk",
        ),
    ]  # fmt: skip


def _of_all(result: Result) -> list[Finding]:
    """Recall in the vocabulary, of which the tokens drawn at random tell how many it holds; nothing where none did."""
    (n, k, _), _, (n0, k0, _) = (_counts(result, search) for search in SEARCHES)
    everywhere = int(result["n_ordinary"])
    if not k0:
        return []
    all_drawn = n0 >= everywhere
    low, high = wilson(k0, n0)
    ci = None if all_drawn else (k / (everywhere * high), min(1.0, k / (everywhere * low)))
    value = min(1.0, k / (everywhere * k0 / n0))
    return [
        Finding(
            f"Mining found {k} of {'' if all_drawn else 'about '}{everywhere * k0 / n0:,.0f} ordinary tokens that the model "
            "does not repeat in the same prompt.",
            value, "share of tokens not repeated", n / everywhere, "as many ordinary tokens at random", ci,
            *((1, "vocabulary") if all_drawn else (n0, "tokens")), quantity="tokens not repeated that mining found",
        )
    ]  # fmt: skip


def _recall(result: Result) -> list[Finding]:
    """Of the scan's glitch tokens, those that the searches came by; nothing where the scan has none."""
    glitch = result["glitch"].values
    judged, bad = np.isfinite(glitch), glitch == 1
    n, of = int(bad.sum()), int(judged.sum())
    if not n:
        return []
    k, k1, k0 = (int((bad & _visited(result, search)).sum()) for search in SEARCHES)
    called = int((bad & _visited(result, "mined") & _called(result)).sum())
    both = int((judged & _visited(result, "mined")).sum())
    everywhere = int(result["n_ordinary"])
    scan = "every ordinary token" if of >= everywhere else f"{of:,} of {everywhere:,} ordinary tokens"
    return [
        Finding(
            f"Of the {n:,} glitch tokens of the scan, which judged {scan} (mining looked at {both:,} of them), mining "
            f"evaluated {k} and found {called} of these not repeated; the walk without the gradient evaluated {k1}, tokens "
            f"drawn at random held {k0}.",
            k / n, "share of glitch tokens", both / of, "as many scanned tokens at random", wilson(k, n), n,
            "glitch tokens", quantity="glitch tokens of the scan that mining evaluated",
        )
    ]  # fmt: skip


def _strict(result: Result) -> Finding:
    """The strings, those of highest entropy first."""
    bad = np.flatnonzero(_visited(result, "mined") & (result["strict"].values == 1))
    bad = bad[np.argsort(-result["entropy_nats"].values[bad], kind="stable")]
    listed = ", ".join(f"{_word(result, int(i))!r} ({i})" for i in bad[:_LISTED]) or "none"
    more = f" and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
    new = int((~np.isfinite(result["glitch"].values[bad])).sum())
    return Finding(
        f"Mined tokens that the model repeats in none of four prompts, highest entropy first: {listed}{more}; {new} of "
        "them the scan did not look at.",
        float(len(bad)), "tokens", 0.0, "a model that handles every token", None, 1, "vocabulary",
        {"ids": ", ".join(map(str, bad[:40].tolist()))}, quantity="mined tokens repeated in no strict prompt",
    )  # fmt: skip


def model_name(result: Result) -> str:
    """The name of the model that was looked at."""
    return str(result.provenance.get("model", {}).get("name", "model"))


def _word(result: Result, token: int) -> str:
    return plots.visible(str(result["shown"].values[token]))


def _found(result: Result) -> plots.Figure:
    curves = {}
    for search, words in SEARCHES.items():
        step = result[search].values
        at = step[np.isfinite(step)].astype(int)
        tried = np.bincount(at).cumsum()
        found = np.bincount(at, _called(result)[np.isfinite(step)]).cumsum()
        dim = "tokens evaluated"
        curves[words] = xr.DataArray(found, dims=dim, coords={dim: tried})
    return plots.lines(
        curves,
        title="Tokens that each search has found the model not to repeat",
        unit="tokens",
        quantity="tokens not repeated",
        caption=f"{model_name(result)}. Tokens in whose place the model would write another, in the prompt of repetition. "
        "One walk each, from the same start.",
        alt="Curves of tokens not repeated against tokens evaluated, along the gradient, without it, and at random.",
    )


def _entropies(result: Result) -> plots.Figure:
    visited, called = _visited(result, "mined"), _called(result)
    strict = result["strict"].values == 1
    groups = {
        "repeated": visited & ~called,
        "not repeated": visited & called & ~strict,
        "not in three other prompts either": visited & called & strict,
    }
    step, entropy = result["mined"].values, result["entropy_nats"].values
    return plots.scatter(
        {g: (step[m], entropy[m]) for g, m in groups.items() if m.any()},
        title="The entropy at the tokens that mining evaluated",
        unit="1",
        x_quantity="step of the walk",
        y_quantity="entropy (nats)",
        caption=f"{model_name(result)}. Each dot is a token, in the prompt of repetition; the walk goes on from the "
        "highest of a step.",
        hover={g: [_note(result, int(i)) for i in np.flatnonzero(m)] for g, m in groups.items() if m.any()},
        alt="Scatter of the entropy of evaluated tokens against the step, glitch tokens marked.",
    )


def _note(result: Result, token: int) -> str:
    """The token, what the gradient promised, and what the model would write."""
    promised, wrote = float(result["estimated_nats"].values[token]), int(result["wrote"].values[token])
    said = "" if np.isnan(promised) else f", promised {promised:.2f} nats"
    other = "" if wrote == token else f", the model writes {_word(result, wrote)}"
    return f"{_word(result, token)} [{token}]{said}{other}"


def task_drawings(result: Result, groups: Mapping[str, np.ndarray]) -> dict[str, plots.Drawing]:
    """How many tokens pass each task, and the indicator against repetition.

    Args:
        result: of glitch-tokens.
        groups: by label, which tokens were scanned as what; axis vocab.
    """
    data, about = result.dataset, model_name(result)
    rates: dict[str, float] = {}
    ends: dict[str, tuple[float, float]] = {}
    for task, passed, counts in zip(data["case"].values, data["passed"].values, data["counts"].values, strict=True):
        for group, mask in groups.items():
            some = passed[mask]
            some = some[np.isfinite(some)]
            if some.size:
                label = f"{task}, {group}{'' if counts else ' (does not count)'}"
                rates[label], ends[label] = float(some.mean()), wilson(int(some.sum()), some.size)
    drawn: dict[str, plots.Drawing] = {
        "tasks": plots.bars(
            rates, title="How many tokens pass each task", unit="share", quantity="passed", by="task and tokens",
            intervals=ends,
            caption=f"{about}. Wilson 95 % intervals; suspects look most under-trained by their weights.",
            alt="Bars of the share of tokens that pass each task, suspects and randomly drawn tokens.",
        )
    }  # fmt: skip
    if "repetition" in data["case"].values:
        prob = data["prob"].sel(case="repetition").values
        drawn["map"] = plots.scatter(
            {g: (data["indicator"].values[m], prob[m]) for g, m in groups.items() if m.any()},
            title="What weights say against how surely the model repeats the token", unit="1",
            x_quantity=data["indicator_name"].item(), y_quantity="probability of repeating it",
            caption=f"{about}. Each dot is a scanned token.",
            hover={g: [_instead(result, int(i)) for i in np.flatnonzero(m)] for g, m in groups.items() if m.any()},
            alt="Scatter of the indicator against the probability of repeating the token.",
        )  # fmt: skip
    return drawn


def _instead(result: Result, token: int) -> str:
    """The token and what the model would write in its place."""
    other = int(result["instead"].sel(case="repetition").values[token])
    said = f", the model writes {_word(result, other)}" if other >= 0 else ""
    return f"{_word(result, token)} [{token}]{said}"

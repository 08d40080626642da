"""Glitch tokens: which tokens can the model not repeat, spell or measure, and how well cheaper searches find them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Flow, Measure, Params, Result, param, register
from probekit.core import Batch, InputError, ModelInfo, Vocabulary, VocabularyTable, Weights
from probekit.methods.glitch import TASKS, answered, clusters, lower_bound, passes_of, probe, questions
from probekit.methods.token_categories import OK, categories
from probekit.methods.undertrained import INDICATORS, chosen, indicators, reference_from
from probekit.stats import wilson

_SUSPECT, _DRAWN = 1, 2
_LISTED = 12
_MANY = 0.05  # share of random tokens that fail, beyond which failing is no rarity


@dataclass(frozen=True)
class GlitchParams(Params):
    """Parameters of glitch-tokens."""

    n_suspects: int = param(
        100, low=0, high=1000000, unit="tokens", help="Tokens scanned that look most under-trained by their weights"
    )
    n_random: int = param(
        100, low=1, high=10000000, unit="tokens", help="Tokens scanned that are drawn from all others"
    )
    tasks: str = param("repetition,spelling,length", help="Tasks, separated by commas")
    competence: float = param(
        0.5, low=0.0, high=1.0, unit="share", help="A task counts if so many of the tokens drawn at random pass it"
    )
    indicator: str = param(
        "auto", choices=("auto", *INDICATORS), help="What ranks suspects; auto: input norm if embeddings are untied, or cosine"
    )  # fmt: skip
    reference: str = param("", help="Ids of tokens known to be untrained, by commas; found by itself if empty")
    min_cluster: int = param(5, low=2, high=10000, unit="tokens", help="Tokens within the radius that make a cluster")
    density: float = param(
        0.1,
        low=0.001,
        high=0.9,
        unit="share",
        help="Scanned tokens, those in the densest surroundings, inside clusters",
    )
    n_probe: int = param(10, low=1, high=10000, unit="tokens", help="Tokens that are probed in each cluster")
    seed: int = param(0, low=0, high=2**31 - 1, help="Seed of what is drawn and probed")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "exhaustive": {"n_suspects": 1000, "n_random": 10000000},
        "published": {"n_suspects": 1000, "n_random": 10000000, "competence": 0.0},
    }


@register
class GlitchTokens(Analysis):
    """Which tokens can the model not repeat, spell or measure, and how many of them do cheaper searches find?

    Question:
        Some tokens make a model write something else, whatever the prompt. Which are they, how many are there in the
        vocabulary, and would a look at the embeddings have found them without testing each?

    Method:
        Scan: the tokens that look most under-trained by their weights, and others drawn at random (all others in the
        preset `exhaustive`), each by id in up to three tasks after a few examples: repeat it, spell it with hyphens,
        count its letters (words of two letters or more). A task is passed if the greedy continuation is the right
        answer; a token is repeated also by its text in other tokens, whatever the case and the space around it. It is a
        glitch token if it fails any task that counts; a task counts if enough
        randomly drawn tokens pass it, or else its failures tell of the model, not of tokens, and suspects are not asked.
        In the preset `published`
        each task counts.
        Clusters: embedding rows of the scanned tokens, by DBSCAN with a radius that suits the densest; a few tokens of each cluster are probed, and
        clusters whose share surely exceeds that of random tokens (exact binomial bound) are flagged whole. Recall is
        the share of the scan's glitch tokens that flagged clusters hold; in the same way for the suspects.

    Null:
        Tokens drawn at random, in the same tasks; for a search, the share of scanned tokens that it returns.

    Known failure modes:
        Clusters are those among scanned tokens; they differ from those of the whole vocabulary unless it is scanned.
        A word spelt rightly in other tokens than the tokenizer's counts as failed. A task that 60 % of random tokens pass
        counts, and every failure in it makes a glitch token: read the share of random tokens that fail beside it. The
        rule of competence, few examples and their wording are ours; the paper's prompts were not checked. The
        paper clusters with Leiden on a graph of neighbours, and keeps a cluster in which any probed token fails.
        Mining by the gradient of the entropy (arXiv 2410.15052) is not offered: it needs the gradient of a next-token
        entropy with respect to the input embedding.

    References:
        Li et al. 2024, Glitch Tokens in Large Language Models (GlitchHunter), arXiv 2404.09894.
        Clopper and Pearson 1934, The use of confidence or fiducial limits illustrated in the case of the binomial.
    """

    name, title = "glitch-tokens", "Glitch tokens"
    reads_texts = False
    Params = GlitchParams
    measures = {
        "scanned": Measure(("vocab",), "1", "1 for suspects, 2 for tokens drawn at random from all others, 0 if not scanned"),
        "passed": Measure(("case", "vocab"), "1", "1 if the greedy continuation is the right answer, 0 if not, by task; NaN if not asked"),
        "prob": Measure(("case", "vocab"), "share", "probability of the right answer, of all its tokens together, by task; NaN if not asked"),
        "instead": Measure(("case", "vocab"), "1", "id of the first token written in place of the right one; -1 if none was"),
        "competence": Measure(("case",), "share", "randomly drawn tokens that pass the task; NaN if it was asked of none"),
        "counts": Measure(("case",), "1", "1 for tasks that count"),
        "glitch": Measure(("vocab",), "1", "1 for tokens that fail a task that counts, 0 for others; NaN if none of these was asked"),
        "indicator": Measure(("vocab",), "1", "what ranks suspects; small is suspicious; NaN where there is no token"),
        "indicator_name": Measure((), "1", "its name"),
        "n_ordinary": Measure((), "tokens", "tokens that could have been scanned: ordinary ones, the reference left out"),
        "cluster": Measure(("vocab",), "1", "cluster of a scanned token; -1 for none, -2 if not scanned"),
        "probed": Measure(("vocab",), "1", "1 for tokens that were probed for their cluster"),
        "flagged": Measure(("vocab",), "1", "1 for scanned tokens in flagged clusters"),
        "shown": Measure(("vocab",), "1", "what the token shows as"),
    }  # fmt: skip

    def passes(self, params: Any, info: ModelInfo, batch: Batch) -> int:
        """One for 256 tokens and task, at most."""
        n = min(params.n_suspects + params.n_random, info.d_vocab)
        return 1 + 2 * passes_of(n, len(_tasks(params)))

    def flow(self, params: Any, info: ModelInfo) -> Flow:
        """Vocabulary and weights, then the tasks; clusters need no further look."""
        tasks = _tasks(params)
        table: VocabularyTable = yield Vocabulary()
        weights = yield Weights()
        kinds = categories(table)
        reference = reference_from(params.reference, table, kinds, weights.unembedding)
        values = indicators(weights, reference)
        name = chosen(params.indicator, values)
        ordinary = kinds == OK
        ordinary[reference.ids] = False
        scanned = _scanned(values[name], ordinary, params)
        tokens = np.flatnonzero(scanned)
        found = {v: np.full((len(tasks), len(table)), np.nan) for v in ("passed", "prob")}
        found["instead"] = np.full((len(tasks), len(table)), -1)
        for i, task in enumerate(tasks):
            for group in (_DRAWN, _SUSPECT):  # suspects are asked what counts, which drawn ones tell
                some = np.flatnonzero(scanned == group)
                if group == _SUSPECT and not _judged(found["passed"], scanned, params.competence)[1][i]:
                    continue
                asked = yield from questions(task, table, kinds, some.tolist())
                verdicts = yield from answered(task, asked, table)
                for variable, array in found.items():
                    array[i, some] = getattr(verdicts, variable)
        competence, counts, glitch = _judged(found["passed"], scanned, params.competence)
        labels = clusters(weights.embedding[tokens], params.min_cluster, params.density)
        bad = np.nan_to_num(glitch[tokens]) > 0
        probed = probe(labels, bad, _share(glitch[scanned == _DRAWN]), n=params.n_probe, seed=params.seed)
        exists = np.array([bool(p) for p in table.pieces])
        own = {v: np.zeros(len(table)) for v in ("probed", "flagged")}
        own["probed"][tokens], own["flagged"][tokens] = probed.probed, probed.flagged
        cluster = np.full(len(table), -2)
        cluster[tokens] = labels
        return xr.Dataset(
            {
                "scanned": ("vocab", scanned),
                **{v: (("case", "vocab"), array) for v, array in found.items()},
                "competence": ("case", competence),
                "counts": ("case", counts.astype(float)),
                "glitch": ("vocab", glitch),
                "indicator": ("vocab", np.where(exists, values[name], np.nan)),
                "indicator_name": ((), name),
                "n_ordinary": ((), int(ordinary.sum())),
                "cluster": ("vocab", cluster),
                **{v: ("vocab", array) for v, array in own.items()},
                "shown": ("vocab", np.array(table.shown, dtype=object)),
            },
            coords={"case": np.array(tasks, dtype=object), "vocab": np.arange(len(table))},
        )

    def findings(self, result: Result) -> list[Finding]:
        """Suspects against random tokens, what to strip, what the two searches find, and which tasks count."""
        data = result.dataset
        if not data["counts"].values.any():
            return [_incompetent(result)]
        return [*_suspects(result), _prevalence(result), _strings(result), _by_clusters(result), *_by_indicator(result)]

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Tasks, the indicator against repetition, and clusters."""
        return _drawn(result)


def _tasks(params: Any) -> list[str]:
    names = [t.strip() for t in params.tasks.split(",") if t.strip()]
    if not names or set(names) - set(TASKS):
        raise InputError(f"tasks are some of {', '.join(TASKS)}, separated by commas; found {params.tasks!r}.")
    return [t for t in TASKS if t in names]


def _scanned(ranked: np.ndarray, ordinary: np.ndarray, params: Any) -> np.ndarray:
    """Which tokens are scanned, and as what; axis vocab."""
    order = np.argsort(np.where(ordinary, ranked, np.inf), kind="stable")[: int(ordinary.sum())]
    scanned = np.zeros(len(ranked), dtype=np.int64)
    scanned[order[: params.n_suspects]] = _SUSPECT
    rng = np.random.default_rng(params.seed)
    scanned[rng.permutation(order[params.n_suspects :])[: params.n_random]] = _DRAWN
    return scanned


def _judged(passed: np.ndarray, scanned: np.ndarray, competence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of random tokens that pass each task, whether it counts, and who fails one that does."""
    drawn = passed[:, scanned == _DRAWN]
    asked = np.isfinite(drawn)
    share = np.where(asked.any(axis=1), np.nansum(drawn, axis=1) / np.maximum(asked.sum(axis=1), 1), np.nan)
    counts = np.isfinite(share) & (share >= competence)
    judged = passed[counts]
    known = np.isfinite(judged).any(axis=0)
    return share, counts, np.where(known, (judged == 0).any(axis=0), np.nan)


def _share(glitch: np.ndarray) -> float:
    known = glitch[np.isfinite(glitch)]
    return float(known.mean()) if known.size else 0.0


def _split(result: Result) -> tuple[int, int, int, int]:
    """Glitch tokens and all tokens among suspects, and among those drawn."""
    glitch, scanned = result["glitch"].values, result["scanned"].values
    known = np.isfinite(glitch)
    some = [known & (scanned == group) for group in (_SUSPECT, _DRAWN)]
    (k, n), (k0, n0) = ((int(glitch[m].sum()), int(m.sum())) for m in some)
    return k, n, k0, n0


def _counting(result: Result) -> str:
    data = result.dataset
    return ", ".join(str(t) for t, c in zip(data["case"].values, data["counts"].values, strict=True) if c)


def _suspects(result: Result) -> list[Finding]:
    k, n, k0, n0 = _split(result)
    if not n:
        return []
    return [
        Finding(
            f"{k} of the {n} tokens that look most under-trained fail a task ({_counting(result)}), and {k0} of {n0} drawn "
            "from the others.",
            k / n, "share of tokens", k0 / n0 if n0 else 0.0, "tokens drawn at random", wilson(k, n), n, "tokens",
        )
    ]  # fmt: skip


def _rest(result: Result) -> tuple[float, tuple[float, float] | None, int]:
    """Glitch tokens among all that are no suspects: estimate, interval (None if all were scanned), and how many there are."""
    _, _, k0, n0 = _split(result)
    rest = int(result["n_ordinary"]) - int((result["scanned"].values == _SUSPECT).sum())
    if n0 >= rest or not n0:
        return float(k0), None, rest
    low, high = wilson(k0, n0)
    return rest * k0 / n0, (rest * low, rest * high), rest


def _prevalence(result: Result) -> Finding:
    k, n, _, n0 = _split(result)
    value, ends, rest = _rest(result)
    total = rest + n
    ci = None if ends is None else ((k + ends[0]) / total, (k + ends[1]) / total)
    about, how = ("", "were found in") if ends is None else ("About ", "are estimated for")
    return Finding(
        f"{about}{k + value:,.0f} glitch tokens {how} the {total:,} ordinary tokens of the vocabulary.",
        (k + value) / total, "share of tokens", 0.0, "a model that handles every token", ci,
        *((1, "vocabulary") if ci is None else (n + n0, "tokens")),
    )  # fmt: skip


def _strings(result: Result) -> Finding:
    """Those that fail, the suspicious ones first."""
    bad = np.flatnonzero(result["glitch"].values == 1)
    bad = bad[np.argsort(result["indicator"].values[bad], kind="stable")]
    listed = ", ".join(f"{plots.visible(str(result['shown'].values[i]))!r} ({i})" for i in bad[:_LISTED]) or "none"
    more = f" and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
    _, _, k0, n0 = _split(result)
    if n0 and k0 / n0 > _MANY:
        advice = f"{k0 / n0:.0%} of random tokens fail, too, so that failing alone is no reason to keep a string out"
    else:
        advice = "keep these strings out of input and output"
    return Finding(
        f"Glitch tokens that were found, most under-trained first: {listed}{more}; {advice}.",
        float(len(bad)), "tokens", 0.0, "a model that handles every token", None, 1, "vocabulary",
        {"ids": ", ".join(map(str, bad[:40].tolist()))},
    )  # fmt: skip


def _by_clusters(result: Result) -> Finding:
    glitch, flagged = result["glitch"].values, result["flagged"].values > 0
    known = np.isfinite(glitch)
    k, n = int(glitch[known & flagged].sum()), int(glitch[known].sum())
    returned = int((known & flagged).sum())
    probed = int(result["probed"].values.sum())
    labels = result["cluster"].values
    names = np.unique(labels[flagged])
    return Finding(
        f"Clustering flags {len(names)} of {int(labels.max(initial=-1)) + 1} clusters with {returned} tokens after probing "
        f"{probed} of {int(known.sum())}; they hold {k} of the {n} glitch tokens of the scan.",
        k / n if n else 0.0, "share of glitch tokens", returned / max(int(known.sum()), 1),
        "as many scanned tokens at random", wilson(k, n) if n else None, max(n, 1), "glitch tokens",
    )  # fmt: skip


def _by_indicator(result: Result) -> list[Finding]:
    k, n, _, _ = _split(result)
    value, ends, rest = _rest(result)
    if not n or not k + value:
        return []
    ci = None if ends is None else (k / (k + ends[1]), k / (k + ends[0]))
    n_drawn = int((result["scanned"].values == _DRAWN).sum())
    return [
        Finding(
            f"The {n} most suspicious tokens by {result['indicator_name'].item()} hold {k} of "
            f"{'' if ends is None else 'about '}{k + value:,.0f} glitch tokens of the vocabulary.",
            k / (k + value), "share of glitch tokens", n / (n + rest), "as many ordinary tokens at random", ci,
            *((1, "vocabulary") if ci is None else (n + n_drawn, "tokens")),
        )
    ]  # fmt: skip


def _incompetent(result: Result) -> Finding:
    data, least = result.dataset, result.params.as_dict()["competence"]
    said = ", ".join(f"{t} {s:.0%}" for t, s in zip(data["case"].values, data["competence"].values, strict=True))
    n = int((data["scanned"].values == _DRAWN).sum())
    best = float(np.nan_to_num(data["competence"].values).max())
    return Finding(
        f"No task counts, so that no token is judged: random tokens pass {said}; expected at least {least:.0%}.",
        best, "share of tokens", least, "the least competence", wilson(round(best * n), n), n, "tokens",
    )  # fmt: skip


def _drawn(result: Result) -> dict[str, plots.Drawing]:
    data = result.dataset
    scanned, passed = data["scanned"].values, data["passed"].values
    about = str(result.provenance.get("model", {}).get("name", ""))
    groups = {"suspects": scanned == _SUSPECT, "random": scanned == _DRAWN}
    rates: dict[str, float] = {}
    ends: dict[str, tuple[float, float]] = {}
    for i, task in enumerate(data["case"].values):
        for group, mask in groups.items():
            some = passed[i, mask]
            some = some[np.isfinite(some)]
            if some.size:
                label = f"{task}, {group}{'' if data['counts'].values[i] else ' (does not count)'}"
                rates[label], ends[label] = float(some.mean()), wilson(int(some.sum()), some.size)
    drawn: dict[str, plots.Drawing] = {
        "tasks": plots.bars(
            rates, title="How many tokens pass each task", unit="share", quantity="passed", by="task and tokens",
            intervals=ends, caption=f"{about}. Wilson 95 % intervals; suspects look most under-trained by their weights.",
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
            hover={g: [_note(result, int(i)) for i in np.flatnonzero(m)] for g, m in groups.items() if m.any()},
            alt="Scatter of the indicator against the probability of repeating the token.",
        )  # fmt: skip
    return drawn | _cluster_drawing(result, about)


def _note(result: Result, token: int) -> str:
    """The token and what the model would write in its place."""
    shown = result["shown"].values
    other = int(result["instead"].sel(case="repetition").values[token])
    instead = f", the model writes {plots.visible(str(shown[other]))}" if other >= 0 else ""
    return f"{plots.visible(str(shown[token]))} [{token}]{instead}"


def _cluster_drawing(result: Result, about: str) -> dict[str, plots.Drawing]:
    data = result.dataset
    labels, glitch, probed = (data[v].values for v in ("cluster", "glitch", "probed"))
    n_clusters = int(labels.max(initial=-1)) + 1
    rows: dict[str, float] = {}
    ends: dict[str, tuple[float, float]] = {}
    for c in range(n_clusters):
        inside = (labels == c) & (probed > 0)
        k, n = int(np.nansum(glitch[inside])), int(inside.sum())
        size = int((labels == c).sum())
        example = plots.visible(str(data["shown"].values[np.flatnonzero(inside)[0]]))
        label = f"cluster {c + 1}, {size} tokens such as {example}"
        rows[label], ends[label] = k / n, (lower_bound(k, n, 0.05 / n_clusters), k / n)
    ranked = sorted(rows, key=lambda label: -ends[label][0])[:15]
    if not ranked or not data["counts"].values.any():
        return {}
    expected = _share(glitch[data["scanned"].values == _DRAWN])
    return {
        "clusters": plots.bars(
            {label: rows[label] for label in ranked}, title="Glitch tokens among the probed tokens of each cluster",
            unit="share", quantity="glitch tokens", by="cluster", intervals={label: ends[label] for label in ranked},
            reference=(expected, "random tokens"),
            caption=f"{about}. Exact one-sided lower bounds at 5 %, divided by the clusters ({n_clusters}); flagged if above the line.",
            alt="Bars of the share of glitch tokens among probed tokens, by cluster.",
        )
    }  # fmt: skip

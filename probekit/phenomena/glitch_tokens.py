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
from probekit.methods.glitch import (
    DRAWN,
    SUSPECT,
    TASKS,
    answered,
    clusters,
    judged,
    lower_bound,
    passes_of,
    probe,
    questions,
    scanned_as,
    share_of,
)
from probekit.methods.mining import Budget, mining_passes, searched
from probekit.methods.token_categories import OK, categories
from probekit.methods.undertrained import INDICATORS, chosen, indicators, reference_from
from probekit.sampling.glitch_report import mining_drawings, mining_findings, model_name, task_drawings
from probekit.stats import wilson

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
        "auto",
        choices=("auto", *INDICATORS),
        help="What ranks suspects; auto: input norm if embeddings are untied, or cosine",
    )
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
    n_mining: int = param(
        10, low=0, high=100000, unit="steps", help="Steps of mining along the gradient of the entropy; 0 for none"
    )
    n_near: int = param(32, low=1, high=100000, unit="tokens", help="Nearest tokens that a step of mining chooses from")
    n_tried: int = param(8, low=1, high=10000, unit="tokens", help="Tokens that a step of mining evaluates")
    seed: int = param(0, low=0, high=2**31 - 1, help="Seed of what is drawn and probed")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "exhaustive": {"n_suspects": 1000, "n_random": 10000000, "n_mining": 125},
        "published": {"n_suspects": 1000, "n_random": 10000000, "competence": 0.0, "n_mining": 125},
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
        glitch token if it fails any task that counts. A task counts if enough randomly drawn tokens pass it, or else
        its failures tell of the model, not of tokens, and suspects are not asked. In the preset `published` each does.
        Clusters: embedding rows of the scanned tokens, by DBSCAN with a radius that suits the densest; a few tokens of
        each cluster are probed, and clusters whose share surely exceeds that of random tokens (exact binomial bound)
        are flagged whole. Recall is the share of the scan's glitch tokens that flagged clusters hold; in the same way
        for the suspects.
        Mining: a walk from the shortest embedding row. H is the entropy of what follows the prompt of repetition, in
        nats, and g its gradient with respect to the token's embedding. Of the 32 nearest tokens (rows of length 1), the
        8 with the largest H + (e_i - e) · g are evaluated, once each: one is not repeated if another token is likelier
        there. The one of highest entropy comes next. The strict check puts those that are not repeated into three more
        prompts; a token fails it if it is the likeliest in none. Recall is the share of the scan's glitch tokens that
        the walk evaluated, and its share of all that are not repeated, as tokens drawn at random tell their number.

    Null:
        Tokens drawn at random, in the same tasks; for a search, the share of scanned tokens that it returns. For
        mining, as many tokens drawn at random, and a walk of the same rules that draws from the nearest tokens.

    Known failure modes:
        Clusters are those among scanned tokens; they differ from those of the whole vocabulary unless it is scanned.
        So does recall, which counts what was scanned. Mining visits neighbourhoods and misses most of the rest: on
        Llama-3.2-1B-Instruct a full scan found 4,954 tokens and mining 516 (richards.ai, 2026). Entropy is high, too,
        after parts of words, which a model would rather complete: much of what mining finds may be well trained. Its
        intervals are those of tokens in one walk, which are no independent draws; text in other tokens is not accepted.
        A word spelt rightly in other tokens than the tokenizer's counts as failed. A task that 60 % of random tokens
        pass counts, and every failure in it makes a glitch token: read the share of random tokens that fail beside it.
        The rule of competence, few examples and their wording are ours; GlitchHunter's prompts were not checked. It
        clusters with Leiden on a graph of neighbours, and keeps a cluster in which any probed token fails. GlitchMiner
        takes distances from the unembedding, which agrees with its gradient only where embeddings are tied; here both
        are the embedding's. Its prompts have no examples.

    References:
        Li et al. 2024, Glitch Tokens in Large Language Models (GlitchHunter), arXiv 2404.09894.
        Wu et al. 2024, Mining Glitch Tokens in Large Language Models via Gradient-based Discrete Optimization
        (GlitchMiner), arXiv 2410.15052, and its released code.
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
        "mined": Measure(("vocab",), "steps", "step in which mining evaluated the token, 0 for the start; NaN if it did not"),
        "walked": Measure(("vocab",), "steps", "the same of the walk without the gradient; NaN if it did not"),
        "drawn": Measure(("vocab",), "steps", "the same of tokens drawn at random, as many in each step; NaN if not drawn"),
        "entropy_nats": Measure(("vocab",), "nats", "entropy of the next-token distribution where the token should be repeated; NaN where no search looked"),
        "estimated_nats": Measure(("vocab",), "nats", "the same to first order, by the gradient at the token before; NaN where mining did not look"),
        "wrote": Measure(("vocab",), "1", "id of the likeliest token there; -1 where no search looked"),
        "strict": Measure(("vocab",), "1", "1 if three more prompts fail, too, 0 if one does not; NaN for tokens that are repeated, or where no search looked"),
        "shown": Measure(("vocab",), "1", "what the token shows as"),
    }  # fmt: skip

    def passes(self, params: Any, info: ModelInfo, batch: Batch) -> int:
        """One for 256 tokens and task, two for a step of mining, at most."""
        n = min(params.n_suspects + params.n_random, info.d_vocab)
        return 1 + 2 * passes_of(n, len(_tasks(params))) + mining_passes(_budget(params))

    def flow(self, params: Any, info: ModelInfo) -> Flow:
        """Vocabulary and weights, mining (a model without gradients is refused first), then the tasks."""
        tasks = _tasks(params)
        table: VocabularyTable = yield Vocabulary()
        weights = yield Weights()
        kinds = categories(table)
        reference = reference_from(params.reference, table, kinds, weights.unembedding)
        values = indicators(weights, reference)
        name = chosen(params.indicator, values)
        ordinary = kinds == OK
        ordinary[reference.ids] = False
        how = {v: getattr(params, v) for v in ("n_suspects", "n_random", "seed")}
        scanned = scanned_as(values[name], ordinary, **how)
        mining = yield from searched(table, kinds, weights.embedding, ordinary, _budget(params))
        tokens = np.flatnonzero(scanned)
        found = {v: np.full((len(tasks), len(table)), np.nan) for v in ("passed", "prob")}
        found["instead"] = np.full((len(tasks), len(table)), -1)
        for i, task in enumerate(tasks):
            for group in (DRAWN, SUSPECT):  # suspects are asked what counts, which drawn ones tell
                some = np.flatnonzero(scanned == group)
                if group == SUSPECT and not judged(found["passed"], scanned, params.competence)[1][i]:
                    continue
                asked = yield from questions(task, table, kinds, some.tolist())
                verdicts = yield from answered(task, asked, table)
                for variable, array in found.items():
                    array[i, some] = getattr(verdicts, variable)
        competence, counts, glitch = judged(found["passed"], scanned, params.competence)
        labels = clusters(weights.embedding[tokens], params.min_cluster, params.density)
        bad = np.nan_to_num(glitch[tokens]) > 0
        probed = probe(labels, bad, share_of(glitch[scanned == DRAWN]), n=params.n_probe, seed=params.seed)
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
                **{v: ("vocab", array) for v, array in (own | mining).items()},
                "shown": ("vocab", np.array(table.shown, dtype=object)),
            },
            coords={"case": np.array(tasks, dtype=object), "vocab": np.arange(len(table))},
        )

    def findings(self, result: Result) -> list[Finding]:
        """Suspects against random tokens, what to strip, what the searches find, and which tasks count."""
        data = result.dataset
        if not data["counts"].values.any():
            return [_incompetent(result)]
        searches = [_by_clusters(result), *_by_indicator(result), *mining_findings(result)]
        return [*_suspects(result), _prevalence(result), _strings(result), *searches]

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """Tasks, the indicator against repetition, clusters, and mining."""
        groups = {"suspects": result["scanned"].values == SUSPECT, "random": result["scanned"].values == DRAWN}
        return task_drawings(result, groups) | _cluster_drawing(result) | mining_drawings(result)


def _tasks(params: Any) -> list[str]:
    names = [t.strip() for t in params.tasks.split(",") if t.strip()]
    if not names or set(names) - set(TASKS):
        raise InputError(f"tasks are some of {', '.join(TASKS)}, separated by commas; found {params.tasks!r}.")
    return [t for t in TASKS if t in names]


def _budget(params: Any) -> Budget:
    return Budget(params.n_mining, near=params.n_near, tried=params.n_tried, seed=params.seed)


def _split(result: Result) -> tuple[int, int, int, int]:
    """Glitch tokens and all tokens among suspects, and among those drawn."""
    glitch, scanned = result["glitch"].values, result["scanned"].values
    known = np.isfinite(glitch)
    some = [known & (scanned == group) for group in (SUSPECT, DRAWN)]
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
            f"{k} of the {n} tokens that look most under-trained fail a task ({_counting(result)}), and {k0} of {n0} "
            "drawn from the others.",
            k / n, "share of tokens", k0 / n0 if n0 else 0.0, "tokens drawn at random", wilson(k, n), n, "tokens",
            quantity="most suspicious tokens that fail a task",
        )
    ]  # fmt: skip


def _rest(result: Result) -> tuple[float, tuple[float, float] | None, int]:
    """Glitch tokens among all that are no suspects: estimate, interval (None if all were scanned), how many there are."""
    _, _, k0, n0 = _split(result)
    rest = int(result["n_ordinary"]) - int((result["scanned"].values == SUSPECT).sum())
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
        *((1, "vocabulary") if ci is None else (n + n0, "tokens")), quantity="glitch tokens among ordinary tokens",
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
        {"ids": ", ".join(map(str, bad[:40].tolist()))}, quantity="glitch tokens that were found",
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
        f"Clustering flags {len(names)} of {int(labels.max(initial=-1)) + 1} clusters with {returned} tokens after "
        f"probing {probed} of {int(known.sum())}; they hold {k} of the {n} glitch tokens of the scan.",
        k / n if n else 0.0, "share of glitch tokens", returned / max(int(known.sum()), 1),
        "as many scanned tokens at random", wilson(k, n) if n else None, max(n, 1), "glitch tokens",
        quantity="glitch tokens in flagged clusters" + ("" if n else " (not measurable)"),
    )  # fmt: skip


def _by_indicator(result: Result) -> list[Finding]:
    k, n, _, _ = _split(result)
    value, ends, rest = _rest(result)
    if not n or not k + value:
        return []
    ci = None if ends is None else (k / (k + ends[1]), k / (k + ends[0]))
    n_drawn = int((result["scanned"].values == DRAWN).sum())
    return [
        Finding(
            f"The {n} most suspicious tokens by {result['indicator_name'].item()} hold {k} of "
            f"{'' if ends is None else 'about '}{k + value:,.0f} glitch tokens of the vocabulary.",
            k / (k + value), "share of glitch tokens", n / (n + rest), "as many ordinary tokens at random", ci,
            *((1, "vocabulary") if ci is None else (n + n_drawn, "tokens")),
            quantity="glitch tokens among the most suspicious",
        )
    ]  # fmt: skip


def _incompetent(result: Result) -> Finding:
    data, least = result.dataset, result.params.as_dict()["competence"]
    said = ", ".join(f"{t} {s:.0%}" for t, s in zip(data["case"].values, data["competence"].values, strict=True))
    n = int((data["scanned"].values == DRAWN).sum())
    best = float(np.nan_to_num(data["competence"].values).max())
    return Finding(
        f"No task counts, so that no token is judged: random tokens pass {said}; expected at least {least:.0%}.",
        best, "share of tokens", least, "the least competence", wilson(round(best * n), n), n, "tokens",
        quantity="random tokens that pass the best task",
    )  # fmt: skip


def _cluster_drawing(result: Result) -> dict[str, plots.Drawing]:
    data = result.dataset
    about = model_name(result)
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
    expected = share_of(glitch[data["scanned"].values == DRAWN])
    return {
        "clusters": plots.bars(
            {label: rows[label] for label in ranked}, title="Glitch tokens among the probed tokens of each cluster",
            unit="share", quantity="glitch tokens", by="cluster", intervals={label: ends[label] for label in ranked},
            reference=(expected, "random tokens"),
            caption=f"{about}. Exact one-sided lower bounds at 5 %, divided by the clusters ({n_clusters}); flagged if "
            "above the line.",
            alt="Bars of the share of glitch tokens among probed tokens, by cluster.",
        )
    }  # fmt: skip

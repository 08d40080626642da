"""Under-trained tokens: which tokens the model has hardly ever seen, by its weights, and which it cannot write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from probekit import plots
from probekit.analysis import Analysis, Finding, Flow, Measure, Params, Result, param, register
from probekit.core import Batch, ModelInfo, Vocabulary, VocabularyTable, Weights
from probekit.methods.repeating import FAMILIES, prompts, written
from probekit.methods.token_categories import CATEGORIES, OK, SPECIAL, UNDECODABLE, categories
from probekit.methods.undertrained import INDICATORS, chosen, indicators, reference_from
from probekit.stats import wilson

_TESTED, _CONTROL = 1, 2
_SHOWN = 25
_BINS = 60


@dataclass(frozen=True)
class UndertrainedParams(Params):
    """Parameters of undertrained-tokens."""

    indicator: str = param(
        "auto",
        choices=("auto", *INDICATORS),
        help="What ranks tokens; auto: input norm if embeddings are untied, or cosine",
    )
    reference: str = param(
        "", help="Ids of tokens known to be untrained, separated by commas; found by itself if empty"
    )
    share: float = param(
        0.02, low=0.0001, high=0.5, unit="share", help="Share of the ordinary tokens that are candidates"
    )
    n_verify: int = param(
        24, low=0, high=1000000, unit="tokens", help="Candidates that the model is asked to write, from the top"
    )
    n_controls: int = param(
        12, low=0, high=100000, unit="tokens", help="Ordinary tokens that are no candidates, asked in the same way"
    )
    steps: int = param(3, low=1, high=20, unit="tokens", help="Greedy steps within which the token may be written")
    trials: int = param(
        6, low=1, high=100, unit="examples", help="Examples in the prompt of the repeating device; the paper has 20"
    )
    threshold: float = param(
        0.01, low=1e-6, high=0.5, unit="share", help="Largest probability of a token that counts as not written"
    )
    seed: int = param(0, low=0, high=2**31 - 1, help="Seed of the choice of controls")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {"share": 0.02, "n_verify": 1000000, "steps": 3, "trials": 20, "threshold": 0.01}
    }


@register
class UndertrainedTokens(Analysis):
    """Which tokens has the model hardly ever seen, and which can it not write when nothing else could follow?

    Question:
        Tokenizers and models are trained on different texts, so that a vocabulary may hold tokens that the model never
        learnt. Which are they, by their weights, and does the model's behaviour agree?

    Method:
        Weights: the distance of each token's unembedding row from the mean row of tokens that were never trained (the
        reference, found by itself or given): 1 - cosine for tied embeddings; the norm of the embedding row for untied
        ones, where weight decay shrinks what is never read. Candidates are the ordinary tokens up to the 2nd percentile.
        Behaviour: each candidate is put, by id, into three prompts to which it is the answer (a device that repeats its
        input, a question about a phrase, the token 50 times); its largest probability over the prompts and three greedy
        steps tells whether the model can write it. Below 1 % it counts as under-trained.
        Categories: a token is ordinary if its text encodes to it again; others no text can bring about.

    Null:
        Ordinary tokens that are no candidates, drawn at random and asked in the same way.

    Known failure modes:
        Tokens of the reference are near their own mean by construction, and are not counted. Quantised weights blur
        distances. Norms of tied embeddings say little. A token that begins common words may be written rarely though it
        is trained. Probabilities below 1e-4 are not ordered. Prompts are in English, their wording is ours.

    References:
        Land and Bartolo 2024, Fishing for Magikarp, arXiv 2405.05417, sections 3 and 4, and its released code.
    """

    name, title = "undertrained-tokens", "Under-trained tokens"
    reads_texts = False
    Params = UndertrainedParams
    measures = {
        "indicator": Measure(("case", "vocab"), "1", "what weights say, by indicator; small is suspicious, NaN where there is no token"),
        "chosen": Measure((), "1", "place on the case axis of the indicator that ranks"),
        "category": Measure(("vocab",), "1", "what becomes of the token's text: 0 ok, 1 ok and special, 2 unreachable and looks special, 3 undecodable, 4 unreachable (another token), 5 unreachable (several tokens), 6 no token"),
        "reference": Measure(("vocab",), "1", "1 for tokens of the reference"),
        "reference_why": Measure((), "1", "what makes them the reference"),
        "reference_cosine": Measure((), "1", "median cosine of the reference's unembedding rows with their mean; the reference is one place if it is near 1"),
        "candidate": Measure(("vocab",), "1", "1 for ordinary tokens up to the percentile, the reference left out"),
        "cut": Measure((), "1", "value of the indicator up to which tokens are candidates"),
        "asked": Measure(("vocab",), "1", "1 for candidates that the model was asked to write, 2 for controls"),
        "written": Measure(("rank", "vocab"), "share", "largest probability within the steps, by prompt (repeats its input, explains a phrase, goes on repeating); NaN where not asked"),
        "shown": Measure(("vocab",), "1", "what the token shows as"),
        "count": Measure(("bin",), "tokens", "ordinary tokens, the reference left out, by the indicator that ranks"),
    }  # fmt: skip

    def passes(self, params: Any, info: ModelInfo, batch: Batch) -> int:
        """One per greedy step; none where nothing is verified."""
        return 1 + params.steps * self.runs_model(params)

    def runs_model(self, params: Any) -> bool:
        """Not where nothing is verified: the weights are then read off their files."""
        return bool(params.n_verify or params.n_controls)

    def flow(self, params: Any, info: ModelInfo) -> Flow:
        """Vocabulary and weights, then prompts about the candidates."""
        table: VocabularyTable = yield Vocabulary()
        weights = yield Weights()
        kinds = categories(table)
        reference = reference_from(params.reference, table, kinds, weights.unembedding)
        values = indicators(weights, reference)
        name = chosen(params.indicator, values)
        ranked = values[name]
        ordinary = np.isin(kinds, (OK, SPECIAL))
        ordinary[reference.ids] = False
        cut = float(np.quantile(ranked[ordinary & (kinds == OK)], params.share))
        candidate = ordinary & (ranked <= cut)
        asked = _asked(ranked, candidate, ordinary & (kinds == OK), params)
        prob = np.full((len(FAMILIES), len(table)), np.nan)
        tokens = np.flatnonzero(asked)
        if tokens.size:
            made = yield from prompts(table, kinds, params.trials)
            prob[:, tokens] = (yield from written(made, tokens.tolist(), params.steps)).T
        exists = np.array([bool(p) for p in table.pieces])
        counts, edges = np.histogram(ranked[ordinary], bins=_BINS)
        is_reference = np.zeros(len(table))
        is_reference[reference.ids] = 1
        return xr.Dataset(
            {
                "indicator": (("case", "vocab"), np.stack([np.where(exists, v, np.nan) for v in values.values()])),
                "chosen": ((), list(values).index(name)),
                "category": ("vocab", np.array([CATEGORIES.index(k) for k in kinds])),
                "reference": ("vocab", is_reference),
                "reference_why": ((), f"{len(reference.ids)} {reference.why}"),
                "reference_cosine": ((), reference.spread),
                "candidate": ("vocab", candidate.astype(float)),
                "cut": ((), cut),
                "asked": ("vocab", asked),
                "written": (("rank", "vocab"), prob),
                "shown": ("vocab", np.array(table.shown, dtype=object)),
                "count": ("bin", counts),
            },
            coords={"bin": (edges[:-1] + edges[1:]) / 2}
            | {"case": np.array(list(values), dtype=object), "vocab": np.arange(len(table))},
        )

    def findings(self, result: Result) -> list[Finding]:
        """How many candidates the model cannot write, the tokens to strip, whether weights foretell it, categories."""
        return [*_behaviour(result), _strings(result), _reachable(result)]

    def draw(self, result: Result) -> dict[str, plots.Drawing]:
        """The indicator over the vocabulary, against what the model writes, and the tokens at its end."""
        data = result.dataset
        name = str(data["case"].values[int(data["chosen"])])
        ranked = data["indicator"].values[int(data["chosen"])]
        ordinary = np.isin(data["category"].values, (0, 1)) & (data["reference"].values == 0)
        top = [int(i) for i in np.argsort(np.where(ordinary, ranked, np.inf), kind="stable")[:_SHOWN]]
        about = (
            f"{result.provenance.get('model', {}).get('name', '')}. Reference: {data['reference_why'].item()} "
            f"(median cosine with their mean {float(data['reference_cosine']):.2f})."
        )
        drawn: dict[str, plots.Drawing] = {
            "top": plots.bars(
                {_label(result, i): float(ranked[i]) for i in top},
                title="Tokens that lie nearest to never-trained ones", unit="1", quantity=name, by="token",
                caption=f"{about} Ordinary tokens, the reference left out; {_of_top(result, top)}.",
                alt="Bars of the indicator for the tokens nearest to the reference.",
            ),
            "histogram": plots.histogram(
                data["count"].values, _edges(data["bin"].values), unit="1", quantity=name,
                title="Where the vocabulary lies", caption=f"{about} Candidates lie up to {float(data['cut']):.3g}.",
                alt="Histogram of the indicator over ordinary tokens.",
            ),
        }  # fmt: skip
        return drawn | _behaviour_drawing(result, name, ranked, about)


def _edges(middles: np.ndarray) -> np.ndarray:
    half = (middles[1] - middles[0]) / 2
    return np.append(middles - half, middles[-1] + half)


def _asked(ranked: np.ndarray, candidate: np.ndarray, plain: np.ndarray, params: Any) -> np.ndarray:
    """Which tokens the model is asked to write, and as what."""
    order = np.argsort(np.where(candidate, ranked, np.inf), kind="stable")[: int(candidate.sum())]
    asked = np.zeros(len(ranked), dtype=np.int64)
    asked[order[: params.n_verify]] = _TESTED
    others = np.flatnonzero(plain & ~candidate)
    rng = np.random.default_rng(params.seed)
    asked[rng.permutation(others)[: params.n_controls]] = _CONTROL
    return asked


def _word(result: Result, token: int) -> str:
    return plots.visible(str(result["shown"].values[token]))


def _label(result: Result, token: int) -> str:
    best = _best(result)[token]
    said = "" if np.isnan(best) else f", written {best:.0%}" if best >= 0.01 else f", written {best:.0e}"
    return f"{_word(result, token)} [{token}{said}]"


def _best(result: Result) -> np.ndarray:
    """Largest probability of each token over prompts; NaN where it was not asked for; axis vocab."""
    values = result["written"].values
    return np.where(np.isnan(values).all(axis=0), np.nan, np.nan_to_num(values, nan=-1.0).max(axis=0))


def _of_top(result: Result, top: list[int]) -> str:
    best = _best(result)[top]
    known = best[np.isfinite(best)]
    low = int((known < result.params.as_dict()["threshold"]).sum())
    return (
        f"the model cannot write {low} of the {known.size} that it was asked for"
        if known.size
        else "none was asked for"
    )


def _behaviour(result: Result) -> list[Finding]:
    asked, best = result["asked"].values, _best(result)
    threshold = result.params.as_dict()["threshold"]
    tested, controls = best[asked == _TESTED], best[asked == _CONTROL]
    if not tested.size:
        return []
    k, n = int((tested < threshold).sum()), len(tested)
    null = float((controls < threshold).mean()) if controls.size else 0.0
    against = "ordinary tokens that are no candidates" if controls.size else "a model that can write every token"
    beside = f", and {int((controls < threshold).sum())} of {len(controls)} other tokens" if controls.size else ""
    return [
        Finding(
            f"The model cannot write {k} of the {n} strongest candidates (probability below {threshold:.0%} in every "
            f"prompt){beside}.",
            k / n, "share of candidates", null, against, wilson(k, n), n, "tokens",
            quantity="strongest candidates that the model cannot write",
        )
    ]  # fmt: skip


def _strings(result: Result) -> Finding:
    """The strings to keep out of a model's input."""
    asked, best, data = result["asked"].values, _best(result), result.dataset
    ranked = data["indicator"].values[int(data["chosen"])]
    threshold = result.params.as_dict()["threshold"]
    if (asked == _TESTED).any():
        bad = np.flatnonzero((asked == _TESTED) & (best < threshold))
        what, by = "Under-trained by weights and by behaviour; strip these from user input", "weights and behaviour"
    else:
        bad = np.flatnonzero(data["candidate"].values > 0)
        what, by = "Suspicious by weights alone (nothing was verified)", "weights alone"
    bad = bad[np.argsort(ranked[bad], kind="stable")]
    listed = ", ".join(f"{_word(result, int(i))!r} ({i})" for i in bad[:12]) or "none"
    more = f" and {len(bad) - 12} more" if len(bad) > 12 else ""
    return Finding(
        f"{what}: {listed}{more}.", float(len(bad)), "tokens", 0.0, "a vocabulary that was trained throughout", None, 1,
        "vocabulary", {"ids": ", ".join(map(str, bad[:40].tolist()))}, quantity=f"tokens that look under-trained by {by}",
    )  # fmt: skip


def _reachable(result: Result) -> Finding:
    """Tokens that are never read, whatever is written; pieces of characters are read beside others, and not among them."""
    kinds = result["category"].values
    counts = {name: int((kinds == i).sum()) for i, name in enumerate(CATEGORIES)}
    out = sum(n for name, n in counts.items() if name not in (OK, SPECIAL, UNDECODABLE))
    listed = ", ".join(f"{n:,} {name}" for name, n in counts.items() if n)
    return Finding(
        f"{out:,} of {len(kinds):,} ids are not what their own text encodes to ({listed}).", out / len(kinds),
        "share of ids", 0.0, "every token can be written", None, 1, "vocabulary",
        quantity="ids that their own text does not encode to",
    )  # fmt: skip


def _behaviour_drawing(result: Result, name: str, ranked: np.ndarray, about: str) -> dict[str, plots.Drawing]:
    asked, best = result["asked"].values, _best(result)
    if not (asked > 0).any():
        return {}
    groups = {"candidates": asked == _TESTED, "controls": asked == _CONTROL}
    return {
        "behaviour": plots.scatter(
            {g: (ranked[m], best[m]) for g, m in groups.items() if m.any()},
            title="What weights say against what the model writes", unit="1", x_quantity=name,
            y_quantity="probability of writing it", caption=f"{about} Largest probability over three prompts.",
            hover={g: [_word(result, int(i)) for i in np.flatnonzero(m)] for g, m in groups.items() if m.any()},
            alt="Scatter of the indicator against the probability with which the model writes the token.",
        )
    }  # fmt: skip

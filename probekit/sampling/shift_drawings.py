"""Two models at the tokens of the answers of one of them, drawn."""

from __future__ import annotations

import numpy as np

from probekit import plots
from probekit.analysis import Result

from .recovery import BASE, MODEL, about, crossing_bars


def shift_drawings(result: Result) -> dict[str, plots.Drawing]:
    """The answers coloured by divergence, how unevenly it is spread, where it lies, and cross-sampling.

    Args:
        result: of model-shift.
    """
    found = result.findings
    claims = {f.unit: f.claim for f in found[:-2]}  # the last two are about cross-sampling
    alike = found[0].claim
    place, entropy = (claims.get(unit, alike) for unit in ("× mean JS", "rank correlation"))
    return {
        "strip": _strip(result),
        "largest": _largest(result),
        "sparsity": _sparsity(result, claims.get("share of JS", alike)),
        "thresholds": _thresholds(result, alike),
        "place": _by_tenth(result, place, "place", "relative_place_in_the_answer"),
        "entropy": _by_tenth(result, entropy, "entropy", "rank_of_the_base's_entropy_among_the_tokens"),
        "crossing": crossing_bars(result),
    }


def _word(result: Result, token: int) -> str:
    table = plots.words_by_id(result["vocab_str"])
    return plots.visible(table.get(token, f"[{token}]"))


def _would_say(result: Result, place: int) -> str:
    parts = []
    for role in (MODEL, BASE):
        share = float(result[f"{role}_top_prob"].values[place])
        parts.append(f"{role}: {_word(result, int(result[f'{role}_top_id'].values[place]))} ({share:.0%})")
    return ", ".join(parts)


def _strip(result: Result) -> plots.TokenStrip:
    data = result.dataset
    notes = [f"likeliest by the {_would_say(result, i)}" for i in range(data.sizes["token"])]
    delta = data["delta_logprob_nats"].values
    return plots.TokenStrip(
        title="Where the model and its base differ",
        tokens=tuple(map(str, data["token_str"].values)),
        texts=data["text"].values,
        quantities=(
            plots.Quantity("Jensen-Shannon divergence", "nats", data["js_nats"].values, low=0),
            plots.Quantity("the same, cut to the nuclei", "nats", data["js_cut_nats"].values, low=0),
            plots.Quantity("log-probability, model minus base", "nats", delta, scale="diverging"),
            plots.Quantity("entropy of the base", "nats", data["entropy_base_nats"].values, low=0),
        ),
        caption=f"{about(result)} The model's answers, {result['hit'].sizes['sample']} to each prompt. Hover for what each model finds likeliest in a token's place.",
        alt="The model's answers, each token coloured by how far the two models' distributions are apart.",
        notes=tuple(notes),
    )  # fmt: skip


def _largest(result: Result) -> plots.Figure:
    js, data = result["js_nats"].values, result.dataset
    values = {}
    for i in np.argsort(-js, kind="stable")[:10]:
        own = plots.visible(str(data["token_str"].values[i]))
        values[f"{data['text'].values[i]}:({data['pos'].values[i]}) {own}, {_would_say(result, int(i))}"] = float(js[i])
    return plots.bars(
        values, title="Where the two models differ most, and what each finds likeliest there", unit="nats",
        quantity="Jensen-Shannon divergence", by="answer:(place) token written",
        caption=f"{about(result)} The ten tokens of the model's answers with the largest divergence; ln 2 = 0.693 at most.",
        alt="Bars of the largest divergences, with the token written and each model's likeliest token.",
    )  # fmt: skip


def _sparsity(result: Result, title: str) -> plots.Figure:
    data = result.dataset.assign_coords(rank=result["rank"].values + 1)
    words = "tokens,_largest_first_(%)"
    curves = {
        "whole distributions": "carried",
        "cut to the nuclei": "carried_cut",
        "noise on all logits": "carried_unspecific",
    }
    named = {label: data[name].rename(rank=words) for label, name in curves.items()}
    band = data["carried_low"].rename(rank=words), data["carried_high"].rename(rank=words)
    return plots.lines(
        named, title=title, unit="share",
        quantity="of all JS on these tokens", bands={"whole distributions": band}, y_range=(0, 1.02),
        caption=f"{about(result)} Tokens of the model's answers, those with the largest divergence first. Band: 95 % interval "
        "over prompts, or answers of fewer than five. An even spread would be the diagonal.",
        alt="Share of the total divergence that the tokens with the largest carry, against how many they are.",
    )  # fmt: skip


def _thresholds(result: Result, title: str) -> plots.Figure:
    data = result.dataset.assign_coords(threshold=[f"{t:g}" for t in result["threshold"].values])
    curves = {"whole distributions": "", "cut to the nuclei": "_cut", "noise on all logits": "_unspecific"}
    named = {label: data[f"share_below{end}"].rename(threshold="threshold_(nats)") for label, end in curves.items()}
    return plots.lines(
        named, title=title, unit="share", quantity="tokens with JS below the threshold", y_range=(0, 1.02),
        caption=f"{about(result)} Cutting to the nuclei gives many tokens exactly 0 (the same few tokens in both, or one) and "
        "others up to ln 2 = 0.693 (nuclei without a common token).",
        alt="Share of tokens whose divergence is below a threshold, for thresholds from 0.0001 to 0.6 nats.",
    )  # fmt: skip


def _by_tenth(result: Result, title: str, kind: str, axis: str) -> plots.Figure:
    curve, low, high = (result[f"js_by_{kind}{end}"].rename(bin=axis) for end in ("", "_low", "_high"))
    label = "the two models"
    return plots.lines(
        {label: curve, "noise on all logits": result[f"unspecific_by_{kind}"].rename(bin=axis)},
        title=title, unit="nats", quantity="mean JS",
        bands={label: (low, high)},
        caption=f"{about(result)} Mean over the tokens of each tenth. Band: 95 % interval from the spread between prompts, or "
        "between answers of fewer than five. Noise has the same mean over all tokens.",
        alt=f"Mean divergence in tenths of the {axis.replace('_', ' ')}, beside that of noise on all logits.",
    )  # fmt: skip

"""Which runs may be laid side by side, and what is then said of their difference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import xarray as xr

import probekit as pk
from probekit.analysis import Params, param
from probekit.analysis.registry import temporary_registrations
from probekit.studies.facets import compared_by, differing, run_of

PROVENANCE: dict[str, Any] = {
    "probekit": "1",
    "model": {"name": "a", "revision": "1", "dtype": "float32", "device": "cpu", "n_layers": 4},
    "weights_hash": "sha256:aaaa",
    "tokenizer_hash": "t",
    "attention": "sdpa",
    "backend": "transformers",
    "versions": {"torch": "2"},
    "texts": {"n_texts": 5, "n_tokens": 50, "bos": "model", "source": "sha256:1111", "digest": "sha256:2222"},
}
OTHER_MODEL = {"model.name": "b", "model.revision": "2", "weights_hash": "sha256:bbbb"}


@dataclass(frozen=True)
class MadeParams(Params):
    cut: float = param(0.5, help="A threshold")


class Made(pk.Analysis):
    """What was made up for a test."""

    name, title, Params = "made-up", "Made up", MadeParams
    measures = {"x": pk.Measure(("text",), "share", "made up"), "y": pk.Measure(("text",), "nats", "made up")}

    def findings(self, result: pk.Result) -> list[pk.Finding]:
        found = []
        for name, unit, quantity in (("x", "share", "made share"), ("y", "nats", "")):
            m = pk.stats.text_mean(result[name].values)
            found.append(
                pk.Finding(
                    f"{name} {m.value:.3f}", m.value, unit, 0.0, "nothing", m.ci95, m.n, m.n_unit, quantity=quantity
                )
            )
        return found

    def draw(self, result: pk.Result) -> dict[str, Any]:
        return {}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with temporary_registrations():
        pk.register(Made)
        yield


def result_of(x: Any, y: Any = None, *, cut: float = 0.5, **changes: Any) -> pk.Result:
    """A result whose provenance is as above but for some entries, such as {"texts.source": "…"}."""
    provenance = copy.deepcopy(PROVENANCE)
    for path, value in changes.items():
        *outer, last = path.split(".")
        place = provenance
        for key in outer:
            place = place[key]
        place[last] = value
    values = np.asarray(x, dtype=float)
    data = xr.Dataset({"x": ("text", values), "y": ("text", values if y is None else np.asarray(y, dtype=float))})
    return pk.result_of("made-up", data, provenance, cut=cut)


ONE = [0.1, 0.2, 0.3, 0.4, 0.5]
TWO = [0.5, 0.7, 0.6, 0.9, 0.8]


def remarks(result: pk.Result) -> str:
    return "\n".join(result.analysis.remarks(result))


def test_the_difference_and_its_interval_by_hand() -> None:
    found = pk.compare([result_of(ONE), result_of(TWO, **OTHER_MODEL)])
    share, nats = found.findings
    assert share.value == pytest.approx(0.7 - 0.3) and share.null == 0 and share.n == 5
    widths = [f.ci95[1] - f.ci95[0] for r in (result_of(ONE), result_of(TWO)) for f in r.findings[:1] if f.ci95]
    half = (
        2.2414 * np.hypot(*widths) / (2 * 1.95996)
    )  # two differences are stated: 1 - 0.05 / 4 of the normal is 2.2414
    assert share.ci95 == pytest.approx((0.4 - half, 0.4 + half), rel=1e-4)
    assert "made share: 0.700 with b, 0.300 with a." in share.claim and nats.unit == "nats"
    assert found.dataset["value"].values.tolist() == pytest.approx([0.3, 0.7, 0.3, 0.7])


def test_runs_that_agree_are_said_to_agree() -> None:
    found = pk.compare([result_of(ONE), result_of(ONE[::-1], **OTHER_MODEL)])
    assert all("the intervals allow for no difference" in f.claim for f in found.findings)


def test_false_alarms_are_rare_over_the_whole_page() -> None:
    """Five runs with the same mean: in at most about 5 % of pages is any of the eight differences stated."""
    draw, pages = np.random.default_rng(0), 200
    alarms = 0
    for _ in range(pages):
        runs = [result_of(*draw.normal(size=(2, 12)), cut=0.1 * i) for i in range(5)]
        alarms += any(f.ci95 is not None and (f.ci95[0] > 0 or f.ci95[1] < 0) for f in pk.compare(runs).findings)
    assert alarms / pages <= 0.09, alarms  # 5 % and three standard errors
    far = [result_of(draw.normal(size=12) + 4 * i, cut=0.1 * i) for i in range(5)]
    assert all(f.ci95 and f.ci95[0] > 0 for f in pk.compare(far).findings)


ALLOWED: list[tuple[str, dict[str, Any]]] = [
    ("model", OTHER_MODEL),
    ("model", OTHER_MODEL | {"tokenizer_hash": "u", "model.dtype": "bfloat16", "attention": "eager"}),
    ("texts", {"texts.source": "sha256:3333", "texts.digest": "sha256:4444"}),
    ("parameter cut", {"cut": 0.7}),
    ("dtype", {"model.dtype": "bfloat16"}),
    ("backend", {"backend": "nnsight"}),
    ("chat template", {"texts.chat_template": "yes"}),
    ("beginning-of-sequence policy", {"texts.bos": "always", "texts.beginning_of_sequence": "<s>"}),
    ("opening", {"texts.opening": 64}),
    ("parameter cut", {"cut": 0.7, "versions": {"torch": "3"}, "model.device": "cuda:0"}),
]


@pytest.mark.parametrize(("facet", "changes"), ALLOWED, ids=lambda v: v if isinstance(v, str) else "")
def test_one_difference_may_be_compared(facet: str, changes: dict[str, Any]) -> None:
    one, other = run_of(result_of(ONE)), run_of(result_of(TWO, **changes))
    assert compared_by(one, other) == compared_by(other, one) == facet
    assert pk.compare([one.result, other.result]).findings[0].where["by"] == facet


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("model: a / b; texts: ", OTHER_MODEL | {"texts.source": "sha256:3333"}),
    ("model: a / b; parameter cut: 0.5 / 0.7", OTHER_MODEL | {"cut": 0.7}),
    ("texts: .*; chat template: False / True", {"texts.source": "sha256:3333", "texts.chat_template": "yes"}),
    ("version of probekit: 1 / 2; parameter cut", {"cut": 0.7, "probekit": "2"}),
    ("tokenizer: t / u", {"tokenizer_hash": "u", "texts.source": "sha256:3333"}),
]


@pytest.mark.parametrize(("reason", "changes"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_more_differences_are_refused_with_the_reason(reason: str, changes: dict[str, Any]) -> None:
    found = pk.compare([result_of(ONE), result_of(TWO, **changes)])
    assert not found.findings and not found.dataset.sizes["case"]
    import re

    assert re.search(reason, remarks(found)), remarks(found)


def test_what_differs_along_with_a_model_is_told() -> None:
    found = pk.compare([result_of(ONE), result_of(TWO, **OTHER_MODEL, **{"model.dtype": "bfloat16"})])
    assert "dtype: a has float32; b has bfloat16" in remarks(found)


def test_nats_of_two_tokenizers_have_no_difference() -> None:
    found = pk.compare([result_of(ONE), result_of(TWO, **OTHER_MODEL, tokenizer_hash="u")])
    assert [f.unit for f in found.findings] == ["share"], "nats are per token of each tokenizer"
    assert found.dataset.sizes["case"] == 4, "they are shown beside each other all the same"
    captions = [d.caption for d in found.figures().values()]
    assert len(captions) == 1, "the main quantity alone is drawn, and those that differ"
    same = pk.compare([result_of(ONE), result_of(TWO, **OTHER_MODEL)])
    assert [f.unit for f in same.findings] == ["share", "nats"]


def test_a_grid_is_compared_along_its_lines_only() -> None:
    """Two models × two corpora: four pairs share a model or a corpus, two share neither."""
    texts = ({}, {"texts.source": "sha256:3333"})
    runs = [
        result_of(np.add(ONE, i), **model, **t)
        for i, (model, t) in enumerate((m, t) for m in ({}, OTHER_MODEL) for t in texts)
    ]
    found = pk.compare(runs)
    assert len(found.findings) == 4 * 2 and len({f.where["by"] for f in found.findings}) == 2
    assert "not compared are" in remarks(found) and "So do 1 more pair." in remarks(found)


def test_the_same_run_twice_is_no_comparison() -> None:
    assert not differing(run_of(result_of(ONE)), run_of(result_of(TWO)))
    with pytest.raises(pk.ProbekitError, match="at least two runs that differ; found 1"):
        pk.compare([result_of(ONE), result_of(ONE)])
    with pytest.raises(pk.ProbekitError, match="Found int where a result is needed"):
        pk.compare([3, 4])


def test_one_text_has_no_interval_and_says_so() -> None:
    found = pk.compare([result_of([0.5]), result_of(TWO, **OTHER_MODEL)])
    assert found.findings[0].ci95 is None and found.findings[0].n == 1
    assert "one of them has no interval" in found.findings[0].claim


def test_it_is_saved_loaded_and_reported(tmp_path: Any) -> None:
    found = pk.compare({"news": result_of(ONE), "code": result_of(TWO, **{"texts.source": "sha256:3333"})})
    page = pk.report(found, tmp_path / "report", title="Two corpora").read_text(encoding="utf-8")
    assert "<h1>Two corpora</h1>" in page and "0.700 with code, 0.300 with news" in page
    again = pk.load_result(tmp_path / "report", "comparison")
    assert [f.claim for f in again.findings] == [f.claim for f in found.findings] and remarks(again) == remarks(found)
    assert "0.700 with code" in found._repr_html_()
    folders = [pk.report(r, tmp_path / str(i)).parent for i, r in enumerate((result_of(ONE), result_of(TWO, cut=0.7)))]
    assert pk.compare(folders).findings[0].where["by"] == "parameter cut"


def test_the_command_compares_folders(tmp_path: Any) -> None:
    from click.testing import CliRunner

    from probekit.cli import cli

    folders = [pk.report(r, tmp_path / str(i)).parent for i, r in enumerate((result_of(ONE), result_of(TWO, cut=0.7)))]
    done = CliRunner().invoke(cli, ["compare", *map(str, folders), "--out", str(tmp_path / "both")])
    assert done.exit_code == 0 and "0.700 with cut = 0.7, 0.300 with cut = 0.5" in done.output, done.output
    assert "2 runs side by side" in (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    alone = CliRunner().invoke(cli, ["compare", str(folders[0])])
    assert alone.exit_code == 2 and "at least two runs; found 1" in alone.output
    nothing = CliRunner().invoke(cli, ["compare", str(folders[0]), str(tmp_path / "none")])
    assert nothing.exit_code == 2 and "No probekit results at" in nothing.output

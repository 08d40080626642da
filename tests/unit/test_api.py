"""The verbs of the package on a tiny model, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import probekit as pk
from probekit.analysis import analyses
from probekit.core import Batch, TextError

TEXT = " ".join(f"w{3 + i * i % 101}" for i in range(90))


def test_one_name_gives_a_result_and_several_give_results_by_name(tiny_folder: Path) -> None:
    model = pk.open_model(tiny_folder)
    one = pk.run("logit-lens", model, TEXT, progress=False)
    several = pk.run(["logit-lens", "attention-sinks"], model, [TEXT, TEXT], progress=False)
    assert isinstance(one, pk.Result) and list(several) == ["logit-lens", "attention-sinks"]
    looking = [name for name, analysis in analyses().items() if analysis.only_looks()]
    assert list(pk.run("all", model, TEXT, progress=False)) == looking
    half = several["logit-lens"].dataset.isel(token=several["logit-lens"]["text"].values == 0)
    np.testing.assert_allclose(half["entropy_nats"], one["entropy_nats"], atol=1e-5)


def test_shared_parameters_reach_all_and_own_ones_only_one(tiny_folder: Path) -> None:
    names = ["logit-lens", "token-uncertainty"]
    results = pk.run(names, tiny_folder, TEXT, progress=False, top_k=4, logit_lens={"top_k": 2})
    assert [r["top_id"].sizes["rank"] for r in results.values()] == [2, 4]
    with pytest.raises(pk.ProbekitError, match=r"Unknown parameter of logit-lens 'topk'. Did you mean 'top_k'"):
        pk.run("logit-lens", tiny_folder, TEXT, topk=3)


def test_windows_become_texts(tiny_folder: Path) -> None:
    result = pk.run("attention-sinks", tiny_folder, TEXT, window=40, horizon=32, progress=False)
    assert result["sink_rate"].sizes["text"] == 2 and result.provenance["texts"]["window"] == 40
    with pytest.raises(TextError, match="No text fills a window of 500 tokens; the longest has 90"):
        pk.run("logit-lens", tiny_folder, TEXT, window=500)


def test_a_text_beyond_the_context_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(TextError, match=r"Text 1 has 900 tokens; the model reads at most 256.*window=256"):
        pk.run("logit-lens", tiny_folder, [TEXT, " ".join([TEXT] * 10)])


def test_bos_policy_is_what_runs(tiny_folder: Path) -> None:
    plain = pk.run("token-uncertainty", tiny_folder, TEXT, progress=False)
    always = pk.run("token-uncertainty", tiny_folder, TEXT, bos="always", progress=False)
    assert always["token_id"].values.tolist() == [1, *plain["token_id"].values.tolist()]
    assert always.provenance["texts"]["bos"] == "always"
    with pytest.raises(pk.ProbekitError, match="bos must be"):
        pk.run("token-uncertainty", tiny_folder, TEXT, bos="perhaps")


def test_plan_needs_no_weights(tiny_folder: Path, tmp_path: Path) -> None:
    for file in tiny_folder.iterdir():
        weights = file.suffix == ".safetensors"
        (tmp_path / file.name).write_bytes(b"these are no weights" if weights else file.read_bytes())
    (plan,) = pk.plan("all", tmp_path, TEXT)
    assert plan.n_tokens == 90 and plan.peak_bytes > plan.result_bytes > 0 and plan.gflop_readout > 0
    assert "one pass" in str(plan)


def test_report_takes_one_result_or_many(tiny_folder: Path, tmp_path: Path) -> None:
    results = pk.run(["logit-lens", "token-uncertainty"], tiny_folder, TEXT, progress=False)
    for n, given in enumerate((results, results["logit-lens"], list(results.values()))):
        page = pk.report(given, tmp_path / str(n))
        assert "Logit lens" in page.read_text(encoding="utf-8")
        assert set(pk.load_results(page.parent)) <= set(results)
    with pytest.raises(pk.ProbekitError, match="no result to report"):
        pk.report([], tmp_path / "none")


def test_results_show_themselves_in_jupyter(tiny_folder: Path) -> None:
    results = pk.run(["logit-lens", "token-uncertainty"], tiny_folder, TEXT, progress=False)
    shown = results._repr_html_()
    assert "<table" in shown and all(r.analysis.title in shown for r in results.values())
    assert results["logit-lens"].findings[0].claim in repr(results)
    with pytest.raises(pk.ProbekitError, match=r"Unknown variable of logit-lens 'kl'. Did you mean 'kl_nats'"):
        results["logit-lens"]["kl"]


def test_wrong_texts_are_refused(tiny_folder: Path) -> None:
    for texts, message in (
        (3, "must be a string or a list"),
        ([], "No text was given"),
        (["w3", 4], "Text 1 must be a string"),
    ):
        with pytest.raises(pk.ProbekitError, match=message):
            pk.run("logit-lens", tiny_folder, texts)


def test_a_batch_runs_as_it_is(tiny_folder: Path) -> None:
    model = pk.open_model(tiny_folder)
    batch = model.tokenize([TEXT]).windows(30)
    assert isinstance(batch, Batch)
    result = pk.run("logit-lens", model, batch, progress=False)
    assert len(np.unique(result["text"])) == 3


def test_public_names_exist_and_unknown_ones_do_not() -> None:
    for name in pk.__all__:
        assert getattr(pk, name) is not None
    assert set(pk.__all__) <= set(dir(pk))
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        pk.runn  # noqa: B018


def test_analyses_are_listed_without_a_model() -> None:
    code = "import sys, probekit as pk; pk.list_analyses(); print(sorted({'torch', 'transformers', 'plotly'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

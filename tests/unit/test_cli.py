"""The command line on a tiny model: what a user types, sees and finds on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import probekit as pk
from probekit.analysis import analyses, temporary_registrations
from probekit.cli import cli

TEXT = " ".join(f"w{3 + i * i % 101}" for i in range(90))
FIFTH = '''
import probekit as pk
from probekit.reduce import Norm

@pk.register
class StreamNorm(pk.Analysis):
    """How long is the residual stream?"""
    name, title = "stream-norm", "Stream norm"
    measures = {"norm": pk.Measure(("layer", "token"), "activation", "norm of the residual stream")}
    def observe(self, params, info):
        return pk.Forward((pk.Capture("resid_post", Norm()),))
    def compute(self, trace, params):
        return trace[pk.Capture("resid_post", Norm())]
    def findings(self, result):
        mean = pk.stats.token_mean(result["norm"].values[-1], result["text"].values, result["pos"].values)
        return [pk.Finding("The stream has a length.", mean.value, "activation", 0.0, "no stream", mean.ci95, mean.n, mean.n_unit)]
    def draw(self, result):
        return {"norm": pk.plots.heatmap(result["norm"], title="Norm", unit="activation", caption="c", alt="a")}
'''


def probekit(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("cli") / "out"
    return out, probekit("run", "all", "--model", tiny_folder, "--text", TEXT, "--top-k", "3", "--out", out)


def test_list_names_every_analysis_and_parameter() -> None:
    shown = probekit("list").output
    for name, question in pk.list_analyses().items():
        assert name in shown and question in shown
    assert "--epsilon" in shown


def test_models_lists_licence_size_and_cache() -> None:
    shown = probekit("models").output
    assert "smollm2-135m-instruct" in shown and "Apache-2.0" in shown
    assert "all-minilm-l6-v2" in shown and "MIT" in shown and "CACHED" in shown


def test_run_writes_the_four_files_and_says_what_it_found(run: tuple[Path, Result]) -> None:
    out, result = run
    assert result.exit_code == 0, result.output
    assert {p.name for p in out.iterdir()} == {"report.html", "findings.json", "results.zarr", "manifest.json"}
    assert result.output.count("•") == 3
    assert f"Report: {out / 'report.html'}" in result.output
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["parameters"]["logit-lens"]["top_k"] == 3
    for key in ("weights_hash", "tokenizer_hash", "attention", "versions", "plan", "texts"):
        assert manifest[key], key
    assert manifest["texts"]["bos"] == "model"
    findings = json.loads((out / "findings.json").read_text())
    assert all({"claim", "value", "unit", "null", "ci95", "n", "analysis"} <= set(f) for f in findings)
    assert {f["analysis"] for f in findings} == {n for n, a in analyses().items() if a.only_looks()}


def test_results_load_again_by_name(run: tuple[Path, Result]) -> None:
    lens = pk.load_result(run[0], "logit-lens")
    assert lens["top_id"].sizes["rank"] == 3
    assert lens.figures()
    with pytest.raises(pk.ProbekitError, match="name one of"):
        pk.load_result(run[0])


def test_one_analysis_can_have_its_own_parameter(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = probekit(
        "run", "logit-lens", "token-uncertainty", "--model", tiny_folder, "--text", TEXT, "--out", out,
        "--top-k", "4", "--logit-lens.top-k", "2",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert pk.load_result(out, "logit-lens")["top_id"].sizes["rank"] == 2
    assert pk.load_result(out, "token-uncertainty")["top_id"].sizes["rank"] == 4


def test_plan_prints_and_stops(tiny_folder: Path, tmp_path: Path) -> None:
    done = probekit("run", "all", "--model", tiny_folder, "--text", TEXT, "--plan", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "above the loaded model" in done.output and "GFLOP" in done.output
    assert not (tmp_path / "out").exists()


REFUSALS = {
    "unknown analysis": (["logit-lans"], "Did you mean 'logit-lens'"),
    "no analysis": ([], "No analysis was named"),
    "parameter of another analysis": (["logit-lens", "--epsilon", "0.2"], "Unknown parameter of logit-lens 'epsilon'"),
    "wrong type": (["logit-lens", "--top-k", "many"], "must be int, found 'many'"),
    "out of bounds": (["logit-lens", "--top-k", "0"], "must be from 1 to 100, found '0'"),
    "memory": (["logit-lens", "--memory-gib", "0"], "must be above 0"),
    "unknown flag": (["logit-lens", "--topk", "1"], "No such option"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_before_the_model_is_looked_for(case: str, tmp_path: Path) -> None:
    args, message = REFUSALS[case]
    out = tmp_path / "out"
    done = probekit("run", *args, "--text", TEXT, "--model", "no-such-model", "--out", out)
    assert done.exit_code == 2 and message in done.output, done.output
    assert "no-such-model" not in done.output and not out.exists()


@pytest.mark.parametrize(
    ("texts", "message"),
    [(["--text", " "], "Text 0 is empty"), ([], "No text was given"), (["--texts", "none.jsonl"], "cannot be read")],
)
def test_bad_texts_are_refused_before_the_model_is_looked_for(texts: list[str], message: str, tmp_path: Path) -> None:
    done = probekit("run", "logit-lens", *texts, "--model", "no-such-model", "--out", tmp_path / "out")
    assert done.exit_code == 2 and message in done.output, done.output


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    done = probekit("run", "logit-lens", "--text", TEXT, "--model", "no-such-model", "--out", tmp_path / "file" / "out")
    assert done.exit_code == 2 and "no-such-model" not in done.output
    assert str(tmp_path / "file") in done.output


def test_a_short_text_is_refused_before_the_weights_load(tiny_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    for file in tiny_folder.iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"these are no weights")
    out = tmp_path / "out"
    done = probekit("run", "attention-sinks", "--text", TEXT, "--text", "too short", "--model", broken, "--out", out)
    assert done.exit_code == 2 and "Text 1 has" in done.output and "attention-sinks needs at least 64" in done.output
    done = probekit("run", "logit-lens", "--text", TEXT, "--model", broken, "--out", out)
    assert done.exit_code == 2 and "cannot be loaded" in done.output
    assert not out.exists()


def test_a_run_that_does_not_fit_is_refused_with_the_number(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = probekit("run", "all", "--text", TEXT, "--model", tiny_folder, "--out", out, "--memory-gib", "0.00001")
    assert done.exit_code == 2 and "needs about" in done.output and "are available" in done.output
    assert not out.exists()


def test_a_failed_run_leaves_the_older_report_alone(
    run: tuple[Path, Result], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = run
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}

    def broken(*args: object, **kwargs: object) -> None:
        raise pk.ProbekitError("the disk caught fire")

    monkeypatch.setattr("probekit.reporting.store.save_results", broken)
    done = probekit("run", "logit-lens", "--model", tiny_folder, "--text", TEXT, "--out", out)
    assert done.exit_code == 2 and "caught fire" in done.output
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    assert not [p for p in out.parent.iterdir() if p != out]


def test_one_file_of_the_users_is_a_new_analysis(tiny_folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(FIFTH)
    with temporary_registrations():
        out = tmp_path / "out"
        done = probekit("run", "stream-norm", "--load", mine, "--model", tiny_folder, "--text", TEXT, "--out", out)
        assert done.exit_code == 0, done.output
        assert "The stream has a length." in done.output
    assert "stream-norm" not in pk.list_analyses()


def test_options_of_run_are_not_taken_by_parameters(tiny_folder: Path) -> None:
    """activation-patching has a parameter `window`; `--window` cuts texts all the same, and the longer flag reaches it."""
    words = " ".join(f"w{i % 100 + 3}" for i in range(40))
    common = ["--model", str(tiny_folder), "--text", words, "--plan"]
    cut = CliRunner().invoke(cli, ["run", "logit-lens", *common, "--window", "10"])
    assert cut.exit_code == 0 and "texts     4 with 40 tokens" in cut.output, cut.output
    pair = ["--text", "w3 w4 w5", "--text", "w3 w6 w7", "--model", str(tiny_folder), "--plan"]
    long = CliRunner().invoke(cli, ["run", "activation-patching", *pair, "--activation-patching.window", "three"])
    assert "parameter 'window' must be int" in long.output, long.output
    shown = CliRunner().invoke(cli, ["run", "--help"]).output
    assert shown.count("--window ") == 1

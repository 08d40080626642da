"""A streamed corpus ends as a run over all its texts at once, however it is cut, broken off, mended or extended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import tiny_model
from lens_files import random_lens
from streamed import NAMES, PARAMS, assert_same_result, assert_same_summary, corpus, stream, texts_of

import probekit as pk
from probekit.cli import cli
from probekit.streaming import run as running
from probekit.streaming import shards
from probekit.streaming.store import StreamStore


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts_of(13))


@pytest.fixture(scope="module")
def whole(path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[pk.Results, Path]:
    store = tmp_path_factory.mktemp("whole") / "s.zarr"
    return stream(path, store, chunk=5, keep="tokens"), store


def test_some_analyses_can_be_streamed() -> None:
    assert set(NAMES) == {"attention-sinks", "logit-lens", "massive-activations", "token-uncertainty"}


@pytest.mark.parametrize("chunk", [1, 3, 7, 13])
def test_any_chunks_give_the_same_result(
    chunk: int, path: Path, whole: tuple[pk.Results, Path], tmp_path: Path
) -> None:
    """Whole numbers exactly, other sums, findings and curves to a millionth; texts and tokens row by row."""
    found = stream(path, tmp_path / "s.zarr", chunk=chunk, keep="tokens")
    for name in NAMES:
        assert_same_result(found[name], whole[0][name])
        for variable, array in whole[0][name].dataset.data_vars.items():
            if array.dtype.kind == "f":
                np.testing.assert_allclose(found[name][str(variable)], array, rtol=1e-4, atol=1e-5)
    for table in ("texts", "tokens"):
        rows, expected = pk.load_rows(tmp_path / "s.zarr", table), pk.load_rows(whole[1], table)
        assert rows.sizes == expected.sizes
        for variable, array in expected.data_vars.items():
            np.testing.assert_allclose(rows[variable], array, rtol=1e-4, atol=1e-4, err_msg=str(variable))


@pytest.mark.parametrize("n", [13, 3])
def test_findings_are_those_of_a_run_over_all_texts(n: int, tmp_path: Path) -> None:
    """Also with so few texts that blocks of tokens stand in for them."""
    texts = texts_of(n)
    found = stream(corpus(tmp_path / "c.jsonl", texts), tmp_path / "s.zarr", chunk=2)
    at_once = pk.run(NAMES, tiny_model("llama-grouped").model, texts, **PARAMS)
    for name in NAMES:
        assert_same_result(found[name], at_once[name])
        assert [f.claim for f in found[name].findings] == [f.claim for f in at_once[name].findings]
        for variable, measure in at_once[name].analysis.measures.items():
            if not {"token", "text", "vocab"} & set(measure.dims):
                rtol = 0.02 if "binned" in variable else 1e-5  # tenths are cut on levels where a corpus is streamed
                np.testing.assert_allclose(found[name][variable], at_once[name][variable], rtol, 1e-6, err_msg=variable)


def test_pieces_of_a_shard_change_nothing(
    path: Path, whole: tuple[pk.Results, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of a shard run some at a time, a longer one than fits alone; each once, in order."""
    batch = tiny_model("llama-grouped").model.tokenize(texts_of(6))
    assert [i for some in shards.pieces(batch, 30) for i in some] == list(range(6))
    assert all(len(some) == 1 or sum(batch.lengths[i] for i in some) <= 30 for some in shards.pieces(batch, 30))
    assert [len(some) for some in shards.pieces(batch, 1)] == [1] * 6
    monkeypatch.setattr(shards.pieces, "__defaults__", (40,))
    found = stream(path, tmp_path / "s.zarr", chunk=9)
    for name in NAMES:
        assert_same_result(found[name], whole[0][name])


def test_a_corpus_that_grew_goes_on(path: Path, whole: tuple[pk.Results, Path], tmp_path: Path) -> None:
    """Texts added at the end are read, also behind a last line without an end; what was read is not read again."""
    lines = path.read_text().splitlines()
    part = tmp_path / "c.jsonl"
    part.write_text("\n".join(lines[:10]))
    assert stream(part, tmp_path / "s.zarr", chunk=5)["logit-lens"].provenance["texts"]["n_texts"] == 10
    part.write_text("\n".join(lines))
    found = stream(part, tmp_path / "s.zarr", chunk=5)
    for name in NAMES:
        assert_same_result(found[name], whole[0][name], rtol=1e-12)
    part.write_text("\n".join(lines) + '{"text": "glued to the last line"}\n')
    with pytest.raises(pk.ProbekitError, match="last line was read when it was shorter"):
        stream(part, tmp_path / "s.zarr", chunk=5)


@pytest.mark.parametrize(
    ("what", "how", "message"),
    [
        ("chunk", {"chunk": 4}, "shards chunk was 5 and is 4"),
        ("parameter", {"chunk": 5, "top_k": 4}, r"analyses .* top_k was 3 and is 4"),
        ("analyses", {"chunk": 5, "names": NAMES[:2]}, "belongs to another run"),
        ("rows", {"chunk": 5, "keep": "nothing"}, "keep was 'texts' and is 'nothing'"),
        ("window", {"chunk": 5, "window": 8}, "window was None and is 8"),
    ],
)
def test_another_run_is_refused(what: str, how: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = corpus(tmp_path / "c.jsonl", texts_of(6))
    stream(path, tmp_path / "s.zarr", chunk=5)
    with pytest.raises(pk.ProbekitError, match=message):
        stream(path, tmp_path / "s.zarr", **how)


def test_another_model_or_corpus_is_refused(tmp_path: Path) -> None:
    texts = texts_of(6)
    path = corpus(tmp_path / "c.jsonl", texts)
    stream(path, tmp_path / "s.zarr", "logit-lens")
    with pytest.raises(pk.ProbekitError, match="weights_hash was"):
        pk.stream("logit-lens", tiny_model("llama").model, path, tmp_path / "s.zarr", progress=False, top_k=3)
    corpus(path, [*texts[:2], "w9 w9", *texts[3:]])
    with pytest.raises(pk.ProbekitError, match=r"shorter than what was read|has changed in the 6 lines"):
        stream(path, tmp_path / "s.zarr", "logit-lens")
    corpus(path, [*texts[1:], texts[0]])
    with pytest.raises(pk.ProbekitError, match="has changed in the 6 lines"):
        stream(path, tmp_path / "s.zarr", "logit-lens")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(pk.ProbekitError, match="no streamed corpus"):
        stream(path, tmp_path / "other", "logit-lens")


def test_two_processes_cannot_hold_one_store(path: Path, tmp_path: Path) -> None:
    with StreamStore(tmp_path / "s.zarr", {}), pytest.raises(pk.ProbekitError, match="in use"):
        stream(path, tmp_path / "s.zarr", "logit-lens")


BAD = {
    "malformed": ('{"text": "w4 w5', "line 7: not valid JSON"),
    "no text": ('{"prompt": "w4 w5"}', "line 7: expected an object with a string 'text'"),
    "empty": ('{"text": " "}', "line 7: the text is empty"),
    "too short": ('{"text": "w4 w5"}', "line 7: the text has 2 tokens; attention-sinks needs at least 8"),
    "too long": (json.dumps({"text": "w4 " * 300}), "line 7: the text has 300 tokens; the model reads at most 256"),
    "not UTF-8": ("\udcff", "line 7: not UTF-8"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_line_that_cannot_run_is_named_and_can_be_mended_or_left_out(case: str, tmp_path: Path) -> None:
    """The shards before it are kept; the mended corpus goes on, and so does a run that leaves such lines out."""
    bad, message = BAD[case]
    lines = [json.dumps({"text": t}) for t in texts_of(12)]
    good = corpus(tmp_path / "good.jsonl", texts_of(12)[:6] + texts_of(12)[7:])
    path = tmp_path / "c.jsonl"
    path.write_bytes("\n".join([*lines[:6], bad, *lines[7:]]).encode(errors="surrogateescape"))
    names = ("attention-sinks", "logit-lens")
    with pytest.raises(pk.ProbekitError, match=message) as refused:
        stream(path, tmp_path / "s.zarr", names, chunk=3)
    assert "The 6 texts of the shards before are kept" in str(refused.value)
    left_out = stream(path, tmp_path / "s.zarr", names, chunk=3, skip_bad=True)
    about = left_out["logit-lens"].provenance["texts"]
    assert about["n_texts"] == 11 and list(about["left out"].values()) == [1]
    without = stream(good, tmp_path / "good.zarr", names, chunk=6)
    assert_same_result(left_out["logit-lens"], without["logit-lens"])
    assert pk.load_rows(tmp_path / "s.zarr")["line"].values.tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]


def test_a_mended_corpus_goes_on(tmp_path: Path) -> None:
    texts = texts_of(12)
    path = corpus(tmp_path / "c.jsonl", texts)
    path.write_text(path.read_text().replace(json.dumps({"text": texts[7]}), "{oops"))
    with pytest.raises(pk.ProbekitError, match="line 8"):
        stream(path, tmp_path / "s.zarr", "logit-lens", chunk=3)
    found = stream(corpus(path, texts), tmp_path / "s.zarr", "logit-lens", chunk=3)
    expected = stream(path, tmp_path / "whole.zarr", "logit-lens", chunk=3)
    assert_same_result(found["logit-lens"], expected["logit-lens"], rtol=0)


def test_rows_hold_each_text_once(path: Path, whole: tuple[pk.Results, Path]) -> None:
    """Means of a text are those of its tokens, and token rows are those of a run."""
    texts, tokens = pk.load_rows(whole[1]), pk.load_rows(whole[1], "tokens")
    at_once = pk.run("token-uncertainty", tiny_model("llama-grouped").model, texts_of(13), top_k=3, progress=False)
    assert texts["line"].values.tolist() == list(range(1, 14))
    np.testing.assert_array_equal(tokens["text"], at_once["text"])
    np.testing.assert_array_equal(tokens["token_id"], at_once["token_id"])
    entropy = at_once["entropy_nats"].values
    np.testing.assert_allclose(tokens["token-uncertainty.entropy_nats"], entropy, rtol=1e-4, atol=1e-5)
    means = [entropy[at_once["text"].values == i].mean() for i in range(13)]
    np.testing.assert_allclose(texts["token-uncertainty.mean_entropy_nats"], means, rtol=1e-4)
    assert texts["n_tokens"].values.sum() == tokens.sizes["token"]


def test_windows_and_blank_lines(tmp_path: Path) -> None:
    """Windows are texts; a text that fills none counts as left out; blank lines are nothing."""
    texts = texts_of(9)
    path = tmp_path / "c.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": t}) for t in [*texts, "w5 w6"]))
    found = stream(path, tmp_path / "s.zarr", chunk=4, window=8, skip_bad=True)
    at_once = pk.run(NAMES, tiny_model("llama-grouped").model, texts, window=8, **PARAMS)
    for name in NAMES:
        assert_same_result(found[name], at_once[name])
    assert found["logit-lens"].provenance["texts"]["left out"] == {"shorter than a window": 1}


def test_texts_from_python(path: Path, whole: tuple[pk.Results, Path], tmp_path: Path) -> None:
    texts = texts_of(13)
    model = tiny_model("llama-grouped").model
    pk.stream(NAMES, model, texts[:9], tmp_path / "s.zarr", chunk=5, **PARAMS)
    found = pk.stream(NAMES, model, texts, tmp_path / "s.zarr", chunk=5, **PARAMS)
    for name in NAMES:
        assert_same_result(found[name], whole[0][name])
    with pytest.raises(pk.ProbekitError, match="has changed"):
        pk.stream(NAMES, model, texts[::-1], tmp_path / "s.zarr", chunk=5, **PARAMS)
    with pytest.raises(pk.ProbekitError, match="can be read once only"):
        pk.stream(NAMES, model, iter(texts), tmp_path / "t.zarr", **PARAMS)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("value-drain", {}, "value-drain cannot be streamed.*These can: attention-sinks, logit-lens"),
        ("attention-sinks", {"n_made": 2}, "take n_made = 0"),
        ("massive-activations", {"intervene": True}, "leave out intervene"),
    ],
)
def test_what_cannot_be_streamed_is_refused(name: str, params: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(pk.ProbekitError, match=message):
        pk.stream(name, "no-such-model", "none.jsonl", tmp_path / "s.zarr", **params)
    assert not (tmp_path / "s.zarr").exists()


def test_a_saved_result_keeps_its_summary(whole: tuple[pk.Results, Path], tmp_path: Path) -> None:
    pk.report(whole[0], tmp_path / "report")
    loaded = pk.load_results(tmp_path / "report")
    for name in NAMES:
        assert_same_summary(loaded[name].summary, whole[0][name].summary, 0, name)
        assert loaded[name].findings == whole[0][name].findings and loaded[name].figures()
    page = (tmp_path / "report" / "report.html").read_text()
    assert "13 texts" in page and "Shown: the first 8 texts" in page


def test_a_trained_lens_streams_and_another_one_is_refused_later(path: Path, tiny_folder: Path, tmp_path: Path) -> None:
    model = pk.open_model(tiny_folder)
    sizes = (model.info.n_layers, model.info.d_model)
    lens = random_lens(tmp_path / "lens", *sizes)
    how: dict[str, Any] = {"lens": str(tmp_path / "lens"), "lens_transfer": True, "progress": False}

    def streamed() -> pk.Result:
        return pk.stream("logit-lens", model, path, tmp_path / "s.zarr", chunk=5, **how)["logit-lens"]

    found = streamed()
    alone = pk.run("logit-lens", model, texts_of(13), **how)
    assert_same_result(found, alone)
    assert lens.title in found.findings[2].claim and f"Read by the {lens.title}" in found.figures()["kl"].caption
    random_lens(tmp_path / "lens", *sizes, scale=0.5)
    with pytest.raises(pk.ProbekitError, match=r"captures logit-lens was .* and is"):
        streamed()


def test_progress_is_told_and_can_end_the_run(path: Path, whole: tuple[pk.Results, Path], tmp_path: Path) -> None:
    told: list[pk.Step] = []

    def listen(step: pk.Step) -> None:
        told.append(step)
        if len(told) == 3:
            raise pk.Cancelled("enough")

    with pytest.raises(pk.Cancelled):
        stream(path, tmp_path / "s.zarr", chunk=5, progress=listen)
    assert [step.done for step in told] == sorted(step.done for step in told)
    assert told[-1].total == path.stat().st_size and "10 texts" in told[-1].what and "tokens/s" in told[-1].what
    assert_same_result(stream(path, tmp_path / "s.zarr", chunk=5)["logit-lens"], whole[0]["logit-lens"], rtol=0)


def test_the_plan_counts_without_weights(path: Path, tiny_folder: Path, tmp_path: Path) -> None:
    known = {k: v for k, v in PARAMS.items() if k != "progress"}
    plan = pk.plan_stream("all", tiny_folder, path, chunk=5, **known)
    assert (plan.n_texts, plan.n_shards, plan.exact) == (13, 3, True)
    assert plan.n_tokens == sum(len(t.split()) for t in texts_of(13))
    more = pk.plan_stream("all", tiny_folder, path, chunk=5, keep="tokens", **known)
    assert more.disk_bytes > plan.disk_bytes and more.peak_bytes == plan.peak_bytes
    stream(path, tmp_path / "s.zarr", chunk=5)
    assert "3 shards with 13 texts" in str(
        pk.plan_stream("all", tiny_folder, path, tmp_path / "s.zarr", chunk=5, **known)
    )


def test_the_command_streams_and_goes_on(path: Path, tiny_folder: Path, tmp_path: Path) -> None:
    def probekit(*args: Any) -> Any:
        own = ("--model", tiny_folder, "--horizon", 8, "--tail", 2, "--out", tmp_path / "out")
        return CliRunner().invoke(cli, ["run", "all", *map(str, (*args, *own))])

    done = probekit("--stream", "--texts", path, "--chunk", 6, "--plan")
    assert done.exit_code == 0 and "13 texts" in done.output and "for any number of texts" in done.output
    assert not (tmp_path / "out").exists()
    for _ in range(2):
        done = probekit("--stream", "--texts", path, "--chunk", 6)
        assert done.exit_code == 0, done.output
        assert "streamed  13 texts" in done.output and "3 shards; left out: none" in done.output
    assert pk.load_rows(tmp_path / "out").sizes["text"] == 13
    for args, message in (
        (("--stream", "--texts", path, "--chunk", 0), "at least one text"),
        (("--stream", "--texts", path, "--texts", path), "reads one .jsonl file"),
        (("--texts", path, "--chunk", 3), "go with --stream"),
        (("--stream", "--texts", tmp_path / "essay.txt"), "expected a .jsonl file"),
    ):
        refused = probekit(*args)
        assert refused.exit_code == 2 and message in refused.output, refused.output


def test_shown_texts_are_the_first(whole: tuple[pk.Results, Path]) -> None:
    for result in whole[0].values():
        assert np.unique(result["text"].values).tolist() == list(range(running.SHOWN_TEXTS))
        assert result.merged is not None and "13 texts" in result.about

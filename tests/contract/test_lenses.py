"""A readout with a lens keeps the laws of reducers, and every backend that reads lenses takes one."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    D_MODEL,
    D_VOCAB,
    N_LAYERS,
    assert_close,
    assert_same,
    copy_of,
    run,
    scripted,
    see,
    texts_of,
    tiny_model,
    words_tokenizer,
)
from lens_files import random_lens
from reference import readout

from probekit.analysis import get_analyses
from probekit.backends.transformers import TransformersModel
from probekit.core import CapabilityError, Capture, Forward
from probekit.engine import Job, first_plan
from probekit.reduce import Keep, LensRef, NextToken, Readout, vocab_rows, vocab_tiles
from probekit.reduce.lens_files import weights_of
from probekit.reduce.vocab_tiles import stream_readout_tiles

LENGTHS = (33, 1, 12, 40)
BATCH = texts_of(LENGTHS, D_VOCAB)


@functools.cache
def lens(kind: str = "tuned") -> LensRef:
    with tempfile.TemporaryDirectory() as folder:
        found = random_lens(Path(folder) / "lens", N_LAYERS, D_MODEL, kind=kind)
        weights_of(found, torch.device("cpu"))  # read once: the file is not asked for again
    return found


def captures(*kinds: str) -> list[Capture]:
    return [Capture("resid_post", Readout(5, lens(kind) if kind else None)) for kind in kinds]


def model_of(backend: str) -> Any:
    if backend == "scripted":
        return scripted(n_layers=N_LAYERS, d_model=D_MODEL, d_vocab=D_VOCAB)
    native = tiny_model("llama-grouped").model
    if backend == "transformers":
        return native
    if backend == "nnsight":
        from probekit.backends.nnsight import NnsightModel

        return NnsightModel.from_model(native).load()
    from probekit.backends.transformer_lens import TransformerLensModel

    return TransformerLensModel.from_model(native).load()


@pytest.mark.parametrize("kind", ["tuned", "jacobian"])
@pytest.mark.parametrize("backend", ["scripted", "transformers", "nnsight", "transformer_lens"])
def test_every_backend_reads_with_a_lens(backend: str, kind: str) -> None:
    """By hand from the rows that the same backend shows; the last layer is the model itself."""
    model = model_of(backend)
    kept, own, found = see(
        model, [Capture("resid_post", Keep()), Capture("logits", NextToken(5)), *captures(kind)], BATCH
    )
    weights, unembed = weights_of(lens(kind), torch.device("cpu")), model.unembed
    rows = torch.as_tensor(kept["value"].values)
    with torch.no_grad():
        read = [weights.translate(i, h) for i, h in enumerate(rows)]
        logits = [unembed.finish(unembed.norm(h) @ unembed.weight.T).numpy().astype(np.float64) for h in read]
    for layer in range(N_LAYERS):
        expected = readout(logits[layer], BATCH.next_ids, 5, logits[-1])
        for name in ("entropy_nats", "logprob_nats", "kl_nats", "top_logprob"):
            assert_close(found[name].values[layer], expected[name], atol=1e-4, what=f"{name} of layer {layer}")
    for name in ("entropy_nats", "logprob_nats", "top_logprob"):
        assert_close(found[name].values[-1], own[name].values, atol=1e-5, what=name)
    assert (found["kl_nats"].values[-1] == 0).all()


def test_lenses_share_a_pass_and_do_not_mix() -> None:
    """Three readouts of one pass are what each gives alone."""
    model = model_of("transformers")
    together = see(model, captures("", "tuned", "jacobian"), BATCH)
    for kind, found in zip(("", "tuned", "jacobian"), together, strict=True):
        assert_same(found, see(model, captures(kind), BATCH)[0], what=kind)
    assert np.abs(together[0]["kl_nats"].values - together[1]["kl_nats"].values)[:-1].max() > 0.1


@pytest.mark.parametrize(
    "sizes", [{"TOKENS": 1, "ROWS": 1, "STRIP": 1}, {"TOKENS": 7, "ROWS": 20, "STRIP": 3}], ids=str
)
def test_chunk_law(sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("scripted")
    whole = see(model, captures("tuned"), BATCH)[0]
    for name, size in sizes.items():
        monkeypatch.setattr(vocab_rows, name, size)
    assert_same(see(model, captures("tuned"), BATCH)[0], whole, rtol=5e-6)


def test_merge_and_padding_laws() -> None:
    """Any micro-batches, in any order, with padding or without: the same readout."""
    model = model_of("transformers")
    alone = see(model, captures("tuned"), BATCH, [[i] for i in range(len(BATCH))])[0]
    assert_same(see(model, captures("tuned"), BATCH)[0], alone, rtol=2e-5)
    assert_same(see(model, captures("tuned"), BATCH, [[3, 0], [2, 1]])[0], alone, rtol=2e-5)


def test_tiles_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of accelerators, run here."""
    from probekit.backends import capture_pass

    model = model_of("transformers")
    plain = see(model, captures("tuned"), BATCH)[0]
    eager = functools.partial(stream_readout_tiles, compiled=False)
    monkeypatch.setattr(vocab_tiles, "DEVICE_TILE", 50)
    monkeypatch.setattr(capture_pass, "stream_readout", eager)
    assert_same(see(model, captures("tuned"), BATCH)[0], plain, rtol=2e-5)


@pytest.mark.parametrize(("dtype", "unit"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_half_precision(dtype: str, unit: float) -> None:
    """Translated in float32 and rounded once, from the very rows that the half-precision model had."""
    module = copy_of("llama-grouped").to(getattr(torch, dtype))
    model = TransformersModel.from_loaded(module, words_tokenizer()).load()
    kept, found = see(model, [Capture("resid_post", Keep()), *captures("tuned")], BATCH)
    weights = weights_of(lens(), torch.device("cpu"))
    half = getattr(torch, dtype)
    rows = torch.as_tensor(kept["value"].values)
    exact = [rows[i] + rows[i] @ weights.matrices[i].T + weights.biases[i] for i in range(N_LAYERS - 1)]
    with torch.no_grad():
        read = [module.lm_head(module.model.norm(h.to(half))).double().numpy() for h in [*exact, rows[-1]]]
    for layer in range(N_LAYERS):
        step = unit * np.abs(read[layer]).max()
        expected = readout(read[layer], BATCH.next_ids, 5, read[-1])
        for name in ("entropy_nats", "logprob_nats", "kl_nats", "top_logprob"):
            assert_close(found[name].values[layer], expected[name], atol=2 * step, what=f"{name} of {layer}")
    assert (found["kl_nats"].values[-1] == 0).all()


def test_the_plan_counts_the_lens(tmp_path: Path) -> None:
    """Its matrices and its name; the logit lens has neither."""
    kept = random_lens(tmp_path / "mine", N_LAYERS, D_MODEL)
    (analysis,) = get_analyses("logit-lens")
    info, plans = model_of("scripted").info, []
    for folder in ("", str(tmp_path / "mine")):
        job = Job(analysis, analysis.Params.parse({"lens": folder}, "logit-lens"))
        plans += first_plan([job], info, BATCH, memory_limit=1 << 30)
    assert plans[1].peak_bytes - plans[0].peak_bytes == kept.memory_bytes > 4 * 2 * D_MODEL**2
    assert plans[0].captures == ("resid_post:readout(top_k=10)",)
    assert plans[1].captures == (f"resid_post:readout(top_k=10, lens=tuned:{kept.digest[:12]})",)


def test_references_are_data(tmp_path: Path) -> None:
    """The same weights elsewhere are the same request; others are not."""
    one, two = (random_lens(tmp_path / name, N_LAYERS, D_MODEL) for name in ("one", "two"))
    other = random_lens(tmp_path / "other", N_LAYERS, D_MODEL, scale=0.5)
    assert one == two and hash(one) == hash(two) and Readout(5, one) == Readout(5, two)
    assert len({Readout(5), Readout(5, one), Readout(5, two), Readout(5, other)}) == 3
    requests = {Forward((Capture("resid_post", Readout(5, found)),)) for found in (one, two, other)}
    assert len(requests) == 2


def test_a_replayed_trace_knows_which_lens_it_holds(tmp_path: Path) -> None:
    from probekit.backends.replay import ReplayModel
    from probekit.engine import run_pass

    trace, _ = run_pass(model_of("scripted"), Forward(tuple(captures("tuned"))), BATCH)
    again = ReplayModel(trace)
    assert_same(see(again, captures("tuned"), BATCH)[0], trace[captures("tuned")[0]])
    with pytest.raises(CapabilityError, match="has no resid_post:readout"):
        see(again, captures("jacobian"), BATCH)


def test_the_report_of_a_run_says_which_lens_reads(tmp_path: Path) -> None:
    """Heading, claims, figures and captions; a stored result says it too, without the lens at hand."""
    import shutil

    import probekit as pk

    random_lens(tmp_path / "of-the-test", N_LAYERS, D_MODEL)
    results = run(
        "logit-lens",
        model_of("transformers"),
        BATCH.select([0, 2, 3]),
        lens=str(tmp_path / "of-the-test"),
        lens_transfer=True,
    )
    page = pk.report(results, tmp_path / "report").read_text()
    shutil.rmtree(tmp_path / "of-the-test")
    stored = pk.load_result(tmp_path / "report", "logit-lens")
    assert stored.analysis.heading(stored) == "Tuned lens of-the-test"
    assert page.count("Tuned lens of-the-test") >= 2  # heading and cards
    assert all("tuned lens of-the-test" in f.claim or "uniform" in f.claim for f in stored.findings)
    for name, drawing in stored.figures().items():
        assert "tuned lens of-the-test" in drawing.caption, name
    plain = run("logit-lens", model_of("transformers"), BATCH.select([0, 2, 3]))["logit-lens"]
    assert plain.analysis.heading(plain) == "Logit lens"
    assert not any("tuned" in f.claim for f in plain.findings)
    assert set(plain.figures()) == set(stored.figures())

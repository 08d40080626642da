"""Half precision, models spread over devices or offloaded, quantised weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from click.testing import CliRunner
from helpers import (
    EVERYTHING,
    WINDOW,
    assert_close,
    assert_same,
    reducer_classes,
    see,
    texts_of,
    tiny_config,
    tiny_model,
    windows_of,
    words_tokenizer,
)
from reference import allowed, attention_maps, attention_stats, readout, received_within
from torch import Tensor, nn

from probekit.backends import capture_pass
from probekit.backends.capture_pass import CapturePass, through
from probekit.backends.transformers import TransformersModel
from probekit.backends.transformers.weights import hash_of, resident
from probekit.cli import cli
from probekit.core import (
    Add,
    Batch,
    Capture,
    Forward,
    InputError,
    LogitDifference,
    ModelError,
    Patch,
    SelfCheckError,
    UnknownName,
)
from probekit.models import open_model
from probekit.reduce import (
    AtPosition,
    AttentionStats,
    Keep,
    LocalAttention,
    LogitDirection,
    Maps,
    MedianMagnitude,
    NextToken,
    Norm,
    Readout,
    ReceivedWithin,
    TopMagnitudes,
)
from probekit.reduce.attention_blocks import AttentionMath, stream_attention
from probekit.reduce.vocab_tiles import stream_readout_tiles

HALF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # largest relative rounding of one number
KINDS = ("llama-grouped", "gpt2", "mistral")
HORIZON, LAST = 16, 2
REDUCERS = (Keep(), Norm(), TopMagnitudes(3), MedianMagnitude(), AtPosition(-2))
ATTENTION = (AttentionStats(), ReceivedWithin(HORIZON), LocalAttention(5))
CAPTURES = (
    *(Capture("resid_post", r) for r in REDUCERS),
    *(Capture("pattern", r) for r in ATTENTION),
    Capture("resid_post", Readout(5)),
    Capture("logits", NextToken(5)),
    Capture("logits", Keep()),
    *(Capture(site, Keep()) for site in ("q", "k", "resid_pre", "attn_out", "mlp_out")),
    *(Capture(site, LogitDirection("target")) for site in ("resid_pre", "attn_out", "mlp_out", "logits")),
)


def copy_of(kind: str) -> Any:
    """A fresh module with the weights of the tiny model of a family."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_config(tiny_config(kind)).eval()
    module.load_state_dict(tiny_model(kind).module.state_dict())
    return module


@functools.cache
def seen_in(kind: str, dtype: str, rounded_to: str) -> dict[str, xr.Dataset]:
    """What a model shows with weights rounded to one type and everything computed in another."""
    module = copy_of(kind).to(getattr(torch, rounded_to)).to(getattr(torch, dtype))
    model = TransformersModel.from_loaded(module, words_tokenizer()).load()
    assert model.info.dtype == dtype
    return {c.key: d for c, d in zip(CAPTURES, see(model, CAPTURES, batch()), strict=True)}


def batch() -> Batch:
    return texts_of([37, 20], n_vocab=128)


def texts(data: xr.DataArray) -> list[np.ndarray]:
    """Values of each text, the token axis first, float64."""
    moved = data.transpose("token", ...)
    return [moved.values[data["text"].values == i].astype(np.float64) for i in range(len(batch()))]


every_half = pytest.mark.parametrize("dtype", HALF)
every_kind = pytest.mark.parametrize("kind", KINDS)


def test_every_reducer_is_covered() -> None:
    """Maps are the probabilities that the other attention reducers are computed from; one text at a time."""
    assert {type(c.reducer) for c in CAPTURES} == reducer_classes() - {Maps}


@every_half
@every_kind
def test_rows_are_reduced_in_float32(kind: str, dtype: str) -> None:
    """From the very activations that the half-precision model had: exact choices, sums to float32's precision."""
    seen = seen_in(kind, dtype, dtype)
    rows = seen[Capture("resid_post", Keep()).key]["value"]
    half = torch.as_tensor(rows.values)
    assert torch.equal(half, half.to(getattr(torch, dtype)).float()), "these are no half-precision numbers"
    exact = rows.values.astype(np.float64)
    assert_close(seen[CAPTURES[1].key]["norm"], np.linalg.norm(exact, axis=-1), rtol=1e-6)
    top = -np.sort(-np.abs(exact), axis=-1)[..., :3]
    assert_close(np.abs(seen[CAPTURES[2].key]["value"]), top)
    for i, text in enumerate(texts(rows)):
        assert_close(seen[CAPTURES[3].key]["median"].sel(text=i), np.median(np.abs(text), axis=(0, 2)), rtol=1e-6)
        assert_close(seen[CAPTURES[4].key]["value"].sel(text=i), text[-2])


@every_half
@every_kind
def test_attention_is_reduced_in_float32(kind: str, dtype: str) -> None:
    """From the very queries and keys of the half-precision model. 1e-3: a flash kernel's log-sums are its own."""
    seen = seen_in(kind, dtype, dtype)
    q, k = (texts(seen[Capture(site, Keep()).key]["value"]) for site in ("q", "k"))
    found = {type(r): seen[Capture("pattern", r).key] for r in ATTENTION}
    for i, n in enumerate(batch().lengths):
        here = {r: d.isel(token=np.flatnonzero(d["text"].values == i)) for r, d in found.items()}
        for layer, window in enumerate(windows_of(kind)):
            see_pairs = allowed(n, window)
            heads = [x[i][:, layer].transpose(1, 0, 2) for x in (q, k)]
            maps = attention_maps(heads[0], heads[1], see_pairs, heads[0].shape[-1] ** -0.5)
            own = here[AttentionStats].sel(layer=layer)
            for name, expected in attention_stats(maps, see_pairs).items():
                assert_close(own[name].values, expected, atol=1e-3, what=f"{name} of layer {layer}")
            within = here[ReceivedWithin].sel(layer=layer)
            expected = received_within(maps, see_pairs, HORIZON)["received"]
            assert_close(within["received"].values, expected, atol=1e-3)
            near = np.tril(maps, -1).sum(-1) - np.tril(maps, -6).sum(-1)
            assert_close(here[LocalAttention].sel(layer=layer)["local_share"].values, near, atol=1e-3)
    assert min(batch().lengths) > WINDOW, "no text is long enough for the window to matter"


@every_half
@every_kind
def test_the_lens_is_reduced_in_float32(kind: str, dtype: str) -> None:
    """From the model's own half-precision logits, which are what it returns; norm and product are its own."""
    seen = seen_in(kind, dtype, dtype)
    module = copy_of(kind).to(getattr(torch, dtype))
    norm = module.get_submodule(tiny_model(kind).model.architecture.final_norm)
    rows = torch.as_tensor(seen[Capture("resid_post", Keep()).key]["value"].values).to(getattr(torch, dtype))
    with torch.no_grad():
        logits = module.get_output_embeddings()(norm(rows)).double().numpy()
    step = HALF[dtype] * np.abs(logits).max()  # products of other shapes may round a logit to a neighbour
    assert_close(seen[Capture("logits", Keep()).key]["value"].values, logits[LAST], atol=2 * step)
    lens = seen[Capture("resid_post", Readout(5)).key]
    for layer in range(LAST + 1):
        expected = readout(logits[layer], batch().next_ids, 5, final=logits[LAST])
        for name in ("entropy_nats", "logprob_nats", "kl_nats", "top_logprob"):
            assert_close(lens[name].sel(layer=layer).values, expected[name], atol=4 * step, what=f"{name} of {layer}")
    given = seen[Capture("logits", Keep()).key]["value"].values
    own, exact = seen[Capture("logits", NextToken(5)).key], readout(given, batch().next_ids, 5)
    for name in ("entropy_nats", "varentropy_nats2", "logprob_nats", "target_rank", "top_logprob"):
        assert_close(own[name].values, exact[name], rtol=2e-5, atol=2e-5, what=name)


@every_half
@every_kind
def test_direct_attribution_adds_up(kind: str, dtype: str) -> None:
    """What the sub-layers and the biases add is the difference of the two logits, to half precision."""
    seen = seen_in(kind, dtype, dtype)
    parts = {site: seen[Capture(site, LogitDirection("target")).key]["projection"] for site in ("attn_out", "mlp_out")}
    start = seen[Capture("resid_pre", LogitDirection("target")).key]["projection"].sel(layer=0)
    biases = seen[Capture("logits", LogitDirection("target")).key]["projection"]
    total = start + sum(p.sum("layer") for p in parts.values()) + biases
    logits = seen[Capture("logits", Keep()).key]["value"].values.astype(np.float64)
    top, follows = np.argsort(-logits, -1), batch().next_ids
    rows, known = np.arange(len(logits)), follows >= 0
    other = np.where(top[:, 0] == follows, top[:, 1], top[:, 0])
    expected = np.where(known, logits[rows, follows] - logits[rows, other], np.nan)
    assert_close(total.values, expected, atol=16 * HALF[dtype] * np.abs(logits).max())


@every_kind
def test_half_precision_comes_close_to_float32_with_the_same_rounded_weights(kind: str) -> None:
    """What remains is the rounding of activations on the way; it shrinks with the type's precision."""
    off: dict[str, dict[str, float]] = {}
    for dtype, unit in HALF.items():
        found, exact = seen_in(kind, dtype, dtype), seen_in(kind, "float32", dtype)
        off[dtype] = {}
        for capture in CAPTURES:
            for name, values in exact[capture.key].data_vars.items():
                if name in ("top_id", "dim", "target_rank", "value") and capture.point.site != "resid_post":
                    continue
                if name in ("top_id", "dim", "target_rank", "seen") or isinstance(capture.reducer, LogitDirection):
                    continue  # choices among near ties; a random pair of ids may differ with the likeliest one
                if isinstance(capture.reducer, TopMagnitudes):
                    values, other = np.abs(values), np.abs(found[capture.key][name])
                else:
                    other = found[capture.key][name]
                size = float(np.nanmax(np.abs(values)))
                gap = np.abs(other.values.astype(np.float64) - values.values)
                off[dtype][f"{capture.key} {name}"] = float(np.nanmax(gap)) / size / unit
        worst = max(off[dtype], key=lambda key: off[dtype][key])
        assert off[dtype][worst] < 30, (worst, off[dtype][worst])
    # The same multiple of an eightfold finer unit: where both err, float16 errs less.
    ratios = [off["float16"][k] / off["bfloat16"][k] for k in off["bfloat16"] if off["bfloat16"][k] > 0]
    assert np.median(ratios) < 3, np.median(ratios)


@every_half
def test_the_self_check_of_half_precision_still_notices(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TransformersModel.from_loaded(copy_of("llama").to(getattr(torch, dtype)), words_tokenizer())
    logits = TransformersModel.own_logits
    monkeypatch.setattr(TransformersModel, "own_logits", lambda self, batch: 1.1 * logits(self, batch))
    with pytest.raises(SelfCheckError, match="the lens at the last layer"):
        model.load()


def test_dtype_is_an_option_and_is_shown(tiny_folder: Path, tmp_path: Path) -> None:
    for dtype in HALF:
        assert open_model(tiny_folder, dtype=dtype).info.dtype == dtype
    words = ["run", "token-uncertainty", "--model", str(tiny_folder), "--text", "w3 w4 w5 w6", "--dtype", "bfloat16"]
    result = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["model"]["dtype"] == "bfloat16"
    assert "begins    no token for it: '<s>' (id 1) exists, and was not added" in result.output


# --- devices ---


def offloaded(how: str, folder: Path) -> Any:
    from accelerate import cpu_offload, disk_offload

    if how == "cpu":
        return cpu_offload(copy_of("llama-grouped"), execution_device=torch.device("cpu"))
    return disk_offload(copy_of("llama-grouped"), str(folder), execution_device=torch.device("cpu"))


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloaded_weights_give_the_same_numbers(how: str, tmp_path: Path) -> None:
    """Bit for bit: captures, the lens, patches, gradients, hashes, generation; and the weights are away again."""
    module, plain, few = offloaded(how, tmp_path), tiny_model("llama-grouped").model, texts_of([20, 9])
    assert {p.device.type for p in module.parameters()} == {"meta"}
    model: Any = open_model((module, words_tokenizer()))
    assert (model.info.device, model.info.n_params) == ("offloaded", plain.info.n_params)
    assert model.weights_hash() == plain.weights_hash()
    gradient = Forward(
        (Capture("resid_mid", Keep()), Capture("z.1", Norm())), gradient_of=LogitDifference((5, 6), (7, -1), -1)
    )
    patched = Forward(EVERYTHING, (Patch("resid_post.0", Add(np.ones(32), 2.0), [3]),))
    for request in (Forward(EVERYTHING), gradient, patched):
        for found, expected in zip(model.execute(request, few), plain.execute(request, few), strict=True):
            for name, values in expected.arrays.items():
                np.testing.assert_array_equal(found.arrays[name], values, err_msg=f"{request.patches} {name}")
    assert model.generate(few, 3).batch.ids.tolist() == plain.generate(few, 3).batch.ids.tolist()
    assert {p.device.type for p in module.parameters()} == {"meta"}


def test_a_device_map_places_parts_and_gives_the_same_numbers(tiny_folder: Path) -> None:
    parts = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    spread = {name: "cpu" for name in parts} | {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    plain, few = open_model(tiny_folder), texts_of([20, 9])
    expected = see(plain, EVERYTHING, few)
    for device_map, device in (({"": "cpu"}, "cpu"), (spread, "cpu, offloaded to disk")):
        model: Any = open_model(tiny_folder, device_map=device_map)
        assert model.info.device == device
        assert model.weights_hash() == plain.weights_hash()  # type: ignore[attr-defined]
        for found, same in zip(see(model, EVERYTHING, few), expected, strict=True):
            assert_same(found, same)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device_map": "automatic"}, UnknownName, "device_map"),
        ({"device_map": {}}, InputError, "expected one of auto, balanced"),
        ({"device_map": 3}, InputError, "Found the device_map 3"),
        ({"device_map": "auto", "device": "cpu"}, InputError, "give one of them"),
        ({"device_map": "auto", "backend": "nnsight"}, InputError, "works with the transformers backend"),
    ],
)
def test_device_maps_that_cannot_be_are_refused(
    options: dict[str, Any], error: type[Exception], message: str, tiny_folder: Path
) -> None:
    with pytest.raises(error, match=message):
        open_model(tiny_folder, lazy=True, **options)
    with pytest.raises(InputError, match="loaded already"):
        open_model((tiny_model("llama").module, words_tokenizer()), device_map="auto")


def test_the_command_line_takes_a_device_map(tiny_folder: Path, tmp_path: Path) -> None:
    words = ["run", "token-uncertainty", "--model", str(tiny_folder), "--text", "w3 w4 w5 w6", "--out"]
    for given, code, said in (('{"": "cpu"}', 0, "Report:"), ("{x", 2, "not valid JSON"), ("autp", 2, "auto")):
        result = CliRunner().invoke(cli, [*words, str(tmp_path / "out"), "--device-map", given])
        assert (result.exit_code, said in result.output) == (code, True), result.output


DEVICES = ("meta", "cpu", "meta")  # of the blocks


class Unembed:
    """A final norm whose input lives where the last block ends, and an unembedding on the first device."""

    def __init__(self) -> None:
        self.weight, self.bias = torch.empty(128, 32, device="meta"), None

    def norm(self, rows: Tensor) -> Tensor:
        return rows.to(self.weight.device)

    def finish(self, logits: Tensor) -> Tensor:
        return logits


class Spread:
    """Sizes of a tiny model whose blocks alternate between two devices."""

    info = tiny_model("llama-grouped").model.info

    def __init__(self) -> None:
        self.unembed = Unembed()


def spread_pass(few: Batch) -> CapturePass:
    """Show a pass the activations of blocks that lie on "meta" and on the CPU in turn."""
    sites = [Capture(s, Keep()) for s in ("resid_pre", "attn_out", "q", "mlp_act")]
    want = CapturePass(Spread(), Forward((*EVERYTHING, *sites)), few, None, torch.device("cpu"))
    longest = max(few.lengths)
    for (site, layer), taps in want.taps().items():
        shape = {"q": (4, 8), "mlp_act": (48,)}.get(site, (32,))
        through(taps, torch.zeros(len(few), longest, *shape, device=DEVICES[layer]))
    for layer in sorted(want.watched):
        q, k, v = (torch.zeros(len(few), n, longest, 8, device=DEVICES[layer]) for n in (4, 2, 2))
        how = AttentionMath(scaling=1.0)
        stream_attention(q, k, v, how, few.lengths, functools.partial(want.on_block, layer))
    want._gather()
    want._readout()
    return want


def test_blocks_on_two_devices_meet_at_the_unembedding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on "meta" have a shape and no numbers, and refuse to be mixed with others, as an accelerator's do."""
    tiles = functools.partial(stream_readout_tiles, compiled=False)
    monkeypatch.setattr(capture_pass, "stream_readout_tiles", tiles)
    few = texts_of([20, 9])
    want = spread_pass(few)
    shapes = {r.reducer.key: {f: tuple(r.recorded(f).shape) for f in r.reducer.fields()} for r in want.recorders}
    assert shapes[Readout(5).key]["kl_nats"] == (3, 29)
    assert shapes[AttentionStats().key]["received"] == (3, 2, 4, 20)
    assert {x.device.type for x in want.residuals.values()} == {"meta"}
    monkeypatch.setattr(CapturePass, "_gather", lambda self: None)
    with pytest.raises(RuntimeError, match="device"):
        spread_pass(few)


# --- quantised weights ---


class Int8Linear(nn.Module):
    """A linear layer that keeps integers and a scale per row, and never the product of both."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, rows: Tensor) -> Tensor:
        return (rows @ self.qweight.to(rows.dtype).T) * self.scale[:, 0]


class PackedTensor(Tensor):
    """A stand-in for packed tensors: it looks like floats, is made of integers, and must not be unpacked."""

    ints: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, ints: Tensor, scale: Tensor) -> PackedTensor:
        made = Tensor._make_wrapper_subclass(cls, ints.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.ints, made.scale = ints, scale
        return made  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["ints", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} would unpack the weights")


def quantised(*, head: bool = False) -> tuple[Any, Any]:
    """A tiny model with 8-bit blocks, and a plain one with the same weights unpacked."""
    module, plain = copy_of("llama-grouped"), copy_of("llama-grouped")
    for name, linear in list(module.named_modules()):
        if isinstance(linear, nn.Linear) and (head or name != "lm_head"):
            packed, (path, _, own) = Int8Linear(linear), name.rpartition(".")
            setattr(module.get_submodule(path), own, packed)
            with torch.no_grad():
                plain.get_submodule(name).weight.copy_(packed.qweight * packed.scale)
    module.config.quantization_config = {"quant_method": "stand-in"}
    return module, plain


def test_a_quantised_model_is_captured_as_it_computes() -> None:
    """A stand-in for the kernels of real libraries: statistics are those of the same weights, unpacked."""
    module, plain = quantised()
    model: Any = open_model((module, words_tokenizer()))
    unpacked: Any = open_model((plain, words_tokenizer()))
    assert model.info.n_params == unpacked.info.n_params, "packed entries are no parameters"
    found, expected = (see(m, EVERYTHING, texts_of([20, 9])) for m in (model, unpacked))
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs, rtol=1e-4)


def test_a_quantised_hash_sees_every_integer_and_scale() -> None:
    module, plain = quantised()
    model: Any = open_model((module, words_tokenizer()))
    before = model.weights_hash()
    assert before == model.weights_hash(fresh=True) != open_model((plain, words_tokenizer())).weights_hash()  # type: ignore[attr-defined]
    layer = module.model.layers[1].mlp.up_proj
    for change in (layer.qweight, layer.scale):
        kept = change.clone()
        change[0, 0] += 1
        assert model.weights_hash(fresh=True) != before
        change.copy_(kept)
    assert model.weights_hash(fresh=True) == before


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # torch is about to give these types up
def test_packed_tensors_are_hashed_without_unpacking() -> None:
    """By the tensors that they are made of, in every form that torch knows."""
    ints, scale = torch.arange(-6, 6, dtype=torch.int8).view(3, 4), torch.tensor([0.5, 0.25, 1.0])
    forms: list[Callable[[Tensor, Tensor], Any]] = [
        PackedTensor,
        lambda i, s: torch._make_per_channel_quantized_tensor(i, s.double(), torch.zeros(3, dtype=torch.long), 0),
        lambda i, s: torch._make_per_tensor_quantized_tensor(i, float(s[0]), 0),
        lambda i, s: (i, s, None, torch.qint8),
    ]
    hashes = []
    for form in forms:
        plain, again = hash_of({"w": form(ints, scale)}), hash_of({"w": form(ints.clone(), scale.clone())})
        others = [hash_of({"w": form(ints + 1, scale)}), hash_of({"w": form(ints, 2 * scale)})]
        assert plain == again and plain not in others
        hashes.append(plain)
    assert len(set(hashes)) == len(forms)
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.uint8):
        assert hash_of({"w": torch.ones(3).to(dtype)}) != hash_of({"w": torch.zeros(3).to(dtype)})
    with pytest.raises(ModelError, match="'w' is a object"):
        hash_of({"w": object()})


def test_a_quantised_unembedding_is_refused() -> None:
    module, _ = quantised(head=True)
    with pytest.raises(ModelError, match=r"unembedding \(Int8Linear\) is quantised.*lm_head"):
        open_model((module, words_tokenizer()))


def test_weights_that_are_nowhere_are_refused() -> None:
    with torch.device("meta"):
        layer = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="nobody says where they are kept"):
        resident(layer, "weight")

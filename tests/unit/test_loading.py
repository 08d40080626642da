"""Models spread over devices or offloaded, and quantised weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import (
    EVERYTHING,
    assert_same,
    copy_of,
    see,
    texts_of,
    tiny_model,
    words_tokenizer,
)
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from probekit.backends import capture_pass
from probekit.backends.capture_pass import CapturePass, through
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
    UnknownName,
)
from probekit.models import open_model
from probekit.reduce import (
    AttentionStats,
    Keep,
    Norm,
    Readout,
)
from probekit.reduce.attention_blocks import AttentionMath, stream_attention
from probekit.reduce.vocab_tiles import stream_readout_tiles


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


class OneDevice(TorchDispatchMode):
    """Refuses what accelerators refuse: operations, other than copies, on tensors of several devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim]
        if len({x.device for x in tensors}) > 1 and "copy" not in str(func):
            raise RuntimeError(f"{func}: tensors on more than one device")
        return func(*args, **(kwargs or {}))


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
    """Tensors on "meta" have a shape and no numbers, and a mode refuses to mix them, as accelerators do."""
    tiles = functools.partial(stream_readout_tiles, compiled=False)
    monkeypatch.setattr(capture_pass, "stream_readout_tiles", tiles)
    few = texts_of([20, 9])
    with OneDevice():
        want = spread_pass(few)
    shapes = {r.reducer.key: {f: tuple(r.recorded(f).shape) for f in r.reducer.fields()} for r in want.recorders}
    assert shapes[Readout(5).key]["kl_nats"] == (3, 29)
    assert shapes[AttentionStats().key]["received"] == (3, 2, 4, 20)
    assert {x.device.type for x in want.residuals.values()} == {"meta"}
    monkeypatch.setattr(CapturePass, "_gather", lambda self: None)
    with OneDevice(), pytest.raises(RuntimeError, match="more than one device"):
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

"""Adapters made with peft: opened as part of a model, refused where they do not fit, made without touching the base."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import copy_of, random_weights, tiny_model, words_tokenizer
from tiny_configs import KINDS

from probekit.backends.transformers import TransformersModel
from probekit.backends.transformers.adapters import lora_twin, mlp_matrices
from probekit.core import CapabilityError, InputError, ModelError, ModelNotFound, ProbekitError
from probekit.models import open_model

# What peft itself asks of transformers, where a test calls it directly; probekit's own calls are quiet.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.tensor([[1, 5, 9, 77, 30, 4, 11, 90]])


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=IDS, use_cache=False).logits


def saved_base(module: Any, folder: Path) -> Path:
    module.save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return folder


def made_by_peft(base: Path, folder: Path, **config: Any) -> torch.Tensor:
    """An adapter with random matrices, saved by peft on its own; returns the logits of the model that it makes."""
    import peft
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(base)
    how = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False} | config
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(module, peft.LoraConfig(**how)).eval()
    wrapped.save_pretrained(folder)
    return logits(wrapped)


def test_a_merge_that_goes_wrong_is_noticed(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.layer import Linear

    own = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: 0.9 * own(self, name))
    with pytest.raises(ModelError, match="does not say what it says with the adapter beside it"):
        open_model(adapter)


@pytest.fixture
def base(tiny_folder: Path) -> Path:
    return tiny_folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    made_by_peft(base, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("kind", ["llama-grouped", "gpt2", "qwen2"])
@pytest.mark.parametrize("how", [{}, {"use_rslora": True, "lora_alpha": 3}, {"use_dora": True}])
def test_merged_model_is_the_unmerged_one(kind: str, how: dict[str, Any], tmp_path: Path) -> None:
    base = saved_base(copy_of(kind), tmp_path / "base")
    how = how | ({"fan_in_fan_out": True} if kind == "gpt2" else {})
    expected = made_by_peft(base, tmp_path / "adapter", **how)
    model: Any = open_model(tmp_path / "adapter")
    plain: Any = open_model(base)
    scale = expected.abs().max()
    assert (logits(model.module) - expected).abs().max() <= 1e-5 * scale
    assert (logits(plain.module) - expected).abs().max() > 0.05 * scale, "the adapter changes something"
    assert model.weights_hash() != plain.weights_hash()
    assert not any("lora" in name for name, _ in model.module.named_modules())
    assert all(p.requires_grad for p in model.module.parameters())


def test_record_says_what_was_merged(base: Path, adapter: Path) -> None:
    model: Any = open_model(str(adapter), lazy=True)
    assert model.info.name == str(adapter)
    told = model.load().provenance()["weights"]
    assert told.startswith("raw (nothing folded or centred); the LORA adapter in ") and str(base) in told
    assert "nothing folded or centred)" in open_model(base).provenance()["weights"]


def test_pytorch_files_and_modules_that_were_trained_whole_open_too(base: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    wrapped = peft.get_peft_model(module, config).eval()
    random_weights(wrapped.base_model.model.lm_head.modules_to_save["default"], 5)
    wrapped.save_pretrained(tmp_path / "a", safe_serialization=False)
    assert (tmp_path / "a" / "adapter_model.bin").exists()
    model: Any = open_model(tmp_path / "a")
    expected = logits(wrapped)
    assert (logits(model.module) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_an_adapter_on_an_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    made_by_peft(base, tmp_path / "second")
    edit(tmp_path / "second", base_model_name_or_path=str(adapter))
    hashes = {open_model(path).provenance()["weights_hash"] for path in (base, adapter, tmp_path / "second")}
    assert len(hashes) == 3
    edit(tmp_path / "second", base_model_name_or_path=str(tmp_path / "second"))
    with pytest.raises(ModelError, match="names itself as its base"):
        open_model(tmp_path / "second")


def remove_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


def break_json(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{")


def cut_weights(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-200])


def _rewrite(adapter: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def drop_a_matrix(adapter: Path) -> None:
    _rewrite(adapter, lambda found: dict(sorted(found.items())[1:]))


def add_a_layer(adapter: Path) -> None:
    _rewrite(adapter, lambda found: found | {k.replace("layers.2.", "layers.7."): v.clone() for k, v in found.items()})


def other_shape(adapter: Path) -> None:
    _rewrite(adapter, lambda found: {k: torch.zeros(v.shape[0] + 1, v.shape[1]) for k, v in found.items()})


def not_a_number(adapter: Path) -> None:
    _rewrite(adapter, lambda found: {k: v * float("nan") for k, v in found.items()})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_weights, "no weights beside it"),
        (break_json, "no readable adapter configuration"),
        (lambda a: edit(a, base_model_name_or_path=None), "does not say which model"),
        (lambda a: edit(a, base_model_name_or_path="/nowhere/at all"), "'/nowhere/at all', which cannot be found"),
        (lambda a: edit(a, base_model_name_or_path="smollm2-135m"), "Did you mean 'smollm2-135m-instruct'"),
        (lambda a: edit(a, task_type="SEQ_CLS"), "the task SEQ_CLS; expected one of a decoder"),
        (lambda a: edit(a, layer_replication=[[0, 2]]), "repeats blocks"),
        (lambda a: edit(a, target_modules=["nothing"]), "cannot be merged into its base"),
        (lambda a: edit(a, peft_type="SOMETHING_NEW"), "cannot be merged into its base"),
        (cut_weights, "cannot be merged into its base"),
        (drop_a_matrix, "1 weights that the base has a place for are missing"),
        (add_a_layer, "have no place in the base, such as"),
        (other_shape, "cannot be merged into its base"),
        (not_a_number, "cannot be merged into its base"),
    ],
)
def test_damaged_and_foreign_adapters_are_refused(adapter: Path, spoil: Any, message: str) -> None:
    spoil(adapter)
    with pytest.raises(ProbekitError, match=message):
        open_model(adapter)


def test_a_base_that_is_gone_is_named_and_how_to_mend_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    edit(adapter, base_model_name_or_path=str(tmp_path / "moved"))
    with pytest.raises(
        ModelNotFound, match=r"put its new place into 'base_model_name_or_path' of .*adapter_config.json"
    ):
        open_model(adapter, lazy=True)
    shutil.copytree(base, tmp_path / "moved")
    assert open_model(adapter).info.n_layers == 3


def test_prompts_that_were_trained_cannot_be_merged(base: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    wrapped.save_pretrained(tmp_path / "prompts", save_embedding_layers=False)
    with pytest.raises(ModelError, match="cannot be merged; expected one that changes weights"):
        open_model(tmp_path / "prompts")


def test_options_of_opening(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_model(adapter, dtype="bfloat16").info.dtype == "bfloat16"
    with pytest.raises(InputError, match="merged on one device"):
        open_model(adapter, device_map="auto")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install 'probekit\[tune\]'"):
        open_model(adapter, lazy=True)


def test_a_folder_of_a_model_is_no_adapter(base: Path) -> None:
    assert not hasattr(open_model(base).module, "peft_config")
    with pytest.raises(InputError, match="name or path of a model"):
        open_model("")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama-grouped", ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
        ("gpt2", ["mlp.c_fc", "mlp.c_proj"]),
        ("opt", ["fc1", "fc2"]),
        ("gpt_neox", ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]),
        ("phi", ["mlp.fc1", "mlp.fc2"]),
        ("phi3", ["mlp.gate_up_proj", "mlp.down_proj"]),
    ],
)
def test_only_matrices_of_the_mlp_are_tuned(kind: str, expected: list[str]) -> None:
    """By the table of architectures; what peft finds by these names is in the MLP of every block, and nowhere else."""
    model = _tiny(kind)
    assert mlp_matrices(model) == expected
    twin = lora_twin(model, rank=2, alpha=4, dropout=0.0, base=("somewhere/else", ""))
    found = {name.split(".lora_")[0] for name, p in twin.named_parameters() if p.requires_grad}
    prefix = f"base_model.model.{model.architecture.layers}."
    assert found == {f"{prefix}{i}.{path}" for i in range(model.info.n_layers) for path in expected}


def _tiny(kind: str) -> TransformersModel:
    from transformers import AutoModelForCausalLM

    if kind == "llama-grouped":
        return tiny_model(kind).model
    module = AutoModelForCausalLM.from_config(KINDS[kind].config()).eval()
    return TransformersModel.from_loaded(module, words_tokenizer(), name=f"tiny-{kind}")


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_has_matrices_or_is_refused(kind: str) -> None:
    model = _tiny(kind)
    if model.architecture.down is None:
        with pytest.raises(CapabilityError, match="mixture of experts in the place of an MLP"):
            mlp_matrices(model)
    else:
        assert model.architecture.down in mlp_matrices(model) and len(mlp_matrices(model)) in (2, 3)


def test_twin_shares_numbers_and_nothing_else() -> None:
    model, fired = tiny_model("llama-grouped").model, []
    handle = model.module.register_forward_hook(lambda *_: fired.append(1))
    try:
        twin = lora_twin(model, rank=2, alpha=4, dropout=0.0, base=("somewhere/else", "abc"))
        shared = dict(twin.base_model.model.named_parameters())
        for name, own in model.module.named_parameters():
            other = shared.get(name, shared.get(name.replace(".weight", ".base_layer.weight")))
            assert other is not None and other.data_ptr() == own.data_ptr() and other is not own, name
            assert own.requires_grad and not other.requires_grad and own.grad is None
        twin(input_ids=IDS)
        assert not fired
        config = twin.active_peft_config
        assert (config.base_model_name_or_path, config.revision) == ("somewhere/else", "abc")
        assert model.module.config._name_or_path != "somewhere/else"
    finally:
        handle.remove()

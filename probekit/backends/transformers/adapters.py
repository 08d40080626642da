"""Adapters made with peft: merged into a model as it is loaded, and made on a copy that shares a model's weights.

peft takes seconds to import, so it is imported when an adapter is loaded or made, and not before.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import json
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from probekit.backends.self_check import TOLERANCE
from probekit.core import CapabilityError, ModelError

from .forward_pass import evaluating
from .model import TransformersModel
from .weights import is_quantised

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)
_N_CHECKED = 16  # tokens on which a merged model must say what the unmerged one says


@dataclass(frozen=True)
class Adapter:
    """A folder that holds an adapter, and the model it was made for.

    Args:
        folder: holds adapter_config.json and its weights.
        base: how the base model is called: a catalogue name, a hub id, or a path.
        revision: of the base model on the hub; "" for any.
        method: peft's name of the method, such as "LORA".
    """

    folder: Path
    base: str
    revision: str
    method: str

    @property
    def weights(self) -> Path:
        """The file with its weights."""
        return next(path for name in _WEIGHTS if (path := self.folder / name).is_file())


def read_adapter(folder: Path) -> Adapter:
    """What an adapter's folder says of itself; needs no peft.

    Raises:
        ModelError: a file is missing or damaged, or the adapter is of a kind that cannot be merged into a decoder.
    """
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        method, base = found["peft_type"], found.get("base_model_name_or_path")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / CONFIG} is no readable adapter configuration of peft: {error!r}.") from error
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise ModelError(
            f"{folder} holds {CONFIG} and no weights beside it; expected {' or '.join(_WEIGHTS)}, as peft's "
            "save_pretrained writes them."
        )
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{folder / CONFIG} does not say which model the adapter was made for; put its name, hub id or path into "
            "'base_model_name_or_path'."
        )
    if found.get("task_type") not in (None, "CAUSAL_LM"):
        raise ModelError(
            f"The adapter in {folder} was made for the task {found['task_type']}; expected one of a decoder (CAUSAL_LM)."
        )
    if found.get("layer_replication"):
        raise ModelError(f"The adapter in {folder} repeats blocks (layer_replication), which probekit does not open.")
    return Adapter(folder, base, str(found.get("revision") or ""), str(method))


def with_adapter(base: TransformersModel, adapter: Adapter, name: str) -> TransformersModel:
    """Another model: the base's configuration and tokenizer, its weights loaded anew with the adapter merged into them.

    Args:
        base: a model that loads its own weights, from a folder.
        adapter: what is merged.
        name: how the model is called.

    Raises:
        ModelError: peft is missing. At `load`: the adapter does not fit the base, is damaged or cannot be merged.
    """
    require_peft()
    digest = hashlib.sha256(adapter.weights.read_bytes()).hexdigest()
    note = f"the {adapter.method} adapter in {adapter.folder} (sha256:{digest[:12]}) merged into {base.info.name!r}"
    return base.changed(name, lambda module: merged(module, adapter), note)


def merged(module: Any, adapter: Adapter) -> Any:
    """A model with an adapter merged into its weights, which are changed in place.

    Raises:
        ModelError: the adapter does not fit, is damaged or cannot be merged; or the merged model does not say what the
            unmerged one says.
    """
    if is_quantised(module):
        raise ModelError(
            f"The base of the adapter in {adapter.folder} is quantised; merging would round what the adapter adds. "
            "Open the base in float32 or bfloat16."
        )
    peft, where, trained = _peft(), str(adapter.folder), [p for p in module.parameters() if p.requires_grad]
    config = module.config
    try:
        with _quiet():
            wrapped = peft.PeftModel.from_pretrained(module, where, torch_device=str(module.device))
        if wrapped.active_peft_config.is_prompt_learning:
            raise ModelError(
                f"The adapter in {where} ({adapter.method}) puts trained vectors before the text and leaves the weights "
                "alone, so it cannot be merged; expected one that changes weights, such as LoRA."
            )
        fit = wrapped.load_adapter(where, "default", torch_device=str(module.device))
        if fit.missing_keys or fit.unexpected_keys:
            raise ModelError(_misfit(adapter, fit.missing_keys, fit.unexpected_keys))
        ids = torch.linspace(0, min(config.get_text_config().vocab_size, 20_000) - 1, _N_CHECKED, device=module.device)
        before = _logits(wrapped, ids.long())
        whole = wrapped.merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"The adapter in {where} cannot be merged into its base {adapter.base!r}: {error}") from error
    for parameter in trained:
        parameter.requires_grad_(True)
    _check(adapter, before, _logits(whole, ids.long()), str(next(whole.parameters()).dtype).removeprefix("torch."))
    return whole


def _misfit(adapter: Adapter, missing: Sequence[str], strange: Sequence[str]) -> str:
    lack = f"{len(missing)} weights that the base has a place for are missing, such as {missing[0]}" if missing else ""
    more = f"{len(strange)} weights have no place in the base, such as {strange[0]}" if strange else ""
    return (
        f"The adapter in {adapter.folder} does not fit its base {adapter.base!r}: {' and '.join(filter(None, (lack, more)))}. "
        "The files are damaged, or the base is another model than the one it was made for."
    )


def _logits(module: Any, ids: Tensor) -> Tensor:
    with torch.no_grad(), evaluating(module):
        logits: Tensor = module(input_ids=ids[None], use_cache=False).logits[0]
    return logits.float()


def _check(adapter: Adapter, before: Tensor, after: Tensor, dtype: str) -> None:
    off = float((after - before).norm() / before.norm())
    if not off <= TOLERANCE.get(dtype, 0.1):  # half precision rounds the merged weights, not the added matrices
        raise ModelError(
            f"The base {adapter.base!r} with the adapter in {adapter.folder} merged into it does not say what it says with "
            f"the adapter beside it: logits differ by {off:.1%} of their norm."
        )


def require_peft() -> None:
    """Refuse at once, without the seconds that an import takes, where peft is missing.

    Raises:
        ModelError: it is.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError("Adapters need peft, which is not installed. Install it with: pip install 'probekit[tune]'")


def _peft() -> Any:
    require_peft()
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ModelError(
            f"Adapters need peft 0.21 or newer, which cannot be imported ({error}). Install it with: "
            "pip install 'probekit[tune]'"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings that are no news to the user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # they are looked for, and refused
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft's own way of asking
        yield


def mlp_matrices(model: TransformersModel) -> list[str]:
    """The weight matrices of a family's MLPs, as paths within a block, such as "mlp.up_proj".

    Raises:
        CapabilityError: the family has experts in the place of an MLP, or its MLP has no plain matrices.
    """
    row, block = model.architecture, model.part("", 0)
    if row.down is None:
        raise CapabilityError(
            f"{model.info.name!r} ({model.info.architecture}) has a mixture of experts in the place of an MLP; tuning MLP "
            "matrices is offered for models with one MLP in each block."
        )
    container = row.down.rpartition(".")[0]
    inside = block.get_submodule(container) if container else block
    own = {
        name: part
        for name, part in inside.named_children()
        if isinstance(part, (nn.Linear, Conv1D)) and (container or name.startswith("fc"))
    }
    if row.down.rpartition(".")[2] not in own:
        raise CapabilityError(
            f"The MLP of {model.info.name!r} ({model.info.architecture}) has no plain weight matrix at {row.down!r}: found "
            f"{', '.join(own) or 'none'}."
        )
    return [f"{container}.{name}".lstrip(".") for name in own]


def lora_twin(model: TransformersModel, *, rank: int, alpha: float, dropout: float, base: tuple[str, str]) -> Any:
    """A trainable model that shares a model's weights: modules of its own, without anybody's hooks, LoRA on its MLPs.

    Only the LoRA matrices can be trained; the shared weights are frozen in the copy, and as they were in the model.

    Args:
        model: stays exactly as it is.
        rank: of the added matrices.
        alpha: what they add is multiplied by alpha / rank.
        dropout: share of their inputs that is dropped in training.
        base: name and hub revision under which the model can be opened again.

    Raises:
        ModelError: peft is missing, or the model is quantised or spread over devices.
        CapabilityError: the family's MLP has no plain matrices.
    """
    module, peft = model.module, _peft()
    if is_quantised(module) or len({p.device for p in module.parameters()}) > 1 or module.device.type == "meta":
        raise ModelError(
            f"{model.info.name!r} is quantised or spread over devices; open it in float32 or bfloat16 on one device to "
            "tune adapters."
        )
    matrices = mlp_matrices(model)
    twin = _twin(module)
    twin.name_or_path = twin.config._name_or_path = base[0]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=matrices,
        bias="none",
        task_type="CAUSAL_LM",
        revision=base[1] or None,
        base_model_name_or_path=base[0],
        fan_in_fan_out=isinstance(model.part(matrices[0], 0), Conv1D),
    )
    with _quiet():
        return peft.get_peft_model(twin, config)


def _twin(module: Any) -> Any:
    """Modules and configuration of its own on the same numbers, with frozen parameters and without hooks."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    for part in module.modules():
        for name in _HOOKS:
            if isinstance(found := part.__dict__.get(name), dict):
                memo[id(found)] = OrderedDict()
    return copy.deepcopy(module, memo)


def save_adapter(trained: Any, folder: Path) -> None:
    """Write an adapter as peft does, without the model card, which would be an empty form."""
    trained.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    for path in folder.iterdir():
        path.chmod((folder / CONFIG).stat().st_mode)  # safetensors writes files that only their owner can read

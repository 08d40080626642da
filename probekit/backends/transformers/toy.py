"""Small decoders made here for tasks with a known answer: the module, its tokenizer, and the folder that holds both.

They are transformers' OPT without biases in its projections: learned positions, pre-norm blocks with LayerNorms (gain
and bias, eps 1e-5), a ReLU MLP of width 4 · d_model, untied output. That is the model of arXiv 2410.13835, section 2,
so every analysis runs on it as on any other decoder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from .model import TransformersModel
from .relu_attention import RELU


@dataclass(frozen=True)
class ToyShape:
    """Sizes of a toy.

    Args:
        n_layers: blocks.
        d_model: width of the residual stream, and of the only head.
        context: positions that it has embeddings for.
        d_vocab: tokens.
        relu: ReLU attention instead of softmax.
    """

    n_layers: int
    d_model: int
    context: int
    d_vocab: int
    relu: bool = False


def build_toy(shape: ToyShape, seed: int = 0) -> Any:
    """An untrained toy with PyTorch's own initialisation, in float32 on the CPU.

    Embeddings are N(0, 1), projections uniform on ±1/sqrt(fan-in), as `nn.Embedding` and `nn.Linear` begin; OPT's own
    0.02 would start the residual stream fifty times smaller. The caller's random state stays as it is.

    Args:
        shape: sizes.
        seed: of the initial weights.
    """
    config = OPTConfig(
        vocab_size=shape.d_vocab,
        hidden_size=shape.d_model,
        word_embed_proj_dim=shape.d_model,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=1,
        ffn_dim=4 * shape.d_model,
        max_position_embeddings=shape.context,
        activation_function="relu",
        enable_bias=False,
        tie_word_embeddings=False,
        dropout=0.0,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=None,
        attn_implementation=RELU if shape.relu else "sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = OPTForCausalLM(config)
        for part in module.modules():
            if isinstance(part, (nn.Embedding, nn.Linear, nn.LayerNorm)):
                part.reset_parameters()
    return module


def toy_tokenizer(vocabulary: Sequence[str]) -> Any:
    """A tokenizer whose tokens are single characters, and which begins every text with the first of the vocabulary.

    Args:
        vocabulary: the beginning-of-sequence token, then the characters; the place of each is its id. There is no token
            for anything else: characters outside the vocabulary are left out.
    """
    bos = vocabulary[0]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([bos])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, clean_up_tokenization_spaces=False)


def open_toy(module: Any, vocabulary: Sequence[str], name: str) -> TransformersModel:
    """A toy as probekit sees models, loaded and self-checked; the module stays the caller's.

    Args:
        module: the toy, trained or not.
        vocabulary: its tokens.
        name: what it is called in results.
    """
    return TransformersModel.from_loaded(module.eval(), toy_tokenizer(vocabulary), name=name).load()


def load_weights(module: Any, file: Path) -> Any:
    """The module with the weights of a safetensors file, widened to float32."""
    module.load_state_dict({name: torch.from_numpy(a.astype(np.float32)) for name, a in load_file(file).items()})
    return module


def save_weights(module: Any, file: Path, about: Mapping[str, Any]) -> None:
    """The module's weights in float16, which `load_weights` reads; `about` goes into the file's metadata."""
    arrays = {name: p.detach().cpu().numpy().astype(np.float16) for name, p in module.state_dict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(arrays, file, {key: str(value) for key, value in about.items()})
    file.chmod(0o644)  # safetensors lets nobody else read it


def save_toy(
    module: Any, vocabulary: Sequence[str], folder: str | Path, about: Mapping[str, Any] | None = None
) -> Path:
    """Write a folder that `probekit.open_model` and transformers open.

    ReLU attention stays ReLU attention: its name stands in config.json. transformers knows that name once
    `probekit.backends.transformers` has been imported.

    Args:
        module: the toy.
        vocabulary: its tokens.
        folder: where to write.
        about: what goes into config.json beside the sizes, such as how the toy was trained.
    """
    folder = Path(folder)
    module.save_pretrained(folder)
    toy_tokenizer(vocabulary).save_pretrained(folder)
    config = folder / "config.json"
    said = json.loads(config.read_text(encoding="utf-8"))
    said["attn_implementation"] = module.config._attn_implementation
    if about:
        said["toy"] = dict(about)
    config.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder

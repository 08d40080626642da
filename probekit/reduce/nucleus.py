"""Reducers that read the distribution tokens are drawn from: at a temperature, and cut to its likeliest part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from probekit.core import InputError

from .base import Field, Reads, Reducer

if TYPE_CHECKING:
    import torch

    from .vocab_rows import VocabRows

LEAST = 1e-12  # tokens less likely than this count for nothing
ROUNDING = 1e-6  # float32 probabilities of equal tokens may add up to a little less than their share
_FIRST = 256  # tokens that are sorted at first; most nuclei are smaller


@dataclass(frozen=True)
class Nucleus(Reducer):
    """The next-token distribution cut to its likeliest tokens and renormalised, over the full vocabulary.

    Of p = softmax(logits / temperature), tokens are kept from the likeliest on until they hold `top_p` of the
    probability, the one that reaches it included; of those, the ones at least `min_p` times as likely as the likeliest,
    and none below 1e-12. The token that really follows is kept in any case; among equally likely ones it goes first. What
    is kept is divided by its sum.
    (arXiv 2506.17871; its released code does so with the 50 likeliest tokens that a server returned, and takes min_p as
    a probability, not as a share of the largest.) Logits and log-probabilities are float32, sums float64.

    Args:
        top_p: probability that is kept; 1 keeps all.
        min_p: share of the largest probability; 0 cuts nothing.
        temperature: divides the logits.

    Raises:
        InputError: a parameter out of its bounds.
    """

    top_p: float = 0.9
    min_p: float = 0.0
    temperature: float = 1.0
    reads: ClassVar[Reads] = "vocab"
    whole_rows: ClassVar[bool] = True  # reads logits of the whole vocabulary, not sums over tiles of it

    def __post_init__(self) -> None:
        if not (0 < self.top_p <= 1 and 0 <= self.min_p <= 1):
            raise InputError(
                f"A nucleus has 0 < top_p <= 1 and 0 <= min_p <= 1; found top_p={self.top_p}, min_p={self.min_p}."
            )
        _check_temperature(self.temperature)

    def fields(self) -> Mapping[str, Field]:
        """`entropy_nats`, `logprob_nats`, `n_kept`, `forced`."""
        return {
            "entropy_nats": Field(("token",), "nats", "entropy of the cut next-token distribution"),
            "logprob_nats": Field(
                ("token",), "nats", "log-probability of the token that follows, in it; NaN at the end of a text"
            ),
            "n_kept": Field(("token",), "tokens", "tokens kept, the one that follows included"),
            "forced": Field(("token",), "1", "1 if the token that follows was kept only because it follows, else 0"),
        }

    def measure(self, piece: VocabRows) -> Mapping[str, torch.Tensor]:
        """All fields at once."""
        import torch

        logprob = _tempered(piece, self.temperature)
        top = self._likeliest(logprob)
        probs = top.double().exp()
        keep = (probs.cumsum(-1) - probs < self._enough) & (top >= self._floor(top))
        known = piece.targets >= 0
        target = piece.targets.clamp(min=0).expand(logprob.shape[:2])[..., None]
        own = logprob.gather(-1, target)[..., 0].double()
        forced = known & (own < torch.where(keep, top.double(), torch.inf).amin(-1))
        mass = torch.where(keep, probs, 0.0).sum(-1) + torch.where(forced, own.exp(), 0.0)
        surprisal = _entropy_terms(torch.where(keep, top.double(), -torch.inf)).sum(-1)
        surprisal = surprisal + _entropy_terms(torch.where(forced, own, -torch.inf))
        return {
            "entropy_nats": (surprisal / mass + mass.log()).clamp(min=0).float(),
            "logprob_nats": (own - mass.log()).masked_fill(~known, torch.nan).float(),
            "n_kept": (keep.sum(-1) + forced).float(),
            "forced": forced.float(),
        }

    @property
    def _enough(self) -> float:
        """Probability after which nothing more is kept."""
        return self.top_p - ROUNDING if self.top_p < 1 else float("inf")

    def _floor(self, top: torch.Tensor) -> torch.Tensor:
        """Log-probability below which nothing is kept; `top` is sorted."""
        import math

        least = top[..., :1] + (math.log(self.min_p) if self.min_p else -math.inf)
        return least.clamp(min=math.log(LEAST))

    def _likeliest(self, logprob: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of at least the tokens that may be kept, largest first."""
        n_vocab, k = logprob.shape[-1], min(_FIRST, logprob.shape[-1])
        while True:
            top = logprob.topk(k, dim=-1).values
            enough = top.double().exp().sum(-1) >= self._enough
            if k == n_vocab or bool((enough | (top[..., -1] < self._floor(top)[..., 0])).all()):
                return top
            k = min(8 * k, n_vocab)


@dataclass(frozen=True)
class Tempered(Reducer):
    """The next-token distribution softmax(logits / temperature): entropy, log-probability, likeliest tokens.

    Args:
        temperature: divides the logits; at 1 the numbers are those of `NextToken`.
        top_k: likeliest tokens that are named.

    Raises:
        InputError: a temperature that is not positive.
    """

    temperature: float = 1.0
    top_k: int = 10
    reads: ClassVar[Reads] = "vocab"
    whole_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def fields(self) -> Mapping[str, Field]:
        """`entropy_nats`, `logprob_nats`, `top_logprob`, `top_id`."""
        at = "at the temperature"
        ranked = ("token", "rank")
        return {
            "entropy_nats": Field(("token",), "nats", f"entropy of the next-token distribution {at}"),
            "logprob_nats": Field(
                ("token",), "nats", f"log-probability of the token that follows {at}; NaN at the end of a text"
            ),
            "top_logprob": Field(ranked, "nats", f"log-probability of the likeliest tokens {at}"),
            "top_id": Field(ranked, "1", "ids of the likeliest tokens"),
        }

    def measure(self, piece: VocabRows) -> Mapping[str, torch.Tensor]:
        """All fields at once."""
        import torch

        logprob = _tempered(piece, self.temperature)
        top, ids = logprob.topk(min(self.top_k, logprob.shape[-1]), dim=-1)
        target = piece.targets.clamp(min=0).expand(logprob.shape[:2])[..., None]
        own = logprob.gather(-1, target)[..., 0].masked_fill(piece.targets < 0, torch.nan)
        entropy = _entropy_terms(logprob).sum(-1, dtype=torch.float64)
        return {"entropy_nats": entropy.float(), "logprob_nats": own, "top_logprob": top, "top_id": ids.int()}


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise InputError(f"A distribution at a temperature needs one above 0; found {temperature}.")


def _tempered(piece: VocabRows, temperature: float) -> torch.Tensor:
    """Log-probabilities at the temperature; axes layer, token, vocab."""
    import torch

    logits = piece.logits if temperature == 1 else torch.div(piece.logits, temperature, out=piece.work)
    return torch.log_softmax(logits, dim=-1)


def _entropy_terms(logprob: torch.Tensor) -> torch.Tensor:
    """-p log p of log-probabilities; 0 where p is 0."""
    import torch

    return torch.where(logprob > -torch.inf, -logprob.exp() * logprob, 0.0)

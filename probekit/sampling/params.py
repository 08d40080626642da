"""Parameters that every analysis shares which lets a model write on, and the outcome that they mean."""

from __future__ import annotations

from dataclasses import dataclass

from probekit.analysis import Params, param
from probekit.core import InputError, Outcome, Sampling

from .outcomes import Choice, Contains, LastNumber, Pattern


@dataclass(frozen=True)
class WritingParams(Params):
    """How answers are written and read."""

    answer: str = param(
        "number",
        choices=("number", "regex", "choice", "words"),
        help="What an answer says: its last number, what --answer-regex catches, the letter chosen, or the first of "
        "--answer-words",
    )
    answer_regex: str = param("", help="Regular expression whose first group is the answer; sets --answer regex")
    answer_words: str = param("", help="Words that are looked for, separated by commas; sets --answer words")
    letters: str = param("ABCD", help="Letters of the choices")
    max_tokens: int = param(128, low=1, high=4096, unit="tokens", help="Longest answer")
    temperature: float = param(1.0, low=0.0, high=5.0, help="Temperature at which continuations are drawn")
    top_p: float = param(1.0, low=0.01, high=1.0, unit="share", help="Nucleus that continuations are drawn from")
    seed: int = param(0, low=0, high=2**31 - 1, help="Seed of the draws; more samples extend earlier ones")

    @property
    def outcome(self) -> Outcome:
        """What is read off an answer.

        Raises:
            InputError: a pattern or words are wanted and none are given.
        """
        if self.answer_regex:
            return Pattern(self.answer_regex)
        if self.answer_words:
            return Contains(tuple(w.strip() for w in self.answer_words.split(",") if w.strip()))
        if self.answer == "number":
            return LastNumber()
        if self.answer == "choice":
            return Choice(self.letters)
        name = {"regex": "answer_regex", "words": "answer_words"}[self.answer]
        raise InputError(f"answer={self.answer!r} needs {name}; found it empty.")

    def sampling(self, max_tokens: int | None = None) -> Sampling:
        """How continuations are drawn, of another length if given."""
        return Sampling(max_tokens or self.max_tokens, self.temperature, self.top_p, self.seed)

"""Can the model bring itself to write a token? Prompts in which it is all that could follow (arXiv 2405.05417)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probekit.core import Capture, Forward, InputError, Request, Tokenize, VocabularyTable
from probekit.reduce import NextToken

from .token_categories import OK

NEXT = Capture("logits", NextToken(1))
FAMILIES = ("repeats its input", "explains a phrase", "goes on repeating")
_WORDS = ("garden", "seven", "Monday", "blue", "river", "table", "north", "music", "paper", "winter")
_RUN = 50  # copies in the third family


@dataclass(frozen=True)
class Prompts:
    """The prompts with a stand-in for the token that is tested.

    Args:
        ids: token ids of each family.
        stand_in: the id to put the tested one in the place of.
    """

    ids: tuple[tuple[int, ...], ...]
    stand_in: int

    def of(self, token: int) -> list[tuple[int, ...]]:
        """The prompts of each family about one token, to which it is the answer."""
        return [tuple(token if i == self.stand_in else i for i in ids) for ids in self.ids]

    @property
    def places(self) -> list[tuple[int, ...]]:
        """Of each family, where the tested token stands."""
        return [tuple(t for t, i in enumerate(ids) if i == self.stand_in) for ids in self.ids]


def placeholder(table: VocabularyTable, kinds: np.ndarray) -> int:
    """The ordinary token of ASCII letters with the most distinct ones; the longest, then the first of them."""
    fitting = [i for i in np.flatnonzero(kinds == OK) if table.decoded[i].isascii() and table.decoded[i].isalpha()]
    if not fitting:
        raise InputError("The vocabulary has no ordinary token of letters, to build prompts around.")
    return int(max(fitting, key=lambda i: (len(set(table.decoded[i].lower())), len(table.decoded[i]), -i)))


def prompts(table: VocabularyTable, kinds: np.ndarray, trials: int) -> Generator[Request, Any, Prompts]:
    """The three prompts; to be used with `yield from`.

    (a) A device that repeats its input, after `trials` examples; (b) somebody who is asked what a phrase means, after
    one example with a made-up word; (c) a few words, and then the token 50 times. They are tokenised around a stand-in,
    which is then replaced by id, so that exactly the tested id is read. (The wording is ours; the paper's families are
    the same three.)

    Raises:
        InputError: the stand-in does not survive tokenisation in each of its places.
    """
    stand_in = placeholder(table, kinds)
    word = table.decoded[stand_in]
    examples = "".join(
        f"Input: «{_WORDS[i % len(_WORDS)]}»\nOutput: «{_WORDS[i % len(_WORDS)]}»\n" for i in range(trials)
    )
    texts = (
        f"A device writes its input again, letter by letter.\n{examples}Input: «{word}»\nOutput: «",
        f'Question: What does the phrase "«blorf»" mean?\nAnswer: The phrase "«blorf»" means nothing that I know.\n'
        f'Question: What does the phrase "«{word}»" mean?\nAnswer: The phrase "«',
    )
    ids = yield Tokenize(texts, special=True)
    # Without anything in front, equal tokens attend to equal tokens alone, and the model cannot tell 50 from one.
    (front,) = yield Tokenize(("The same word again and again:",), special=True)
    found = (*ids, (*front, *[stand_in] * _RUN))
    for family, some, n in zip(FAMILIES, found, (*(t.count(word) for t in texts), _RUN), strict=True):
        if some.count(stand_in) != n:
            raise InputError(
                f"The prompt of the family {family!r} holds the stand-in {word!r} (id {stand_in}) {some.count(stand_in)} "
                f"times as one token; expected {n}, so that another token can be put in its place."
            )
    return Prompts(found, stand_in)


def written(made: Prompts, tokens: Sequence[int], steps: int) -> Generator[Request, Any, np.ndarray]:
    """Probability of each token as what follows its prompts; to be used with `yield from`.

    Args:
        made: the prompts.
        tokens: ids to test.
        steps: greedy steps; the token may be any of them.

    Returns:
        Axes token, family: the largest probability over the steps.
    """
    so_far = [list(ids) for token in tokens for ids in made.of(token)]
    wanted = [token for token in tokens for _ in made.ids]
    best = np.zeros(len(so_far))
    for step in range(steps):
        # The tested token is put at the end, so that its log-probability there is read off; it is not kept.
        inputs = tuple((*ids, token) for ids, token in zip(so_far, wanted, strict=True))
        trace = yield Forward((NEXT,), inputs=inputs, why=f"whether tokens are written, step {step + 1}")
        rows = np.array(trace.batch.starts) + np.array(trace.batch.lengths) - 2
        best = np.maximum(best, np.exp(trace[NEXT]["logprob_nats"].values[rows].astype(float)))
        for ids, greedy in zip(so_far, trace[NEXT]["top_id"].values[rows, 0].tolist(), strict=True):
            ids.append(int(greedy))
    return best.reshape(len(tokens), len(made.ids))

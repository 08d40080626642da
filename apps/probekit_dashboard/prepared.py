"""Texts that each show one phenomenon well."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prepared:
    """A text of the gallery.

    Args:
        title: what it is.
        shows: what to look at in it.
        text: the text.
        token: the token that is selected at first.
        page: where the phenomenon is seen best.
    """

    title: str
    shows: str
    text: str
    token: int = 0
    page: str = "lens"


PREPARED: dict[str, Prepared] = {
    "capital": Prepared(
        "A fact", "See where the answer appears: select the last token and read the lens from below.",
        "The capital of Germany is Berlin. The capital of Italy is Rome. The capital of France is", 18, "lens",
    ),
    "list": Prepared(
        "A list that repeats", "Surprisal falls at the second round: the model copies what followed last time.",
        "apple, candle, river, seven, window, garden, copper, nine\napple, candle, river, seven, window, garden, copper, nine\n"
        "apple, candle, river, seven, window,", 24, "sinks",
    ),
    "code": Prepared(
        "Code", "Names that were defined above are predicted surely; new names are where the entropy is.",
        "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total / len(values)\n\n\n"
        "def variance(values):\n    centre = mean(values)\n    return mean([(value - centre) ** 2 for value in values])\n", 30,
        "lens",
    ),
    "maths": Prepared(
        "A maths answer", "The digits decide. Branch at them on the page Forks, and see which answers they lead to.",
        "Q: Ann has 5 pears and gets 2 more. How many pears does she have?\nA: 5 + 2 = 7. The answer is 7.\n"
        "Q: A farmer has 12 cows, buys 5 more and sells 3. How many cows are there?\nA: 12 + 5 = 17. 17 - 3 = 14. The answer is 14.",
        83, "forks",
    ),
    "sinks": Prepared(
        "A text heavy with sinks", "Most heads park on the first token; some find the first delimiter.",
        "The old stone bridge at the edge of the village had carried carts for three hundred years before the first motor car "
        "crossed it. Nobody knew exactly who had built it. The parish records mentioned a mason called Thomas, who was paid "
        "forty shillings for work on the arches, but the page that followed was lost in a fire.", 0, "sinks",
    ),
    "story": Prepared(
        "The beginning of a story", "Open ends: many next words are possible. Let the model write on, and watch the entropy.",
        "Once upon a time there was a lighthouse keeper who", 9, "forks",
    ),
}  # fmt: skip

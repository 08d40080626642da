"""Plain English sentences by topic, for analyses of text-embedding models that are given no texts."""

from __future__ import annotations

SENTENCES: dict[str, tuple[str, ...]] = {
    "cooking": (
        "Stir the soup until the lentils are soft.",
        "She kneads the dough for ten minutes by hand.",
        "The onions should turn golden, not brown.",
        "Add a pinch of salt before the water boils.",
        "The oven was too hot and the cake burned.",
    ),
    "weather": (
        "Heavy rain is expected along the coast tonight.",
        "The fog lifted shortly after nine in the morning.",
        "A cold wind blew from the north all week.",
        "Snow fell on the hills and closed two roads.",
        "It was the driest summer in forty years.",
    ),
    "football": (
        "The goalkeeper saved a penalty in the last minute.",
        "Their striker scored twice before half time.",
        "The referee showed him a second yellow card.",
        "Supporters sang long after the match had ended.",
        "The coach changed the whole defence on Saturday.",
    ),
    "money": (
        "The central bank raised interest rates again.",
        "Shares in the airline fell by six percent.",
        "She pays her rent on the first of the month.",
        "The company reported a loss for the second quarter.",
        "He borrowed the money from his older brother.",
    ),
    "medicine": (
        "The nurse measured his blood pressure twice.",
        "Antibiotics do not help against a virus.",
        "The surgeon operated on her knee in March.",
        "A vaccine protects most children from measles.",
        "He takes one tablet every morning for his heart.",
    ),
    "animals": (
        "A fox crossed the garden before sunrise.",
        "The old dog sleeps beside the stove.",
        "Swallows build their nests under the roof.",
        "The horse refused to jump over the ditch.",
        "Wolves hunt in packs across the valley.",
    ),
    "space": (
        "The telescope took a picture of a distant galaxy.",
        "Two astronauts repaired the station from outside.",
        "Jupiter has more than ninety known moons.",
        "The rocket left its launch pad at noon.",
        "A comet passes close to the sun next spring.",
    ),
    "music": (
        "The violinist tuned her strings before the concert.",
        "He learned to play the drums in a church band.",
        "The choir sang the last verse without the organ.",
        "Their new album was recorded in a barn.",
        "The piano in the hall is badly out of tune.",
    ),
    "computers": (
        "The program crashed because a file was missing.",
        "Please change your password every six months.",
        "The server answers requests in a few milliseconds.",
        "She wrote a script that renames all the photos.",
        "An update fixed the error in the web browser.",
    ),
    "travel": (
        "The night train to the border leaves at eleven.",
        "Our flight was delayed by a broken door.",
        "They walked along the river to the old harbour.",
        "The hotel lost the key to our room.",
        "You need a visa to visit that country.",
    ),
    "school": (
        "The teacher collected the essays on Friday.",
        "Pupils learn fractions in the fourth year.",
        "The exam lasted three hours and had two parts.",
        "He forgot his homework on the bus.",
        "The university admitted fewer students this year.",
    ),
    "law": (
        "The judge sentenced the thief to two years.",
        "A witness said that he had seen the car.",
        "The contract ends if neither side signs it.",
        "The jury could not agree on a verdict.",
        "Parliament passed a law against illegal logging.",
    ),
}  # fmt: skip


def built_in() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sixty sentences, and the topic of each; five of a topic, topics in turn."""
    pairs = [
        (s, topic) for row in zip(*SENTENCES.values(), strict=True) for s, topic in zip(row, SENTENCES, strict=True)
    ]
    return tuple(s for s, _ in pairs), tuple(t for _, t in pairs)

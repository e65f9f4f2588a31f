"""A small set made by grammar, so that tests can train a micro-pair in seconds without any data from outside."""

from __future__ import annotations

import random

from models.build.datasets import Example
from models.skills import OUT_OF_SCOPE

SWITCH_SHARE, OOS_SHARE = 0.5, 0.2
THINGS = ("lamp", "heater", "fan", "blind", "kettle", "door")
PLACES = ("kitchen", "hall", "bath room", "attic", "garden shed")
DESK = {
    "opening_hours": ("when do you open {day}", "what are your hours {day}", "are you open {day}"),
    "parking": ("where can i park {day}", "is there parking {day}", "do you have a car park"),
    "refund": ("i want my money back", "can i get a refund for {day}", "please refund me"),
}
DAYS = ("today", "on monday", "on friday", "tomorrow", "at the weekend")
STRANGE = (
    "who painted the old bridge",
    "sing me a tune",
    "how tall are giraffes",
    "what rhymes with orange",
    "tell a joke",
)


def room(rng: random.Random) -> Example:
    """One utterance of skill `room`: switch a thing, or set it to a number, in a place."""
    thing, place, number = rng.choice(THINGS), rng.choice(PLACES).split(), str(rng.randint(1, 30))
    placed = ["B-place", *["I-place"] * (len(place) - 1)]
    if rng.random() < SWITCH_SHARE:
        verb = rng.choice(("turn on", "switch off", "start", "stop")).split()
        words = [*verb, "the", thing, "in", "the", *place]
        tags = ["O"] * len(verb) + ["O", "B-thing", "O", "O", *placed]
        return Example("room", " ".join(words), "Switch", tuple(tags))
    words = ["set", "the", *place, thing, "to", number]
    return Example("room", " ".join(words), "SetLevel", ("O", "O", *placed, "B-thing", "O", "B-level"))


def desk(rng: random.Random) -> Example:
    """One utterance of skill `desk`, a fifth of them out of scope."""
    if rng.random() < OOS_SHARE:
        return Example("desk", f"{rng.choice(STRANGE)} {rng.choice(DAYS)}", OUT_OF_SCOPE)
    intent = rng.choice(sorted(DESK))
    return Example("desk", rng.choice(DESK[intent]).format(day=rng.choice(DAYS)), intent)


def make(count: int, seed: int) -> list[Example]:
    """Make `count` examples, half of each skill; the same for the same seed."""
    rng = random.Random(seed)
    return [(room if i % 2 else desk)(rng) for i in range(count)]

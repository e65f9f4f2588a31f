"""Skills: what a frame may say, and how a model says it.

A *frame* is `{"intent": …, "slots": {name: text}}`. A model never writes that JSON: it reads

    <skill> utterance <answer>                      and names the intent with one label, then
    <skill> utterance <answer> utterance            labels each word of the echoed utterance.

Each label is one row of a small head beside the vocabulary, so an intent costs one forward pass and
slots a second one, whatever their length. The echo lets a causal decoder see the whole sentence before
it labels a word (Springer et al. 2024, "Repetition improves language model embeddings", arXiv 2402.15449).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from models.errors import DataError, PromptError

OUT_OF_SCOPE = "out_of_scope"
OUTSIDE = "O"

SlotValue = str | list[str]


@dataclass(frozen=True)
class Frame:
    """One answer of a skill; a slot that occurs twice holds a list, in order."""

    intent: str
    slots: Mapping[str, SlotValue] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the frame as JSON-ready values."""
        return {"intent": self.intent, "slots": dict(self.slots)}


@dataclass(frozen=True)
class Skill:
    """The intents of one skill and, for each, the slots it may carry."""

    name: str
    intents: tuple[str, ...]
    slots: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def slot_names(self) -> tuple[str, ...]:
        """All slot names of the skill, sorted."""
        return tuple(sorted({name for names in self.slots.values() for name in names}))

    @property
    def tags(self) -> tuple[str, ...]:
        """BIO tags: `O`, then `B-x`, `I-x` for each slot; empty for a skill without slots."""
        names = self.slot_names
        return (OUTSIDE, *(f"{p}-{n}" for n in names for p in "BI")) if names else ()


@dataclass(frozen=True)
class SkillSet:
    """An ordered set of skills and the rows of the label head they own.

    Rows: for each skill its intents, then its tags. Input tokens: one per skill, then `<answer>`; they lie
    behind the model's own vocabulary (`vocab_size + index`).
    """

    skills: tuple[Skill, ...]

    def __getitem__(self, name: str) -> Skill:
        return self.skills[self.index(name)]

    def index(self, name: str) -> int:
        """Return a skill's position; raises `PromptError` for an unknown one."""
        for position, skill in enumerate(self.skills):
            if skill.name == name:
                return position
        raise PromptError(f"skill '{name}' is unknown; use one of {', '.join(self.names)}", "skill")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the skills, in order."""
        return tuple(skill.name for skill in self.skills)

    @property
    def n_rows(self) -> int:
        """Rows of the label head."""
        return sum(len(s.intents) + len(s.tags) for s in self.skills)

    @property
    def n_inputs(self) -> int:
        """Input tokens beyond the vocabulary: one per skill and `<answer>`."""
        return len(self.skills) + 1

    def intent_rows(self, name: str) -> slice:
        """Rows of the head that hold the skill's intents."""
        before = self.skills[: self.index(name)]
        start = sum(len(s.intents) + len(s.tags) for s in before)
        return slice(start, start + len(self[name].intents))

    def tag_rows(self, name: str) -> slice:
        """Rows of the head that hold the skill's tags (empty without slots)."""
        start = self.intent_rows(name).stop
        return slice(start, start + len(self[name].tags))

    def row_names(self) -> list[str]:
        """A readable name for each row of the head, `skill/label`."""
        return [f"{s.name}/{label}" for s in self.skills for label in (*s.intents, *s.tags)]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values for a manifest."""
        return {
            s.name: {"intents": list(s.intents), "slots": {k: list(v) for k, v in s.slots.items()}} for s in self.skills
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SkillSet:
        """Read what `as_dict` wrote; raises `DataError` naming the skill that is malformed."""
        skills = []
        for name, spec in values.items():
            try:
                slots = {intent: tuple(names) for intent, names in spec.get("slots", {}).items()}
                skills.append(Skill(name, tuple(spec["intents"]), slots))
            except (AttributeError, KeyError, TypeError) as error:
                raise DataError(f"skill '{name}' is malformed: it needs 'intents' and may have 'slots'") from error
        return cls(tuple(skills))


def frame_schema(skill: Skill) -> dict[str, Any]:
    """The JSON schema of the skill's frames: which intents there are, and which slots each may carry."""
    value = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 2}]}
    carried: dict[tuple[str, ...], list[str]] = {}
    for intent in skill.intents:
        carried.setdefault(tuple(skill.slots.get(intent, ())), []).append(intent)
    return {"anyOf": [_frames_with(intents, dict.fromkeys(slots, value)) for slots, intents in carried.items()]}


def _frames_with(intents: list[str], slots: dict[str, Any]) -> dict[str, Any]:
    """The schema of frames with one of the intents, which share their slots."""
    return {
        "type": "object",
        "properties": {
            "intent": {"enum": intents},
            "slots": {"type": "object", "properties": slots, "additionalProperties": False},
        },
        "required": ["intent", "slots"],
        "additionalProperties": False,
    }


def split_words(text: str) -> list[str]:
    """Split an utterance into the words that slots are made of (white space; closing `.?!,` dropped)."""
    words = [word.rstrip(".?!,;") or word for word in text.split()]
    return [word for word in words if word]


@dataclass(frozen=True)
class SkillPrompt:
    """A skill prompt as token ids.

    `ids` is `<skill> w… <answer>`; `echo` is `w…` again. `word_ends[i]` is the index in `echo` of the last
    token of word i, where its tag is read.
    """

    ids: tuple[int, ...]
    echo: tuple[int, ...]
    word_ends: tuple[int, ...]
    words: tuple[str, ...]


def encode(
    skills: SkillSet, name: str, text: str, tokenize: Callable[[str], Sequence[int]], vocab_size: int
) -> SkillPrompt:
    """Build the prompt of an utterance.

    `tokenize` maps one word, led by a space, to ids. The model reads lower case (two of the three training sets
    are lower-case throughout); `words` keep the user's own spelling, so slots do too.
    Raises `PromptError` for an unknown skill or an utterance without a word.
    """
    skill_id = vocab_size + skills.index(name)
    words = tuple(split_words(text))
    if not words:
        raise PromptError("the utterance is empty; send at least one word", "messages")
    echo: list[int] = []
    ends: list[int] = []
    for word in words:
        echo.extend(tokenize(" " + word.lower()))
        ends.append(len(echo) - 1)
    ids = (skill_id, *echo, vocab_size + len(skills.skills))
    return SkillPrompt(ids, tuple(echo), tuple(ends), words)


def slots_from_tags(words: Sequence[str], tags: Sequence[str]) -> dict[str, SlotValue]:
    """Join BIO-tagged words into slots; an `I-x` without an open `x` opens one."""
    spans: list[tuple[str, list[str]]] = []
    open_name = ""
    for word, tag in zip(words, tags, strict=True):
        name = tag[2:]
        if tag == OUTSIDE:
            open_name = ""
            continue
        if tag[0] == "I" and name == open_name:
            spans[-1][1].append(word)
        else:
            spans.append((name, [word]))
        open_name = name
    slots: dict[str, SlotValue] = {}
    for name, parts in spans:
        value, seen = " ".join(parts), slots.get(name)
        if seen is None:
            slots[name] = value
        else:
            slots[name] = [*(seen if isinstance(seen, list) else [seen]), value]
    return slots

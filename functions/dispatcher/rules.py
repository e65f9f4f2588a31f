"""The rule-based planner: commands in a user's own words to a frame or a plan of steps, without any model.

`RuleBook` is pure; `read_rules` is its rim. The file is TOML:

    answer = "plan"                        # or "frame", the default: one command, one frame
    skills = ["chat"]                      # requests it answers; all if left out
    separators = ["then", "and then"]      # between the steps of a plan, beside punctuation marks

    [[rule]]
    name = "take off"
    patterns = ["take off [to {altitude_m:number} (m|metres)]"]      # see patterns.py
    intent = "takeoff"
    slots = { altitude_m = 10 }            # where the text does not say
    limits = { altitude_m = [2, 120] }     # a number outside and the rule does not hold
    say = "Taking off to {altitude_m} m."  # for those who asked for text
    priority = 0                           # of two rules that match a same text; if equal, the file is refused
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from functions.dispatcher.patterns import MAX_WORDS, Pattern, PatternError, Position, Word, words
from functions.serving.settings import ConfigError
from functions.serving.strict import Strict

MAX_RULES = 200
MAX_PATTERNS = 300
MAX_STEPS = 12
_MAX_LETTERS = 32 * MAX_WORDS
_MAX_FILE_BYTES = 1 << 20
_TOO_MANY = (None,) * MAX_STEPS
_PLACEHOLDER = re.compile(r"\{([a-z][a-z0-9_]*)\}")

Constant = str | int | float | bool
Short = Annotated[str, Field(min_length=1, max_length=500)]


class _RuleEntry(Strict):
    name: Short
    patterns: Annotated[list[Short], Field(min_length=1, max_length=50)]
    intent: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.\-]*$", max_length=80)]
    slots: dict[str, Constant] = Field(default_factory=dict)
    limits: dict[str, tuple[float, float]] = Field(default_factory=dict)
    say: str = ""
    priority: int = 0


class _RuleFile(Strict):
    answer: Literal["frame", "plan"] = "frame"
    skills: list[Short] = Field(default_factory=list)
    separators: list[Short] = Field(default_factory=list)
    rule: Annotated[list[_RuleEntry], Field(min_length=1, max_length=MAX_RULES)]


@dataclass(frozen=True)
class Step:
    """One command as it was understood; `said` is the rule's sentence about it, '' if it has none."""

    intent: str
    slots: Mapping[str, Constant]
    said: str = ""

    @property
    def frame(self) -> dict[str, Any]:
        """The step as a frame."""
        return {"intent": self.intent, "slots": dict(self.slots)}


@dataclass(frozen=True)
class Rule:
    """One rule; `slots` are its constants, `limits` the range of each bounded number."""

    name: str
    patterns: tuple[Pattern, ...]
    intent: str
    slots: Mapping[str, Constant] = field(default_factory=dict)
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    say: str = ""
    priority: int = 0

    def apply(self, text: Sequence[Word]) -> Step | None:
        """The step, if the text is this rule's and its numbers are within limits."""
        for pattern in self.patterns:
            values = pattern.match(text)
            if values is not None:
                return self._step({name: _tidy(value) for name, value in values.items()})
        return None

    def _step(self, values: Mapping[str, Constant]) -> Step | None:
        slots = {**self.slots, **values}
        for name, (low, high) in self.limits.items():
            value = slots.get(name)
            if isinstance(value, int | float) and not low <= value <= high:
                return None
        said = _PLACEHOLDER.sub(lambda found: str(slots.get(found[1], "")), self.say)
        return Step(self.intent, slots, said)

    def schema(self) -> dict[str, Any]:
        """The JSON schema of its frames."""
        kinds = {name: position for pattern in self.patterns for name, position in pattern.slots.items()}
        values = {name: {"enum": [value]} for name, value in self.slots.items()}
        values |= {name: _slot_schema(position, self.limits.get(name)) for name, position in kinds.items()}
        required = [name for name in values if self.is_certain(name)]
        slots = {"type": "object", "properties": values, "required": required, "additionalProperties": False}
        return {
            "type": "object",
            "properties": {"intent": {"enum": [self.intent]}, "slots": slots},
            "required": ["intent", "slots"],
            "additionalProperties": False,
        }

    def allows(self, frame: Any) -> bool:
        """Whether a frame, whoever made it, is one that the rule could give: its slots alone, numbers within limits."""
        if not isinstance(frame, Mapping) or frame.get("intent") != self.intent:
            return False
        slots = frame.get("slots")
        kinds = {name: position for pattern in self.patterns for name, position in pattern.slots.items()}
        if not isinstance(slots, Mapping) or not set(slots) <= {*kinds, *self.slots}:
            return False
        certain = all(name in slots for name in (*kinds, *self.slots) if self.is_certain(name))
        return certain and all(self._takes(name, value, kinds.get(name)) for name, value in slots.items())

    def _takes(self, name: str, value: Any, position: Position | None) -> bool:
        if position is None or value == self.slots.get(name):
            return bool(value == self.slots.get(name))
        if position.kind == "number":
            low, high = self.limits.get(name, (-math.inf, math.inf))
            return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        return isinstance(value, str) and (position.is_open or value in position.norms)

    def is_certain(self, slot: str) -> bool:
        """Whether every step of the rule has the slot."""
        return slot in self.slots or all(pattern.always_fills(slot) for pattern in self.patterns)


@dataclass(frozen=True)
class Plan:
    """What was understood: steps in order, at least one; `is_plan` tells how it is written as a frame."""

    steps: tuple[Step, ...]
    is_plan: bool

    @property
    def frame(self) -> dict[str, Any]:
        """The only step's frame, or the frame of intent `plan` whose slot `steps` holds theirs."""
        if not self.is_plan:
            return self.steps[0].frame
        return {"intent": "plan", "slots": {"steps": [step.frame for step in self.steps]}}

    @property
    def text(self) -> str:
        """The rules' sentences; the frame as JSON where a rule has none."""
        if all(step.said for step in self.steps):
            return " ".join(step.said for step in self.steps)
        return json.dumps(self.frame, ensure_ascii=False)


@dataclass(frozen=True)
class RuleBook:
    """All rules of a file, those of the highest priority first."""

    rules: tuple[Rule, ...]
    is_plan: bool = False
    skills: tuple[str, ...] = ()
    separators: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def parse(cls, text: str, name: str) -> RuleBook:
        """Read a rule file's text; raises `ConfigError`: one sentence with the file's `name`, the rule, the field."""
        entries = _validated(text, name)
        rules = tuple(_rule(entry, f"{name}: rule '{entry.name}'") for entry in entries.rule)
        _check_together(rules, name)
        return cls(
            rules=tuple(sorted(rules, key=lambda rule: -rule.priority)),
            is_plan=entries.answer == "plan",
            skills=tuple(entries.skills),
            separators=tuple(_separator(phrase, name) for phrase in entries.separators),
        )

    def answers(self, skill: str) -> bool:
        """Whether requests for the skill are the book's to answer."""
        return not self.skills or skill in self.skills

    def plan(self, text: str) -> Plan | None:
        """Understand all of the text, or nothing: half a plan is none. Bounded in time by the bounds on words."""
        found = words(text) if len(text) <= _MAX_LETTERS else ()
        if not 0 < len(found) <= MAX_WORDS:
            return None
        if not self.is_plan:
            clause = [word for word in found if not word.is_mark]
            step = self._step(clause) if clause else None
            return Plan((step,), is_plan=False) if step else None
        steps = self._steps(found)
        return Plan(steps, is_plan=True) if steps else None

    @cached_property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of every frame that the book may give; ask a model with it and both answer alike."""
        step = {"anyOf": [rule.schema() for rule in self.rules]}
        if not self.is_plan:
            return step
        steps = {"type": "array", "items": step, "minItems": 1, "maxItems": MAX_STEPS}
        slots = {"type": "object", "properties": {"steps": steps}, "required": ["steps"], "additionalProperties": False}
        return {
            "type": "object",
            "properties": {"intent": {"enum": ["plan"]}, "slots": slots},
            "required": ["intent", "slots"],
            "additionalProperties": False,
        }

    def allows(self, frame: Any) -> bool:
        """Whether a frame, such as a model's, is one that the book could give."""
        if not self.is_plan:
            return any(rule.allows(frame) for rule in self.rules)
        slots = frame.get("slots") if isinstance(frame, Mapping) and frame.get("intent") == "plan" else None
        steps = slots.get("steps") if isinstance(slots, Mapping) else None
        if not isinstance(steps, list) or not 0 < len(steps) <= MAX_STEPS:
            return False
        return all(any(rule.allows(step) for rule in self.rules) for step in steps)

    def _step(self, clause: Sequence[Word]) -> Step | None:
        """The step of one clause, by the first rule that has it."""
        candidates = self._by_first_word.get(clause[0].norm, self._rest)
        return next((step for rule in candidates if (step := rule.apply(clause))), None)

    def _steps(self, text: Sequence[Word]) -> tuple[Step, ...]:
        """Cut the text between steps so that each clause is one, into as many steps as there can be.

        `ways[begin]` is how the text from `begin` on is understood. Each clause is tried at most once.
        """
        cuts = [*self._cuts(text), (len(text), len(text))]
        ways: dict[int, tuple[Step, ...]] = {len(text): ()}
        for begin in sorted({0, *(behind for _, behind in cuts)} - {len(text)}, reverse=True):
            for end, behind in cuts:
                if end >= begin and behind > begin and len(ways.get(behind, _TOO_MANY)) < MAX_STEPS:
                    clause = [word for word in text[begin:end] if not word.is_mark]
                    step = self._step(clause) if clause else None
                    if step or not clause:
                        ways[begin] = (step, *ways[behind]) if step else ways[behind]
                        break
        return ways.get(0, ())

    def _cuts(self, text: Sequence[Word]) -> Iterator[tuple[int, int]]:
        """Where a step may end, and where the next one then begins."""
        for index, word in enumerate(text):
            if word.is_mark:
                yield index, index + 1
            for phrase in self.separators:
                behind = index + len(phrase)
                if tuple(w.norm for w in text[index:behind]) == phrase:
                    yield index, behind

    @cached_property
    def _by_first_word(self) -> Mapping[str, tuple[Rule, ...]]:
        """The rules that a text may belong to which begins with a word that some rule names."""
        named = {norm for rule in self.rules for norm in _beginnings(rule)}
        return {norm: tuple(r for r in self.rules if norm in _beginnings(r) or _begins_open(r)) for norm in named}

    @cached_property
    def _rest(self) -> tuple[Rule, ...]:
        return tuple(rule for rule in self.rules if _begins_open(rule))


def read_rules(path: Path) -> RuleBook:
    """Read a rule file; raises `ConfigError`."""
    return RuleBook.parse(read_text(path), path.name)


def read_text(path: Path) -> str:
    """Read a small file of a user's; raises `ConfigError`."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"{path.name} has more than {_MAX_FILE_BYTES} bytes")
        return path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name} is not UTF-8 (byte {error.start})") from error


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """Parse TOML; raises `ConfigError` naming the file and the line."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not TOML: {error}") from error


def _validated(text: str, name: str) -> _RuleFile:
    values = parse_toml(text, name)
    try:
        return _RuleFile.model_validate_json(json.dumps(values, default=str, allow_nan=False))
    except ValidationError as error:
        raise ConfigError(f"{name}: {_blame(error, values)}") from None
    except ValueError:  # NaN and infinity are TOML, but no JSON
        raise ConfigError(f"{name}: a number is not finite") from None


def _blame(error: ValidationError, values: Mapping[str, Any]) -> str:
    """The rule and the field at fault, and what is wrong."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    loc = list(first["loc"])
    where = ""
    if loc[:1] == ["rule"] and len(loc) > 1 and isinstance(loc[1], int):
        entry = values["rule"][loc[1]]
        named = entry.get("name") if isinstance(entry, Mapping) else None
        where, loc = f"rule '{named}', " if isinstance(named, str) else f"rule number {loc[1] + 1}, ", loc[2:]
    name = str(loc[0]) if loc else "rule"
    if first["type"] == "extra_forbidden":
        return f"{where}there is no field '{name}'"
    return f"{where}field '{name}': {first['msg'][:1].lower()}{first['msg'][1:]}"


def _rule(entry: _RuleEntry, where: str) -> Rule:
    patterns = []
    for number, source in enumerate(entry.patterns, 1):
        try:
            patterns.append(Pattern.parse(source))
        except PatternError as error:
            raise ConfigError(f"{where}, field 'patterns', number {number} ('{source}'): {error}") from None
    limits = {name: (low, high) for name, (low, high) in entry.limits.items()}
    rule = Rule(entry.name, tuple(patterns), entry.intent, entry.slots, limits, entry.say, entry.priority)
    kinds = {name: position.kind for pattern in patterns for name, position in pattern.slots.items()}
    for name, (low, high) in limits.items():
        if kinds.get(name) != "number":
            raise ConfigError(f"{where}, field 'limits': no pattern has a slot {{{name}:number}}")
        if not low <= high:
            raise ConfigError(f"{where}, field 'limits': '{name}' must be [lowest, highest]")
    for name in _PLACEHOLDER.findall(entry.say):
        if not rule.is_certain(name):
            raise ConfigError(f"{where}, field 'say': slot '{name}' may be missing; give it a value in 'slots'")
    return rule


def _check_together(rules: Sequence[Rule], name: str) -> None:
    """Refuse two rules of one name, and two that would both have a same text with nothing to choose between them."""
    if sum(len(rule.patterns) for rule in rules) > MAX_PATTERNS:
        raise ConfigError(f"{name}: field 'rule': there are more than {MAX_PATTERNS} patterns in all")
    for one, other in combinations(rules, 2):
        if one.name == other.name:
            raise ConfigError(f"{name}: rule '{one.name}', field 'name': another rule has this name")
        if one.priority == other.priority:
            text = next((t for p in one.patterns for q in other.patterns if (t := p.overlap(q))), None)
            if text:
                both = f"rule '{one.name}' and rule '{other.name}', field 'patterns'"
                raise ConfigError(f"{name}: {both}: both match '{text}'; give one a higher 'priority'")


def _separator(phrase: str, name: str) -> tuple[str, ...]:
    found = tuple(word.norm for word in words(phrase))
    if not found:
        raise ConfigError(f"{name}: field 'separators': '{phrase}' has no word; punctuation marks separate anyhow")
    return found


def _beginnings(rule: Rule) -> set[str]:
    return {norm for p in rule.patterns for place in p.first for norm in p.positions[place].norms}


def _begins_open(rule: Rule) -> bool:
    return any(p.positions[place].is_open for p in rule.patterns for place in p.first)


def _tidy(value: str | float) -> Constant:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _slot_schema(position: Position, limits: tuple[float, float] | None) -> dict[str, Any]:
    if not position.is_open:
        return {"enum": list(position.norms)}
    if position.kind != "number":
        return {"type": "string"}
    return {"type": "number", **({"minimum": _tidy(limits[0]), "maximum": _tidy(limits[1])} if limits else {})}

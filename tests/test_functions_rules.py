"""Sentence patterns, and the rule-based planner that they make."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from textwrap import dedent

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.dispatcher.patterns import MAX_POSITIONS, MAX_WORDS, Pattern, PatternError, words
from functions.dispatcher.rules import MAX_STEPS, RuleBook, read_rules
from functions.serving.settings import ConfigError

ROOT = Path(__file__).parents[1]
DRONE = ROOT / "examples" / "drone" / "rules.toml"
CANNED = ROOT / "functions" / "dispatcher" / "canned.toml"


@cache
def drone() -> RuleBook:
    return read_rules(DRONE)


@pytest.mark.parametrize(
    ("pattern", "text", "slots"),
    [
        ("turn left", "Turn LEFT", {}),
        ("turn left", "turn left now", None),
        ("turn left", "turn", None),
        ("turn [to the] left", "turn to the left", {}),
        ("turn [to the] left", "turn to left", None),
        ("(go|fly|head over) home", "head over home", {}),
        ("turn {way:left|right}", "turn Right", {"way": "right"}),
        ("turn {way:left|right}", "turn back", None),
        ("go {m:number} metres", "go twenty-five metres", {"m": 25.0}),
        ("go {m:number} metres", "go 2.5 metres", {"m": 2.5}),
        ("go {m:number} metres", "go one hundred and five metres", {"m": 105.0}),
        ("go {m:number} metres", "go two thousand three hundred metres", {"m": 2300.0}),
        ("go {m:number} metres", "go far metres", None),
        ("go {m:number} m", "go 20m", {"m": 20.0}),
        ("go {m:number} m", f"go {'9' * 400} m", None),
        ("fly to {name}", "fly to Ärger", {"name": "Ärger"}),
        ("fly to {name}", "fly to A1", {"name": "A1"}),
        ("say {what:text}", "say good morning to Anna", {"what": "good morning to Anna"}),
        ("say {what:text} [to {who}]", "say good morning to Anna", {"what": "good morning", "who": "Anna"}),
        ("number one fan", "number 1 fan", {}),
        ("(up {m:number}|{m:number} up)", "5 up", {"m": 5.0}),
    ],
)
def test_what_a_pattern_matches(pattern: str, text: str, slots: dict[str, object] | None) -> None:
    assert Pattern.parse(pattern).match(words(text)) == slots


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("", "an empty text"),
        ("[now]", "an empty text"),
        ("{all:text}", "any text"),
        ("[please] {one} {two}", "any text"),
        ("go (left", "not closed by ')'"),
        ("go [left", "not closed by ']'"),
        ("go left)", "closes nothing"),
        ("left | right", "outside of a group"),
        ("go ()", "empty"),
        ("go {M:number}", "is no slot"),
        ("go {m:float}", "unknown kind 'float'"),
        ("go {m} {m}", "filled twice"),
        ("go *", "is no word"),
        ("go .*", "is no word"),
        ("[[[[[go]]]]] on", "nested deeper"),
        ("go " * (MAX_POSITIONS + 1), "more than"),
    ],
)
def test_a_bad_pattern_is_refused_with_its_reason(pattern: str, says: str) -> None:
    with pytest.raises(PatternError, match=says.replace("(", r"\(").replace(")", r"\)").replace("]", r"\]")):
        Pattern.parse(pattern)


WORD = st.sampled_from(["go", "left", "2", "now", "x"])
ITEM = st.one_of(
    WORD, st.sampled_from(["[now]", "(go|left)", "{a}", "{b:number}", "{c:text}", "{d:go|now}", "[{e} x]"])
)


def _parsed(items: list[str]) -> Pattern | None:
    try:
        return Pattern.parse(" ".join(items))
    except PatternError:
        return None


@given(st.lists(ITEM, min_size=1, max_size=5), st.lists(ITEM, min_size=1, max_size=5), st.lists(WORD, max_size=7))
def test_two_patterns_overlap_exactly_if_a_text_is_both(one: list[str], other: list[str], said: list[str]) -> None:
    first, second = _parsed(one), _parsed(other)
    if first is None or second is None:
        return
    common, text = first.overlap(second), words(" ".join(said))
    if common is not None:
        assert first.match(words(common)) is not None
        assert second.match(words(common)) is not None
    else:
        assert first.match(text) is None or second.match(text) is None


@given(st.text(max_size=300))
def test_any_text_can_be_read(text: str) -> None:
    assert all(word.norm for word in words(text))
    drone().plan(text)


def test_what_makes_regular_expressions_explode_is_looked_at_a_bounded_number_of_times() -> None:
    """Each word at each position at most once, whatever comes in: counted, not timed."""
    pattern = Pattern.parse("go " + " ".join(f"[{{s{n}:text}} x]" for n in range(12)) + " end")
    looked = 0

    class Counted(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            nonlocal looked
            looked += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    text = [type(word)(word.written, Counted(word.norm)) for word in words("go " + "x " * (MAX_WORDS - 2) + "x")]
    assert pattern.match(text) is None
    n_positions = len(pattern.positions)
    assert looked <= MAX_WORDS * n_positions * n_positions


def test_a_longer_text_than_the_bound_matches_nothing() -> None:
    book = drone()
    assert book.plan("land " + "and land " * (MAX_STEPS - 1)) is not None
    assert book.plan("land " + "and land " * MAX_STEPS) is None
    assert book.plan("take a photo of " + "rock " * MAX_WORDS) is None


def _steps(text: str) -> list[tuple[str, dict[str, object]]] | None:
    plan = drone().plan(text)
    return [(step.intent, dict(step.slots)) for step in plan.steps] if plan else None


def test_a_command_becomes_a_plan() -> None:
    said = "Take off to twenty metres, fly to waypoint alpha and take 3 photos of rock and roll, then go home and land."
    assert _steps(said) == [
        ("takeoff", {"altitude_m": 20}),
        ("goto", {"waypoint": "alpha"}),
        ("photo", {"count": 3, "subject": "rock and roll"}),
        ("return_to_launch", {}),
        ("land", {}),
    ]


@pytest.mark.parametrize(
    "said", ["", "  ", "then and then", "make me a sandwich", "take off and make me a sandwich", "take off to 5000 m"]
)
def test_what_is_not_wholly_understood_is_no_plan(said: str) -> None:
    assert _steps(said) is None


@pytest.mark.parametrize("said", ["land", "take off, turn left and hover for 5 s", "take two photos of the roof"])
def test_plans_keep_to_the_books_own_schema(said: str) -> None:
    book = drone()
    plan = book.plan(said)
    assert plan is not None
    jsonschema.validate(plan.frame, book.schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"intent": "plan", "slots": {"steps": [{"intent": "eject", "slots": {}}]}}, book.schema)


def _book(rules: str) -> RuleBook:
    return RuleBook.parse(dedent(rules), "mine.toml")


def test_a_book_of_frames_gives_the_frame_of_one_command() -> None:
    book = _book(
        'rule = [{name = "play", patterns = ["play {what:text}"], intent = "play_music", slots = {loud = true}}]'
    )
    plan = book.plan("play some jazz.")
    assert plan is not None
    assert plan.frame == {"intent": "play_music", "slots": {"loud": True, "what": "some jazz"}}
    assert json.loads(plan.text) == plan.frame
    jsonschema.validate(plan.frame, book.schema)


def test_the_higher_priority_wins() -> None:
    rules = """
    rule = [
      {name = "any", patterns = ["play {what:text}"], intent = "play"},
      {name = "stop", patterns = ["play nothing"], intent = "stop", priority = 1},
    ]
    """
    plan = _book(rules).plan("play nothing")
    assert plan is not None
    assert plan.steps[0].intent == "stop"
    with pytest.raises(ConfigError, match="rule 'any' and rule 'stop', field 'patterns': both match 'play nothing'"):
        _book(rules.replace("priority = 1", "priority = 0"))


RULE = 'name = "a", patterns = ["go"], intent = "go"'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rule = [[\n1", r"mine\.toml is not TOML: .*(line|end of document)"),
        ("", r"mine\.toml: field 'rule': field required"),
        ("rule = []", r"mine\.toml: field 'rule': "),
        (f"speed = 3\nrule = [{{{RULE}}}]", r"mine\.toml: there is no field 'speed'"),
        (f'answer = "poem"\nrule = [{{{RULE}}}]', r"mine\.toml: field 'answer': input should be 'frame' or 'plan'"),
        (f"rule = [{{{RULE}, colour = 1}}]", r"mine\.toml: rule 'a', there is no field 'colour'"),
        ('rule = [{name = "a", intent = "go"}]', r"mine\.toml: rule 'a', field 'patterns': field required"),
        ('rule = [{patterns = ["go"], intent = "go"}]', r"mine\.toml: rule number 1, field 'name': field required"),
        ('rule = [{name = "a", patterns = "go", intent = "go"}]', r"mine\.toml: rule 'a', field 'patterns': "),
        ('rule = [{name = "a", patterns = ["go", "(x"], intent = "go"}]', r"'a', field 'patterns', number 2 \('\(x'\)"),
        (f"rule = [{{{RULE}, limits = {{m = [1, 2]}}}}]", r"'a', field 'limits': no pattern has a slot \{m:number\}"),
        (f'rule = [{{{RULE}, say = "{{m}} m"}}]', r"rule 'a', field 'say': slot 'm' may be missing"),
        (f"rule = [{{{RULE}, slots = {{m = nan}}}}]", r"mine\.toml: a number is not finite"),
        (f"rule = [{{{RULE}}}, {{{RULE}}}]", r"rule 'a', field 'name': another rule has this name"),
        (f'separators = [","]\nrule = [{{{RULE}}}]', None),
        (f'separators = ["–"]\nrule = [{{{RULE}}}]', r"field 'separators': '–' has no word"),
    ],
)
def test_a_bad_file_is_refused_naming_file_rule_and_field(text: str, says: str | None) -> None:
    if says is None:
        _book(text)
        return
    with pytest.raises(ConfigError, match=says) as refusal:
        _book(text)
    assert "\n" not in str(refusal.value)


def _command(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgecascade", "rules", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_checks_files_and_tries_texts(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    other = RULE.replace('"a"', '"b"')
    bad.write_text(f"rule = [{{{RULE}}}, {{{other}}}]")
    good = [_command("check", str(DRONE)), _command("check", str(CANNED), "--messages")]
    assert [said.returncode for said in good] == [0, 0]
    assert "none ambiguous" in good[0].stdout
    said = _command("check", str(bad))
    assert (said.returncode, said.stdout) == (1, "")
    both = "rule 'a' and rule 'b', field 'patterns': both match 'go'"
    assert said.stderr == f"edgecascade: bad.toml: {both}; give one a higher 'priority'\n"
    tried = _command("try", str(DRONE), "land")
    assert json.loads(tried.stdout)["slots"]["steps"] == [{"intent": "land", "slots": {}}]
    assert _command("try", str(DRONE), "sing").returncode == 1
    missing = _command("check", str(tmp_path / "none.toml"))
    assert missing.returncode == 1
    assert "cannot be read: No such file" in missing.stderr

"""Early exits: heads that read a frame from the states between two layers, and how sure each of them is.

A head sees what the layers so far made of `<skill> w… <answer>` and, where there are slots, of the echo. It shrinks
each state, pools the prompt's by attention, and scores intents from the pool and `<answer>`, tags from each word's end,
its neighbours and `<answer>`. Its confidence is calibrated on held-out data, for each exit and skill apart.
T tokens, C width, R what a state shrinks to, P pools.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from models.artifact.manifest import Manifest
from models.artifact.store import Artifact
from models.errors import ArtifactError
from models.runtime import frames
from models.runtime.confidence import Logistic, features
from models.runtime.sessions import EngineOptions, open_session
from models.runtime.tier import NO_EXIT, Depth
from models.skills import OUT_OF_SCOPE, Skill, SkillPrompt, SkillSet

Floats = NDArray[np.float32]
MATRICES = ("down", "mix", "out", "tag_mix", "tag_out")
_FLOOR = 1e-6
_SLACK = 1.1
"""What the layers to come are granted over the pace so far."""
_GELU = math.sqrt(2 / math.pi)


@dataclass(frozen=True)
class ExitAnswer:
    """A frame read at an exit: the intent, one tag a word where it may carry slots, and P(the frame is right)."""

    intent: frames.Choice
    tags: tuple[frames.Choice, ...]
    confidence: float


class Exit(Protocol):
    """A place between two layers where a frame can be read; `passed` counts the layers before it."""

    @property
    def passed(self) -> int:
        """Layers before it."""

    def threshold(self, skill: Skill) -> float:
        """The confidence from which it answers; above 1: never."""

    def read(self, skill: Skill, prompt: SkillPrompt, states: Floats) -> ExitAnswer:
        """Read a frame from the states (T, C) of the prompt and, where the skill has slots, of the echo after it."""


class Pace:
    """How fast a frame goes through the layers, from when this is made; `deadline` is on the clock."""

    def __init__(self, deadline: float, clock: Callable[[], float]) -> None:
        self._deadline, self._clock, self._began = deadline, clock, clock()

    def reaches(self, passed: int, following: int) -> bool:
        """Whether, with `passed` layers behind it, the frame will have passed `following` of them in time."""
        now = self._clock()
        return now + _SLACK * (now - self._began) * (following - passed) / passed <= self._deadline


def unit(states: Floats) -> Floats:
    """States (…, C), each divided by its root mean square."""
    size = np.sqrt(np.square(states).mean(-1, keepdims=True, dtype=np.float32) + np.float32(_FLOOR))
    return np.asarray(states / size, np.float32)


def gelu(x: Floats) -> Floats:
    """The activation, by its usual approximation."""
    return np.asarray(0.5 * x * (1 + np.tanh(_GELU * (x + 0.044715 * x**3))), np.float32)


def stored(name: str, weight: Floats) -> dict[str, NDArray[Any]]:
    """A matrix (N, K) in 8 bits, each row with a scale of its own."""
    scale = np.maximum(np.abs(weight).max(1), 1e-12) / 127
    return {f"{name}.q": np.rint(weight / scale[:, None]).astype(np.int8), f"{name}.scale": scale.astype(np.float32)}


def restored(tensors: Mapping[str, NDArray[Any]], name: str) -> Floats:
    """Undo that."""
    return np.asarray(tensors[f"{name}.q"].astype(np.float32) * tensors[f"{name}.scale"][:, None], np.float32)


class Scorer:
    """One exit's weights: from states to logits."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]], skills: SkillSet) -> None:
        self._skills = skills
        self._products = {name: _product(restored(tensors, name), tensors[f"{name}.bias"]) for name in MATRICES}
        self._queries = tensors["queries"].astype(np.float32)  # (skills, P, R)

    def logits(self, skill: Skill, prompt_states: Floats, word_states: Floats) -> tuple[Floats, Floats | None]:
        """Logits (n_intents,) and, of a skill with slots, (W, n_tags).

        From states (T, C), the last at `<answer>`, and those of the echo's word ends (W, C), of root mean square 1.
        """
        small = self._layer("down", prompt_states)
        queries = self._queries[self._skills.index(skill.name)]
        weights = np.exp(frames.log_softmax(4 / math.sqrt(small.shape[1]) * (queries @ small.T)))
        pools = weights.astype(np.float32) @ small
        mixed = self._layer("mix", np.concatenate([small[-1], pools.reshape(-1)])[None])
        intents = self._products["out"](mixed)[0, self._skills.intent_rows(skill.name)]
        if not skill.tags:
            return intents, None
        words = self._layer("down", word_states)
        edge = np.zeros_like(words[:1])
        before, after = np.concatenate([edge, words[:-1]]), np.concatenate([words[1:], edge])
        joined = np.concatenate([words, before, after, np.broadcast_to(small[-1], words.shape)], axis=1)
        tags = self._products["tag_out"](self._layer("tag_mix", joined))
        return intents, tags[:, self._skills.tag_rows(skill.name)]

    def _layer(self, name: str, x: Floats) -> Floats:
        return gelu(self._products[name](x))


def _product(weight: Floats, bias: NDArray[Any]) -> Callable[[Floats], Floats]:
    """What maps x (n, K) to x Wᵀ + b, on one thread.

    Not numpy's: its threads wait busily beside the engine's, which costs more than the layers that an exit saves.
    """
    from onnx import TensorProto, helper, numpy_helper  # who cuts a graph at exits has it

    kind, (n_out, n_in) = TensorProto.FLOAT, weight.shape
    values = [numpy_helper.from_array(v, n) for v, n in ((weight, "w"), (bias.astype(np.float32), "b"))]
    ends = [helper.make_tensor_value_info(n, kind, ["n", size]) for n, size in (("x", n_in), ("y", n_out))]
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = EngineOptions(threads=1, spin=False)
    session = open_session(model.SerializeToString(), {}, options, "a head of an exit")

    def apply(x: Floats) -> Floats:
        found: Floats = session.run(["y"], {"x": x})[0]
        return found

    return apply


class HeadExit:
    """An exit with a head of its own; `entries` are its calibrations by skill."""

    def __init__(
        self, passed: int, scorer: Scorer, entries: Mapping[str, Mapping[str, Any]], thresholds: Mapping[str, float]
    ) -> None:
        self.passed, self._scorer, self._entries, self._thresholds = passed, scorer, entries, thresholds
        self._models = {
            (skill, scope == OUT_OF_SCOPE): Logistic.from_dict(model)
            for skill, entry in entries.items()
            for scope, model in entry["final"].items()
        }

    def threshold(self, skill: Skill) -> float:
        """The confidence from which it answers; above 1: never."""
        return self._thresholds.get(skill.name, NO_EXIT) if skill.name in self._entries else NO_EXIT

    def read(self, skill: Skill, prompt: SkillPrompt, states: Floats) -> ExitAnswer:
        """Read a frame from the states (T, C) of the prompt and, where the skill has slots, of the echo after it."""
        at, length = unit(states), len(prompt.ids)
        ends = list(prompt.word_ends) if skill.tags else []
        scores, tag_scores = self._scorer.logits(skill, at[:length], at[length:][ends])
        intent = frames.choose_intent(scores, skill, frames.IntentRule.from_manifest(self._entries, skill))
        carries = tag_scores is not None and skill.slots.get(intent.label)
        tags = tuple(frames.tags(tag_scores, skill, intent.label)) if carries and tag_scores is not None else ()
        sure = self._models[skill.name, intent.label == OUT_OF_SCOPE](features((intent, *tags)))
        return ExitAnswer(intent, tags, sure)


class SharedExit:
    """An exit that normalises for the model's own label head; how sure it is, is the intent's probability."""

    def __init__(
        self, passed: int, labels: Floats, skills: SkillSet, calibration: Mapping[str, Any], threshold: float
    ) -> None:
        self.passed, self._labels, self._skills, self._threshold = passed, labels, skills, threshold
        self._rules = {s.name: frames.IntentRule.from_manifest(calibration, s) for s in skills.skills}

    def threshold(self, skill: Skill) -> float:
        """The confidence from which it answers; above 1: never, as where there are slots."""
        return NO_EXIT if skill.slots else self._threshold

    def read(self, skill: Skill, prompt: SkillPrompt, states: Floats) -> ExitAnswer:
        """Read the intent from the last state."""
        scores = self._labels[self._skills.intent_rows(skill.name)] @ states[len(prompt.ids) - 1]
        intent = frames.choose_intent(scores, skill, self._rules[skill.name])
        return ExitAnswer(intent, (), math.exp(intent.logprob))


def exits_of(artifact: Artifact, labels: Floats, skills: SkillSet, threshold: float | None) -> list[Exit]:
    """The exits of an artifact, from the first on; `threshold` is for all skills, or `TUNED_EXITS`; above 1: none.

    Exits that share the model's label head have no threshold of their own: `TUNED_EXITS` closes them. Raises
    `ArtifactError` for a number where the artifact has no exits; `TUNED_EXITS` then opens none.
    """
    m = artifact.manifest
    if threshold is not None and threshold > 1:
        return []
    if threshold is not None and m.exit_heads is None and not m.exits:
        raise ArtifactError(f"{artifact.path} has no early exits; build it with an adapter that has, or turn them off")
    if m.exit_heads is None:
        own = NO_EXIT if threshold is None else threshold
        return [SharedExit(passed, labels, skills, m.calibration, own) for passed in m.exits]
    tensors = artifact.exit_heads()
    thresholds = m.exit_heads.thresholds if threshold is None else dict.fromkeys(skills.names, threshold)
    return [
        HeadExit(passed, Scorer(of_exit(tensors, passed), skills), m.exit_heads.calibration[passed], thresholds)
        for passed in m.exit_heads.passed
    ]


def cuts_for(manifest: Manifest, threshold: float | None) -> tuple[int, ...]:
    """After how many layers the graph is cut for exits with heads, if they may answer at all."""
    closed = threshold is not None and threshold > 1
    return () if closed or manifest.exit_heads is None else manifest.exit_heads.passed


def of_exit(tensors: Mapping[str, NDArray[Any]], passed: int) -> dict[str, NDArray[Any]]:
    """Of all exits' tensors those of one, without its prefix."""
    prefix = f"exit.{passed}."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def open_for(exits: Sequence[Exit], skill: Skill, reach: int) -> list[Exit]:
    """Those of the exits that may answer for a skill, as far as `reach` layers go."""
    return [found for found in exits if found.passed <= reach and found.threshold(skill) <= 1]


class DepthCount:
    """Counts frames, and the tokens read for them, by the number of layers passed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[int, Depth] = {}

    def count(self, passed: int, n_tokens: int) -> None:
        """Count a frame."""
        with self._lock:
            so_far = self._found.get(passed, Depth())
            self._found[passed] = Depth(so_far.frames + 1, so_far.tokens + n_tokens)

    def read(self) -> dict[int, Depth]:
        """What was counted so far."""
        with self._lock:
            return dict(self._found)

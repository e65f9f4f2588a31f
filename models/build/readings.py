"""Collect what calibration needs from a tier: its label logits for labelled utterances. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from models.build.calibrate import Reading
from models.build.datasets import Example
from models.build.progress import Report
from models.errors import DataError
from models.runtime.local import LocalTier
from models.runtime.tier import SkillQuery


def read(tier: LocalTier, examples: Sequence[Example], report: Report) -> list[Reading]:
    """Run the tier over the examples, in order; raises `DataError` for an intent that the tier does not know."""
    found = []
    skills = tier.card.skills
    for done, example in enumerate(examples, 1):
        if skills is None or example.intent not in skills[example.skill].intents:
            raise DataError(
                f"intent '{example.intent}' is unknown to the tier '{tier.card.name}'; adapt or distil it anew"
            )
        query = SkillQuery(example.skill, example.text)
        intent_logits, tag_logits = tier.label_logits(query)
        found.append(Reading(tuple(example.text.split()), example.frame, intent_logits, tag_logits))
        report(done, len(examples), f"{tier.card.name} reads")
    return found

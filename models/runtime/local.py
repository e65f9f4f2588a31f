"""A tier that runs in this process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from models.artifact.manifest import EXPORTED, Manifest
from models.artifact.names import FRAMES, PLAIN
from models.artifact.store import Artifact
from models.errors import PromptError, PromptTooLongError
from models.runtime import frames
from models.runtime.chat import ChatTemplate
from models.runtime.decode import Guide, Step, Vocabulary, decode, decode_by
from models.runtime.descent import Descent
from models.runtime.drafts import AnswerDraft, ChooseAhead, Chooser, PromptLookup, Proposer, ReadAhead, Verifier
from models.runtime.engine import Decoder, Embeddings, Floats, SkillEngine, TextEngine, TextSequence
from models.runtime.exits import DepthCount, Exit, Pace, cuts_for, exits_of, open_for
from models.runtime.exported import ExportedDecoder
from models.runtime.prefixes import PrefixCache, PrefixStats
from models.runtime.providers import CPU
from models.runtime.sessions import EngineOptions, parts_of
from models.runtime.tier import (
    NO_EXIT,
    Chat,
    Completion,
    DraftUse,
    Limits,
    Prompt,
    SkillQuery,
    TierCard,
    TierStats,
    Token,
)
from models.runtime.turns import Turns
from models.skills import Skill, SkillPrompt, SkillSet, encode, slots_from_tags

if TYPE_CHECKING:
    from models.artifact.keys import KeyWrapper


@dataclass(frozen=True)
class _Read:
    """A frame as it was read after so many layers; see `Token.hurried`."""

    intent: frames.Choice
    tags: Sequence[frames.Choice]
    passed: int
    hurried: bool = False


class SkillReader:
    """Answers skill prompts with frames: label logits from a decoder's hidden states, read by `frames`.

    `exit_threshold` is explained in `LocalTier.open`.
    """

    def __init__(
        self,
        artifact: Artifact,
        decoder: SkillEngine,
        tokenizer: Tokenizer,
        skills: SkillSet,
        exit_threshold: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.skills, self.depths, self._clock = skills, DepthCount(), clock
        self._decoder, self._tokenizer = decoder, tokenizer
        self._labels = artifact.labels()["labels"]
        calibration = artifact.manifest.calibration
        self._rules = {skill.name: frames.IntentRule.from_manifest(calibration, skill) for skill in skills.skills}
        self._exits = exits_of(artifact, self._labels, skills, exit_threshold)

    def prompt(self, query: SkillQuery) -> SkillPrompt:
        """Encode a query; raises `PromptError` if it is empty, too long or of an unknown skill."""
        prompt = encode(self.skills, query.skill, query.text, self._ids, self._decoder.embeddings.vocab_size)
        needed = len(prompt.ids) + (len(prompt.echo) if self.skills[query.skill].slots else 0)
        if needed > self._decoder.context:
            limit = self._decoder.context
            raise PromptTooLongError(
                f"the utterance needs {needed} tokens, the model reads {limit}; shorten it", "messages"
            )
        return prompt

    def _ids(self, word: str) -> Sequence[int]:
        ids: Sequence[int] = self._tokenizer.encode(word, add_special_tokens=False).ids
        return ids

    def answer(self, skill: Skill, prompt: SkillPrompt, limits: Limits) -> Iterator[Token]:
        """Yield the intent, then, if it may carry slots, one tag a word; the texts join to the frame's JSON."""
        ids = _both(skill, prompt)
        with self._decoder.sequence(limits.deadline, limits.gone) as sequence:
            exits = open_for(self._exits, skill, self._decoder.reach)
            if exits:
                read = self._early(sequence.descent([ids]), exits, skill, prompt, Pace(limits.deadline, self._clock))
            else:
                read = self._last(skill, prompt, sequence.hidden(ids))
        self.depths.count(read.passed, len(ids))
        exit_layer = read.passed if read.passed < self._decoder.shape.n_layers else None
        for token in _frame(skill, prompt, read.intent, read.tags):
            yield replace(token, exit_layer=exit_layer, hurried=read.hurried, settled=True)

    def _early(self, descent: Descent, exits: Sequence[Exit], skill: Skill, prompt: SkillPrompt, pace: Pace) -> _Read:
        """Read the frame at the first exit that is sure enough, or the last that there is time for, else at the end."""
        n_layers = self._decoder.shape.n_layers
        for found, following in zip(exits, [*(later.passed for later in exits[1:]), n_layers], strict=True):
            answer = found.read(skill, prompt, descent.to(found.passed))
            is_sure = answer.confidence >= found.threshold(skill)
            if is_sure or not pace.reaches(found.passed, following):
                return _Read(answer.intent, answer.tags, found.passed, hurried=not is_sure)
        return self._last(skill, prompt, descent.to(n_layers))

    def _last(self, skill: Skill, prompt: SkillPrompt, states: Floats) -> _Read:
        """Read the frame from the last layer's states (T, C) of all the tokens."""
        n_layers, length = self._decoder.shape.n_layers, len(prompt.ids)
        choice = frames.choose_intent(self._rows(skill) @ states[length - 1], skill, self._rules[skill.name])
        if not skill.slots.get(choice.label):
            return _Read(choice, (), n_layers)
        return _Read(choice, frames.tags(self._tag_rows(skill, prompt, states), skill, choice.label), n_layers)

    def logits(self, query: SkillQuery) -> tuple[Floats, Floats | None]:
        """Logits of the skill's intents (n_intents,) and, if it has slots, of each word's tags (n_words, n_tags)."""
        skill, prompt = self.skills[query.skill], self.prompt(query)
        with self._decoder.sequence() as sequence:
            states = sequence.hidden(_both(skill, prompt))
        intents = self._rows(skill) @ states[len(prompt.ids) - 1]
        return intents, self._tag_rows(skill, prompt, states) if skill.slots else None

    def _rows(self, skill: Skill) -> Floats:
        return self._labels[self.skills.intent_rows(skill.name)]

    def _tag_rows(self, skill: Skill, prompt: SkillPrompt, states: Floats) -> Floats:
        """Tag logits (W, n_tags) from all the tokens' states (T, C)."""
        ends = states[len(prompt.ids) :][list(prompt.word_ends)]
        return np.asarray(ends @ self._labels[self.skills.tag_rows(skill.name)].T)


def _both(skill: Skill, prompt: SkillPrompt) -> Sequence[int]:
    """The prompt and, where the skill has slots, the echo: one pass over both takes two thirds of two passes' time."""
    return [*prompt.ids, *prompt.echo] if skill.slots else prompt.ids


def _frame(skill: Skill, prompt: SkillPrompt, choice: frames.Choice, tags: Sequence[frames.Choice]) -> Iterator[Token]:
    """The tokens of a frame."""
    whole = json.dumps({"intent": choice.label, "slots": {}}, ensure_ascii=False)
    if not skill.slots.get(choice.label):
        yield Token(whole, choice.logprob, choice.margin, finish_reason="stop")
        return
    yield Token(whole.removesuffix("}}"), choice.logprob, choice.margin)
    slots = slots_from_tags(prompt.words, [tag.label for tag in tags])
    closing = json.dumps(slots, ensure_ascii=False)[1:] + "}"
    for tag in tags[:-1]:
        yield Token("", tag.logprob, tag.margin)
    yield Token(closing, tags[-1].logprob, tags[-1].margin, finish_reason="stop")


class TextWriter:
    """Answers chats and completions with text.

    `lookup_tokens` are at most proposed at once from what was said before; 0: none.
    """

    def __init__(self, artifact: Artifact, decoder: TextEngine, tokenizer: Tokenizer, lookup_tokens: int = 0) -> None:
        from models.runtime.grammar import Grammars  # a tier that answers skills only does without its 6 MB

        self._decoder, self._tokenizer, self._lookup_tokens = decoder, tokenizer, lookup_tokens
        self._lock = threading.Lock()
        self.drafts, self.lookups = DraftUse(), DraftUse()
        template = artifact.manifest.chat_template
        self._template = ChatTemplate(template) if template else None
        self._control = [added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special]
        self._vocabulary = Vocabulary(tokenizer.decode, frozenset(artifact.manifest.eos_ids))
        self._grammars = Grammars(
            tokenizer.to_str(), artifact.manifest.architecture.vocab_size, artifact.manifest.eos_ids
        )

    def ids(self, prompt: Chat | Completion) -> list[int]:
        """Encode a prompt; raises `PromptError` if it is empty or too long, or a chat where there is no template."""
        if isinstance(prompt, Completion):
            ids: list[int] = self._tokenizer.encode(prompt.text).ids
        elif self._template is None:
            raise PromptError("this model has no chat template; send a completion", "messages")
        else:
            self._refuse_control_tokens(prompt.messages, "messages")
            self._refuse_control_tokens([astuple(tool) for tool in prompt.tools], "tools")
            text = self._template.render(prompt.messages, prompt.tools)
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        blamed = "prompt" if isinstance(prompt, Completion) else "messages"
        if not ids:
            raise PromptError("the prompt is empty; send some text", blamed)
        limit = self._decoder.context
        if len(ids) >= limit:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, the model reads fewer than {limit}; shorten it", blamed
            )
        return ids

    def _refuse_control_tokens(self, values: Any, field: str) -> None:
        """A message that holds `<|im_end|>` would end its own turn and speak for another role."""
        text = json.dumps(values, ensure_ascii=False)
        found = next((token for token in self._control if token in text), None)
        if found:
            raise PromptError(f"'{field}' holds the model's control token '{found}'; leave it out", field)

    def write(self, ids: Sequence[int], limits: Limits) -> Iterator[Token]:
        """Answer; raises `GrammarError` here and now for a form that cannot be kept to."""
        return self._write(ids, limits, self._grammars.guide(limits))

    def _write(self, ids: Sequence[int], limits: Limits, guide: Guide) -> Iterator[Token]:
        """Yield the answer; the key-value session is lent until the iterator ends or is closed."""
        with self._decoder.sequence(limits.deadline, limits.gone) as sequence:
            able = isinstance(sequence, (Chooser, Verifier)) and sequence.verifies
            draft = self._tokenizer.encode(limits.draft, add_special_tokens=False).ids if limits.draft and able else []
            drafted, lookup = AnswerDraft(draft), PromptLookup(self._lookup_tokens, (*draft, *ids))
            proposers: list[Proposer] = [drafted] if draft else []
            proposers += [lookup] if self._lookup_tokens and able else []
            try:
                for token in self._said(sequence, ids, proposers, limits, guide):
                    yield replace(token, draft=DraftUse(drafted.proposed, drafted.accepted)) if draft else token
            finally:
                self._count(drafted, lookup)

    def _said(
        self,
        sequence: TextSequence,
        ids: Sequence[int],
        proposers: Sequence[Proposer],
        limits: Limits,
        guide: Guide,
    ) -> Iterator[Token]:
        """The answer, read ahead as the proposers say, picked where the logits are."""
        room = sequence.room - len(ids)
        most = min(limits.max_tokens, room)
        if isinstance(sequence, Chooser):
            choose = ChooseAhead(sequence, ids, proposers, guide, most).choose
            return decode_by(choose, ids, self._vocabulary, limits, room, guide)
        step: Step = sequence.logits
        if proposers and isinstance(sequence, Verifier):
            step = ReadAhead(sequence, ids, proposers, guide, most).step
        return decode(step, ids, self._vocabulary, limits, room, guide)

    def _count(self, drafted: AnswerDraft, lookup: PromptLookup) -> None:
        with self._lock:
            self.drafts, self.lookups = (
                DraftUse(before.proposed + now.proposed, before.accepted + now.accepted)
                for before, now in ((self.drafts, drafted), (self.lookups, lookup))
            )


class LocalTier:
    """A `Tier` over an artifact; open one with `LocalTier.open`."""

    def __init__(
        self,
        card: TierCard,
        reader: SkillReader | None,
        writer: TextWriter | None,
        stats: Callable[[], TierStats] = TierStats,
    ) -> None:
        self._card, self._reader, self._writer, self._stats = card, reader, writer, stats

    @classmethod
    def open(
        cls,
        path: Path,
        name: str,
        threads: int = 2,
        *,
        spin: bool = True,
        context: int = 2048,
        exit_threshold: float | None = NO_EXIT,
        sequences: int = 4,
        prefix_cache_bytes: int = 0,
        providers: Sequence[str] = (CPU,),
        lookup_tokens: int = 0,
        exact_drafts: bool = False,
        slowdown: float = 1.0,
        slowdown_file: Path | None = None,
        keys: KeyWrapper | None = None,
        signer: bytes | None = None,
    ) -> LocalTier:
        """Load an artifact; raises what `Artifact.open` raises, where `keys` and `signer` are explained.

        `exit_threshold` is the confidence from which an early exit answers; above 1 none does, `TUNED_EXITS` is each
        skill's own. It is calibrated where exits have heads; where they share the model's, it is the intent's
        probability.
        `lookup_tokens` of repeated text are at most read ahead at once. The rest is explained in `EngineOptions`; the
        prefix cache is the text writer's.
        """
        artifact = Artifact.open(path, keys=keys, signer=signer).keeping()
        m = artifact.manifest
        options = EngineOptions(
            threads, spin, context, sequences, providers=providers, slowdown=slowdown, slowdown_file=slowdown_file
        )
        cache_bytes = prefix_cache_bytes if m.lm_head else 0
        writing = replace(options, prefix_cache_bytes=cache_bytes, exact_drafts=exact_drafts)
        turns = Turns()
        tokenizer = Tokenizer.from_str(artifact.tokenizer_json())
        context = min(context, m.architecture.context)
        if m.graph == EXPORTED:
            exported = ExportedDecoder.open(artifact, options)
            return cls(card_of(name, m, context, exported.provider), None, TextWriter(artifact, exported, tokenizer))
        embeddings = Embeddings(artifact.embeddings(), artifact.labels().get("inputs"), m.architecture.width)
        decoders = {}
        for variant, parts in parts_of(artifact, options, cuts_for(m, exit_threshold)):
            own = writing if m.lm_head and variant == PLAIN else options
            decoders[variant] = Decoder(m.architecture, parts.segments, embeddings, own, turns, long=parts.long)
        beside = decoders.get(FRAMES) or decoders.get(PLAIN)
        reader = SkillReader(artifact, beside, tokenizer, m.skills, exit_threshold) if m.skills and beside else None
        writer = TextWriter(artifact, decoders[PLAIN], tokenizer, lookup_tokens) if m.lm_head else None
        card = card_of(name, m, context, next(iter(decoders.values())).provider)
        prefixes = decoders[PLAIN].prefixes if m.lm_head else None
        return cls(card, reader, writer, lambda: stats_of(turns, prefixes, reader, writer))

    @property
    def card(self) -> TierCard:
        """What the tier says of itself."""
        return self._card

    def count_tokens(self, prompt: Prompt) -> int:
        """Tokens of the prompt as the model reads it; raises `PromptError`."""
        if isinstance(prompt, SkillQuery):
            return len(self._skills().prompt(prompt).ids)
        return len(self._texts().ids(prompt))

    def generate(self, prompt: Prompt, limits: Limits) -> Iterator[Token]:
        """Answer token by token; a prompt the tier cannot take raises `PromptError` here and now."""
        if isinstance(prompt, SkillQuery):
            reader = self._skills()
            return reader.answer(reader.skills[prompt.skill], reader.prompt(prompt), limits)
        writer = self._texts()
        return writer.write(writer.ids(prompt), limits)

    def stats(self) -> TierStats:
        """What was counted since the tier was opened."""
        return self._stats()

    def label_logits(self, query: SkillQuery) -> tuple[Floats, Floats | None]:
        """What the skill's labels scored: intents (n_intents,) and tags (n_words, n_tags) or None; for calibration."""
        return self._skills().logits(query)

    def _skills(self) -> SkillReader:
        if self._reader is None:
            raise PromptError(f"the tier '{self._card.name}' has no skills; send a chat", "skill")
        return self._reader

    def _texts(self) -> TextWriter:
        if self._writer is None:
            raise PromptError(
                f"the tier '{self._card.name}' does not write text; name a skill or another tier", "skill"
            )
        return self._writer


def stats_of(
    turns: Turns, prefixes: PrefixCache[Any] | None, reader: SkillReader | None, writer: TextWriter | None
) -> TierStats:
    """What a tier counted since it was opened."""
    drafts, lookups = (writer.drafts, writer.lookups) if writer else (DraftUse(), DraftUse())
    prefix = prefixes.stats if prefixes else PrefixStats()
    return TierStats(
        prefix_asked_tokens=prefix.asked_tokens,
        prefix_reused_tokens=prefix.reused_tokens,
        prefix_evicted_blocks=prefix.evicted_blocks,
        prefix_held_bytes=prefix.held_bytes,
        passes=turns.stats.shared_runs,
        pass_tokens=turns.stats.shared_turns,
        pass_s=turns.stats.shared_s,
        draft_proposed_tokens=drafts.proposed,
        draft_accepted_tokens=drafts.accepted,
        lookup_proposed_tokens=lookups.proposed,
        lookup_accepted_tokens=lookups.accepted,
        depths=reader.depths.read() if reader else {},
    )


def card_of(name: str, manifest: Manifest, context: int, provider: str) -> TierCard:
    """What a tier with this manifest says of itself."""
    return TierCard(
        name=name,
        model_id=manifest.model_id,
        model_version=manifest.model_version,
        skills=manifest.skills,
        chats=manifest.chats,
        context=context,
        quantisation=manifest.quantisation,
        watts=manifest.energy.watts,
        watts_source=manifest.energy.source,
        calibration=manifest.calibration,
        exits=manifest.exit_heads.calibration if manifest.exit_heads else {},
        provider=provider,
    )

"""Hold an answer to a form: JSON of a schema, calls of functions. llguidance knows which tokens may come next.

The grammar of a wish is compiled once for a tokenizer and kept; each answer walks through a copy of its own. JSON is
written as `json.dumps` does it, with one space after commas and colons: room for any white space would let a small
model fill its budget with it, and leave fewer tokens forced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from models.errors import GrammarError
from models.runtime.decode import FREE, Guide
from models.runtime.tier import JsonForm, Limits, Tool, ToolUse
from models.runtime.toolcalls import BETWEEN, CLOSING, MARK, OPENING

Floats = NDArray[np.float32]

MAX_CALLS = 8
"""Calls of functions in one answer."""
SCHEMA_FIELD = "response_format.json_schema.schema"
_KEPT = 32
"""Compiled grammars that are kept."""
_MAX_LEXER_STATES = 20_000
"""Of a grammar; one takes 1 to 2 kB."""
_MESSAGE_CHARACTERS = 200

# What llguidance merges takes time exponential in the schema's size, which none of its own limits bounds.
_APPLICATORS = frozenset({"allOf", "anyOf", "oneOf", "$ref"})
_ANNOTATIONS = frozenset({"$comment", "default", "deprecated", "description", "example", "examples", "title"})
_BESIDE_APPLICATORS = _ANNOTATIONS | {
    *("$defs", "$id", "$schema", "definitions", "discriminator", "nullable", "readOnly", "type", "writeOnly")
}
_LOCAL_REFERENCE = re.compile(r"#(/(\$defs|definitions)/[^/]+)?")
_HOLDS_SCHEMA = ("additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then")
_HOLDS_SCHEMAS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_HOLDS_NAMED_SCHEMAS = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")


class Grammars:
    """Compiles what answers have to look like, for one tokenizer (as the JSON of Hugging Face's `tokenizers`)."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_ids: Collection[int]) -> None:
        self._tokenizer_json, self._vocab_size, self._eos_ids = tokenizer_json, vocab_size, sorted(eos_ids)
        self._compiled = lru_cache(_KEPT)(self._compile)

    def guide(self, limits: Limits) -> Guide:
        """A guide for one answer; raises `GrammarError` where the form cannot be kept to."""
        if limits.json is None and limits.tools is None:
            return FREE
        return GrammarGuide(self._compiled(limits.json, limits.tools).deep_copy(), self._vocab_size)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """Made when first needed: it takes as long as loading a small model."""
        try:
            return LLTokenizer(self._tokenizer_json, n_vocab=self._vocab_size, eos_token=self._eos_ids)
        except ValueError as error:
            message = f"this tier's tokenizer cannot be held to a form: {_short(error)}"
            raise GrammarError(message, "response_format") from error

    def _compile(self, form: JsonForm | None, use: ToolUse | None) -> LLMatcher:
        field = SCHEMA_FIELD if use is None else "tools"
        limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, grammar_text(form, use), log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(f"this cannot be compiled: {_short(matcher.get_error())}", field)
        probe = GrammarGuide(matcher.deep_copy(), self._vocab_size, field)
        if not probe.forced():  # better now than in the answer
            probe.masked(np.zeros(self._vocab_size, np.float32))
        return matcher


class GrammarGuide:
    """A `Guide` through one answer."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, field: str = "response_format") -> None:
        self._matcher, self._vocab_size, self._field = matcher, vocab_size, field
        self._bits = allocate_token_bitmask(1, vocab_size)  # (1, ⌈V / 32⌉) int32, least significant bit first

    @property
    def complete(self) -> bool:
        """Whether the grammar is done and nothing may follow."""
        return bool(self._matcher.is_stopped())

    def forced(self) -> Sequence[int]:
        """The ids in which the model's tokenizer writes what must come next."""
        ids: list[int] = self._matcher.compute_ff_tokens()
        if ids:
            self._matcher.consume_tokens(ids)
        self._check()
        return ids

    def masked(self, logits: Floats) -> Floats:
        """A copy of the logits (V,) with −inf for what the grammar does not allow."""
        return np.where(self._allowed(), logits, np.float32(-np.inf))

    def take(self, token_id: int) -> None:
        """Go on past an id."""
        self._matcher.consume_token(token_id)
        self._check()

    def allowed(self, ids: Sequence[int]) -> int:
        """How many of the first of `ids` the grammar would take."""
        return int(self._matcher.validate_tokens(list(ids)))

    def ahead(self, ids: Sequence[int]) -> Iterator[bytes | None]:
        """What may come next, now and after each of `ids`; the walk ends where the parser's bounds would be met."""
        yield np.packbits(self._allowed()).tobytes()
        walker = GrammarGuide(self._matcher.deep_copy(), self._vocab_size, self._field)
        with suppress(GrammarError):
            yield from walker._walk(ids)

    def _walk(self, ids: Sequence[int]) -> Iterator[bytes | None]:
        """As the token loop does it: an id is taken, then what is forced, then the next one is chosen."""
        left = list(ids)
        while left:
            self.take(left.pop(0))
            for forced in () if self.complete else self.forced():
                yield None
                if not left or left.pop(0) != forced:
                    return
            if self.complete:
                return
            yield np.packbits(self._allowed()).tobytes()

    def _allowed(self) -> NDArray[np.bool_]:
        """Which ids (V,) may come next."""
        fill_next_token_bitmask(self._matcher, self._bits)
        self._check()
        bits = np.unpackbits(self._bits.view(np.uint8)[0], count=self._vocab_size, bitorder="little")
        return bits.view(np.bool_)

    def _check(self) -> None:
        """The bounds on the parser's work hold for each step, so that an answer may fail in its middle."""
        if self._matcher.is_error():
            raise GrammarError(
                f"no answer of this form can go on here: {_short(self._matcher.get_error())}", self._field
            )


def grammar_text(form: JsonForm | None, use: ToolUse | None) -> str:
    """The grammar, in llguidance's variant of Lark; raises `GrammarError` naming the schema at fault."""
    said = "TEXT" if form is None else "json"
    rules = {"TEXT": "/(?s:.*)/"} if form is None else {"json": _json(form.schema, SCHEMA_FIELD, strict=form.strict)}
    if use is None:
        return _lark({"start": said, **rules})
    calls = "call" if use.only or not use.parallel else f"call more{{0,{MAX_CALLS - 1}}}"
    rules |= _call_rules(use)
    if use.required or use.only:
        rules["start"] = f"{_quoted(MARK)} {calls}"
    elif form is None:  # text, and calls after it or at once
        rules["start"] = f"mark {calls} | TEXT"
        rules["mark[lazy]"] = f"TEXT {_quoted(MARK)}"
    else:
        rules["start"] = f"{_quoted(MARK)} {calls} | json"
    return _lark(rules)


def _call_rules(use: ToolUse) -> dict[str, str]:
    """`call` is what follows `<tool_call>`, `more` a further call; one rule a function."""
    bodies = {
        f"call_{index}": f"{_quoted(tool.name + BETWEEN)} {_arguments(tool, index)}"
        for index, tool in enumerate(use.tools)
        if use.only in {"", tool.name}
    }
    opening = _quoted(OPENING.removeprefix(MARK))
    return {
        "call": f"{opening} ({' | '.join(bodies)}) {_quoted(CLOSING)}",
        "more": f"{_quoted(chr(10) + MARK)} call",
        **bodies,
    }


def _arguments(tool: Tool, index: int) -> str:
    return _json(tool.parameters, f"tools[{index}].function.parameters", strict=tool.strict)


def _lark(rules: Mapping[str, str]) -> str:
    return "\n".join(f"{name}: {body}" for name, body in rules.items())


def _quoted(text: str) -> str:
    return json.dumps(text)


def _json(schema: str, field: str, *, strict: bool) -> str:
    """A schema as a term of the grammar; raises `GrammarError` if it cannot be kept to."""
    values = json.loads(schema)
    _refuse_merging(values, field)
    values["x-guidance"] = {
        "item_separator": ", ",
        "key_separator": ": ",
        "whitespace_flexible": False,
        "lenient": not strict,
        # No \\u: half a surrogate pair is no text. Characters that have no other escape stay out.
        "json_allowed_escapes": 'nrbtf\\"',
    }
    try:
        message = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(values))
    except ValueError as error:
        message = str(error)
    if message and not message.startswith("WARNING"):
        raise GrammarError(f"{field}: {_short(message)}", field)
    return f"%json {json.dumps(values)}"


def _refuse_merging(schema: dict[str, Any], field: str) -> None:
    """Let subschemas stand alone only; what they refer to is a definition."""
    for node in _subschemas(schema):
        used, parts = _APPLICATORS & node.keys(), node.get("allOf")
        conditions = node.keys() - _BESIDE_APPLICATORS if used else ()
        if len(conditions) > 1 or (isinstance(parts, list) and len(parts) > 1):
            message = (
                f"{field}: a schema with '{min(used)}' may hold no further conditions, and 'allOf' one schema only; "
                "write out what they come to together"
            )
            raise GrammarError(message, field)
        reference = node.get("$ref", "#")
        if not isinstance(reference, str) or not _LOCAL_REFERENCE.fullmatch(reference):
            raise GrammarError(f"{field}: a '$ref' must be '#' or like '#/$defs/NAME'", field)


def _subschemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema and all that stand in it; `const`, `enum` and the like hold values, not schemas."""
    pending: list[Any] = [schema]
    while pending:
        node = pending.pop()
        if not isinstance(node, dict):
            continue
        yield node
        pending.extend(node.get(key) for key in _HOLDS_SCHEMA)
        for key in _HOLDS_SCHEMAS:
            pending.extend(node[key] if isinstance(node.get(key), list) else ())
        for key in _HOLDS_NAMED_SCHEMAS:
            pending.extend(node[key].values() if isinstance(node.get(key), dict) else ())


def _short(message: object) -> str:
    """A message of llguidance's in one line."""
    line = " ".join(str(message).split())
    return line if len(line) <= _MESSAGE_CHARACTERS else line[:_MESSAGE_CHARACTERS] + " …"

from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Want(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NOTHING: _ClassVar[Want]
    TOKEN: _ClassVar[Want]
    STATES: _ClassVar[Want]

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FP32: _ClassVar[Encoding]
    FP16: _ClassVar[Encoding]
    INT8: _ClassVar[Encoding]
NOTHING: Want
TOKEN: Want
STATES: Want
FP32: Encoding
FP16: Encoding
INT8: Encoding

class ToShard(_message.Message):
    __slots__ = ("open", "piece")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    open: Open
    piece: Piece
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., piece: _Optional[_Union[Piece, _Mapping]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("protocol", "model_digest", "first_layer", "variant", "remaining_ms", "prefix", "exact", "place", "rank", "ranks", "head", "groups", "line")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    model_digest: str
    first_layer: int
    variant: str
    remaining_ms: float
    prefix: _containers.RepeatedScalarFieldContainer[bytes]
    exact: bool
    place: int
    rank: int
    ranks: int
    head: str
    groups: int
    line: bool
    def __init__(self, protocol: _Optional[int] = ..., model_digest: _Optional[str] = ..., first_layer: _Optional[int] = ..., variant: _Optional[str] = ..., remaining_ms: _Optional[float] = ..., prefix: _Optional[_Iterable[bytes]] = ..., exact: _Optional[bool] = ..., place: _Optional[int] = ..., rank: _Optional[int] = ..., ranks: _Optional[int] = ..., head: _Optional[str] = ..., groups: _Optional[int] = ..., line: _Optional[bool] = ...) -> None: ...

class States(_message.Message):
    __slots__ = ("tokens", "encoding", "values")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    encoding: Encoding
    values: bytes
    def __init__(self, tokens: _Optional[int] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., values: _Optional[bytes] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("states", "want", "again", "start", "choices")
    STATES_FIELD_NUMBER: _ClassVar[int]
    WANT_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    states: States
    want: Want
    again: bool
    start: int
    choices: _containers.RepeatedCompositeFieldContainer[Choice]
    def __init__(self, states: _Optional[_Union[States, _Mapping]] = ..., want: _Optional[_Union[Want, str]] = ..., again: _Optional[bool] = ..., start: _Optional[int] = ..., choices: _Optional[_Iterable[_Union[Choice, _Mapping]]] = ...) -> None: ...

class Choice(_message.Message):
    __slots__ = ("temperature", "top_p", "top_logprobs", "draw", "allowed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    DRAW_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_logprobs: int
    draw: float
    allowed: bytes
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_logprobs: _Optional[int] = ..., draw: _Optional[float] = ..., allowed: _Optional[bytes] = ...) -> None: ...

class FromShard(_message.Message):
    __slots__ = ("opened", "picks", "states", "logits", "leaving")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    PICKS_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    picks: Picks
    states: States
    logits: bytes
    leaving: bool
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., picks: _Optional[_Union[Picks, _Mapping]] = ..., states: _Optional[_Union[States, _Mapping]] = ..., logits: _Optional[bytes] = ..., leaving: _Optional[bool] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("held_tokens", "line_port", "line_token")
    HELD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LINE_PORT_FIELD_NUMBER: _ClassVar[int]
    LINE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    held_tokens: int
    line_port: int
    line_token: bytes
    def __init__(self, held_tokens: _Optional[int] = ..., line_port: _Optional[int] = ..., line_token: _Optional[bytes] = ...) -> None: ...

class Picks(_message.Message):
    __slots__ = ("picks",)
    PICKS_FIELD_NUMBER: _ClassVar[int]
    picks: _containers.RepeatedCompositeFieldContainer[Picked]
    def __init__(self, picks: _Optional[_Iterable[_Union[Picked, _Mapping]]] = ...) -> None: ...

class Picked(_message.Message):
    __slots__ = ("id", "logprob", "margin", "top_ids", "top_logprobs")
    ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    id: int
    logprob: float
    margin: float
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, id: _Optional[int] = ..., logprob: _Optional[float] = ..., margin: _Optional[float] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

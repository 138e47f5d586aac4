from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TableCall(_message.Message):
    __slots__ = ("call_id", "epoch", "remaining_us", "seen_version", "take", "put")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REMAINING_US_FIELD_NUMBER: _ClassVar[int]
    SEEN_VERSION_FIELD_NUMBER: _ClassVar[int]
    TAKE_FIELD_NUMBER: _ClassVar[int]
    PUT_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    epoch: int
    remaining_us: int
    seen_version: int
    take: Take
    put: Put
    def __init__(self, call_id: _Optional[int] = ..., epoch: _Optional[int] = ..., remaining_us: _Optional[int] = ..., seen_version: _Optional[int] = ..., take: _Optional[_Union[Take, _Mapping]] = ..., put: _Optional[_Union[Put, _Mapping]] = ...) -> None: ...

class Take(_message.Message):
    __slots__ = ("positions",)
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    positions: bytes
    def __init__(self, positions: _Optional[bytes] = ...) -> None: ...

class Put(_message.Message):
    __slots__ = ("positions", "records")
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    positions: bytes
    records: bytes
    def __init__(self, positions: _Optional[bytes] = ..., records: _Optional[bytes] = ...) -> None: ...

class TableReply(_message.Message):
    __slots__ = ("call_id", "epoch", "code", "reason", "message", "version", "changed", "forget", "records")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    epoch: int
    code: int
    reason: str
    message: str
    version: int
    changed: bytes
    forget: bool
    records: bytes
    def __init__(self, call_id: _Optional[int] = ..., epoch: _Optional[int] = ..., code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., version: _Optional[int] = ..., changed: _Optional[bytes] = ..., forget: _Optional[bool] = ..., records: _Optional[bytes] = ...) -> None: ...

from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TableCall(_message.Message):
    __slots__ = ("call_id", "epoch", "remaining_us", "row_version", "take")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REMAINING_US_FIELD_NUMBER: _ClassVar[int]
    ROW_VERSION_FIELD_NUMBER: _ClassVar[int]
    TAKE_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    epoch: int
    remaining_us: int
    row_version: int
    take: Take
    def __init__(self, call_id: _Optional[int] = ..., epoch: _Optional[int] = ..., remaining_us: _Optional[int] = ..., row_version: _Optional[int] = ..., take: _Optional[_Union[Take, _Mapping]] = ...) -> None: ...

class Take(_message.Message):
    __slots__ = ("positions",)
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    positions: bytes
    def __init__(self, positions: _Optional[bytes] = ...) -> None: ...

class TableReply(_message.Message):
    __slots__ = ("call_id", "epoch", "code", "reason", "message", "records")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    epoch: int
    code: int
    reason: str
    message: str
    records: bytes
    def __init__(self, call_id: _Optional[int] = ..., epoch: _Optional[int] = ..., code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., records: _Optional[bytes] = ...) -> None: ...

class TableInspect(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TableState(_message.Message):
    __slots__ = ("table", "shard", "epoch", "row_version", "log_id", "partition", "position", "end", "changes", "rejected", "trouble")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROW_VERSION_FIELD_NUMBER: _ClassVar[int]
    LOG_ID_FIELD_NUMBER: _ClassVar[int]
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    table: str
    shard: int
    epoch: int
    row_version: int
    log_id: int
    partition: int
    position: int
    end: int
    changes: int
    rejected: int
    trouble: str
    def __init__(self, table: _Optional[str] = ..., shard: _Optional[int] = ..., epoch: _Optional[int] = ..., row_version: _Optional[int] = ..., log_id: _Optional[int] = ..., partition: _Optional[int] = ..., position: _Optional[int] = ..., end: _Optional[int] = ..., changes: _Optional[int] = ..., rejected: _Optional[int] = ..., trouble: _Optional[str] = ...) -> None: ...

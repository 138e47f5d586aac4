from silvershard.cluster import retrieval_pb2 as _retrieval_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ShardCall(_message.Message):
    __slots__ = ("call_id", "generation", "epoch", "remaining_us", "key", "encode", "count", "open", "close", "open_and_close", "release", "fields")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REMAINING_US_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    OPEN_AND_CLOSE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    generation: int
    epoch: int
    remaining_us: int
    key: str
    encode: Encode
    count: TensorMap
    open: TensorMap
    close: TensorMap
    open_and_close: OpenAndClose
    release: Release
    fields: Fields
    def __init__(self, call_id: _Optional[int] = ..., generation: _Optional[int] = ..., epoch: _Optional[int] = ..., remaining_us: _Optional[int] = ..., key: _Optional[str] = ..., encode: _Optional[_Union[Encode, _Mapping]] = ..., count: _Optional[_Union[TensorMap, _Mapping]] = ..., open: _Optional[_Union[TensorMap, _Mapping]] = ..., close: _Optional[_Union[TensorMap, _Mapping]] = ..., open_and_close: _Optional[_Union[OpenAndClose, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., fields: _Optional[_Union[Fields, _Mapping]] = ...) -> None: ...

class Encode(_message.Message):
    __slots__ = ("users",)
    USERS_FIELD_NUMBER: _ClassVar[int]
    users: _containers.RepeatedCompositeFieldContainer[_retrieval_pb2.FeatureMap]
    def __init__(self, users: _Optional[_Iterable[_Union[_retrieval_pb2.FeatureMap, _Mapping]]] = ...) -> None: ...

class OpenAndClose(_message.Message):
    __slots__ = ("work", "cutoffs")
    WORK_FIELD_NUMBER: _ClassVar[int]
    CUTOFFS_FIELD_NUMBER: _ClassVar[int]
    work: TensorMap
    cutoffs: TensorMap
    def __init__(self, work: _Optional[_Union[TensorMap, _Mapping]] = ..., cutoffs: _Optional[_Union[TensorMap, _Mapping]] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Fields(_message.Message):
    __slots__ = ("item_ids", "names")
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    item_ids: _containers.RepeatedScalarFieldContainer[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, item_ids: _Optional[_Iterable[int]] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class ShardReply(_message.Message):
    __slots__ = ("call_id", "generation", "epoch", "code", "reason", "message", "times_us", "tensors", "fields", "warnings", "fallback_users")
    class TimesUsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TIMES_US_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_USERS_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    generation: int
    epoch: int
    code: int
    reason: str
    message: str
    times_us: _containers.ScalarMap[str, int]
    tensors: TensorMap
    fields: FieldColumns
    warnings: _containers.RepeatedCompositeFieldContainer[Warnings]
    fallback_users: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, call_id: _Optional[int] = ..., generation: _Optional[int] = ..., epoch: _Optional[int] = ..., code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., times_us: _Optional[_Mapping[str, int]] = ..., tensors: _Optional[_Union[TensorMap, _Mapping]] = ..., fields: _Optional[_Union[FieldColumns, _Mapping]] = ..., warnings: _Optional[_Iterable[_Union[Warnings, _Mapping]]] = ..., fallback_users: _Optional[_Iterable[int]] = ...) -> None: ...

class Warnings(_message.Message):
    __slots__ = ("texts",)
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, texts: _Optional[_Iterable[str]] = ...) -> None: ...

class FieldColumns(_message.Message):
    __slots__ = ("columns",)
    class ColumnsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _retrieval_pb2.Column
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_retrieval_pb2.Column, _Mapping]] = ...) -> None: ...
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    columns: _containers.MessageMap[str, _retrieval_pb2.Column]
    def __init__(self, columns: _Optional[_Mapping[str, _retrieval_pb2.Column]] = ...) -> None: ...

class TensorMap(_message.Message):
    __slots__ = ("tensors",)
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "dtype", "shape", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("sequence", "epoch", "generation")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    epoch: int
    generation: int
    def __init__(self, sequence: _Optional[int] = ..., epoch: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShardReport(_message.Message):
    __slots__ = ("epoch", "generation", "tables")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    generation: int
    tables: _containers.RepeatedCompositeFieldContainer[TableReport]
    def __init__(self, epoch: _Optional[int] = ..., generation: _Optional[int] = ..., tables: _Optional[_Iterable[_Union[TableReport, _Mapping]]] = ...) -> None: ...

class TableReport(_message.Message):
    __slots__ = ("table", "lookups", "rows", "cached", "fetched", "defaulted", "failures")
    class FailuresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TABLE_FIELD_NUMBER: _ClassVar[int]
    LOOKUPS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    FETCHED_FIELD_NUMBER: _ClassVar[int]
    DEFAULTED_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    table: str
    lookups: int
    rows: int
    cached: int
    fetched: int
    defaulted: int
    failures: _containers.ScalarMap[str, int]
    def __init__(self, table: _Optional[str] = ..., lookups: _Optional[int] = ..., rows: _Optional[int] = ..., cached: _Optional[int] = ..., fetched: _Optional[int] = ..., defaulted: _Optional[int] = ..., failures: _Optional[_Mapping[str, int]] = ...) -> None: ...

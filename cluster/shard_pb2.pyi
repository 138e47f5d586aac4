from silvershard.cluster import retrieval_pb2 as _retrieval_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerationState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GENERATION_STATE_UNSPECIFIED: _ClassVar[GenerationState]
    GENERATION_STATE_LOADING: _ClassVar[GenerationState]
    GENERATION_STATE_CATCHING_UP: _ClassVar[GenerationState]
    GENERATION_STATE_PREPARED: _ClassVar[GenerationState]
    GENERATION_STATE_FAILED: _ClassVar[GenerationState]
GENERATION_STATE_UNSPECIFIED: GenerationState
GENERATION_STATE_LOADING: GenerationState
GENERATION_STATE_CATCHING_UP: GenerationState
GENERATION_STATE_PREPARED: GenerationState
GENERATION_STATE_FAILED: GenerationState

class ShardCall(_message.Message):
    __slots__ = ("call_id", "generation", "epoch", "remaining_us", "key", "encode", "count", "open", "close", "fields", "cancel", "released", "fresh")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REMAINING_US_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    FRESH_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    generation: int
    epoch: int
    remaining_us: int
    key: str
    encode: Encode
    count: TensorMap
    open: TensorMap
    close: TensorMap
    fields: Fields
    cancel: int
    released: _containers.RepeatedScalarFieldContainer[str]
    fresh: Freshness
    def __init__(self, call_id: _Optional[int] = ..., generation: _Optional[int] = ..., epoch: _Optional[int] = ..., remaining_us: _Optional[int] = ..., key: _Optional[str] = ..., encode: _Optional[_Union[Encode, _Mapping]] = ..., count: _Optional[_Union[TensorMap, _Mapping]] = ..., open: _Optional[_Union[TensorMap, _Mapping]] = ..., close: _Optional[_Union[TensorMap, _Mapping]] = ..., fields: _Optional[_Union[Fields, _Mapping]] = ..., cancel: _Optional[int] = ..., released: _Optional[_Iterable[str]] = ..., fresh: _Optional[_Union[Freshness, _Mapping]] = ...) -> None: ...

class Freshness(_message.Message):
    __slots__ = ("log_id", "after", "max_staleness_us", "wait_us")
    LOG_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    MAX_STALENESS_US_FIELD_NUMBER: _ClassVar[int]
    WAIT_US_FIELD_NUMBER: _ClassVar[int]
    log_id: int
    after: _containers.RepeatedCompositeFieldContainer[LogPosition]
    max_staleness_us: int
    wait_us: int
    def __init__(self, log_id: _Optional[int] = ..., after: _Optional[_Iterable[_Union[LogPosition, _Mapping]]] = ..., max_staleness_us: _Optional[int] = ..., wait_us: _Optional[int] = ...) -> None: ...

class LogPosition(_message.Message):
    __slots__ = ("partition", "position")
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    partition: int
    position: int
    def __init__(self, partition: _Optional[int] = ..., position: _Optional[int] = ...) -> None: ...

class Seen(_message.Message):
    __slots__ = ("log_id", "cut", "staleness_us", "documents")
    LOG_ID_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    STALENESS_US_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    log_id: int
    cut: _containers.RepeatedScalarFieldContainer[int]
    staleness_us: int
    documents: int
    def __init__(self, log_id: _Optional[int] = ..., cut: _Optional[_Iterable[int]] = ..., staleness_us: _Optional[int] = ..., documents: _Optional[int] = ...) -> None: ...

class Encode(_message.Message):
    __slots__ = ("users",)
    USERS_FIELD_NUMBER: _ClassVar[int]
    users: _containers.RepeatedCompositeFieldContainer[_retrieval_pb2.FeatureMap]
    def __init__(self, users: _Optional[_Iterable[_Union[_retrieval_pb2.FeatureMap, _Mapping]]] = ...) -> None: ...

class Fields(_message.Message):
    __slots__ = ("item_ids", "names")
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    item_ids: _containers.RepeatedScalarFieldContainer[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, item_ids: _Optional[_Iterable[int]] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class ShardReply(_message.Message):
    __slots__ = ("call_id", "generation", "epoch", "code", "reason", "message", "times_us", "tensors", "fields", "warnings", "fallback_users", "seen", "field")
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
    SEEN_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
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
    seen: Seen
    field: str
    def __init__(self, call_id: _Optional[int] = ..., generation: _Optional[int] = ..., epoch: _Optional[int] = ..., code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., times_us: _Optional[_Mapping[str, int]] = ..., tensors: _Optional[_Union[TensorMap, _Mapping]] = ..., fields: _Optional[_Union[FieldColumns, _Mapping]] = ..., warnings: _Optional[_Iterable[_Union[Warnings, _Mapping]]] = ..., fallback_users: _Optional[_Iterable[int]] = ..., seen: _Optional[_Union[Seen, _Mapping]] = ..., field: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("layout", "data")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    layout: str
    data: bytes
    def __init__(self, layout: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("sequence", "epoch", "served")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    epoch: int
    served: _containers.RepeatedCompositeFieldContainer[ServedGeneration]
    def __init__(self, sequence: _Optional[int] = ..., epoch: _Optional[int] = ..., served: _Optional[_Iterable[_Union[ServedGeneration, _Mapping]]] = ...) -> None: ...

class ServedGeneration(_message.Message):
    __slots__ = ("generation", "seen")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    generation: int
    seen: Seen
    def __init__(self, generation: _Optional[int] = ..., seen: _Optional[_Union[Seen, _Mapping]] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShardReport(_message.Message):
    __slots__ = ("epoch", "tables", "generations", "shard", "replica", "expired", "cancelled")
    class ExpiredEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class CancelledEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    tables: _containers.RepeatedCompositeFieldContainer[TableReport]
    generations: _containers.RepeatedCompositeFieldContainer[GenerationReport]
    shard: int
    replica: int
    expired: _containers.ScalarMap[str, int]
    cancelled: _containers.ScalarMap[str, int]
    def __init__(self, epoch: _Optional[int] = ..., tables: _Optional[_Iterable[_Union[TableReport, _Mapping]]] = ..., generations: _Optional[_Iterable[_Union[GenerationReport, _Mapping]]] = ..., shard: _Optional[int] = ..., replica: _Optional[int] = ..., expired: _Optional[_Mapping[str, int]] = ..., cancelled: _Optional[_Mapping[str, int]] = ...) -> None: ...

class PrepareRequest(_message.Message):
    __slots__ = ("generation", "snapshot")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    generation: int
    snapshot: str
    def __init__(self, generation: _Optional[int] = ..., snapshot: _Optional[str] = ...) -> None: ...

class RetireRequest(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    def __init__(self, generation: _Optional[int] = ...) -> None: ...

class RetireReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GenerationReport(_message.Message):
    __slots__ = ("generation", "snapshot", "state", "reason", "seen", "ends", "pool", "updates", "refused")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    generation: int
    snapshot: str
    state: GenerationState
    reason: str
    seen: Seen
    ends: _containers.RepeatedScalarFieldContainer[int]
    pool: PoolReport
    updates: UpdateReport
    refused: _containers.RepeatedCompositeFieldContainer[RefusedUpdate]
    def __init__(self, generation: _Optional[int] = ..., snapshot: _Optional[str] = ..., state: _Optional[_Union[GenerationState, str]] = ..., reason: _Optional[str] = ..., seen: _Optional[_Union[Seen, _Mapping]] = ..., ends: _Optional[_Iterable[int]] = ..., pool: _Optional[_Union[PoolReport, _Mapping]] = ..., updates: _Optional[_Union[UpdateReport, _Mapping]] = ..., refused: _Optional[_Iterable[_Union[RefusedUpdate, _Mapping]]] = ...) -> None: ...

class RefusedUpdate(_message.Message):
    __slots__ = ("item_id", "reason")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    item_id: int
    reason: str
    def __init__(self, item_id: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class PoolReport(_message.Message):
    __slots__ = ("pages", "free_pages", "live_slots", "retired_slots", "dead_slots", "longest_list", "mean_list", "overflowed", "assignment_error")
    PAGES_FIELD_NUMBER: _ClassVar[int]
    FREE_PAGES_FIELD_NUMBER: _ClassVar[int]
    LIVE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    RETIRED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    DEAD_SLOTS_FIELD_NUMBER: _ClassVar[int]
    LONGEST_LIST_FIELD_NUMBER: _ClassVar[int]
    MEAN_LIST_FIELD_NUMBER: _ClassVar[int]
    OVERFLOWED_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_ERROR_FIELD_NUMBER: _ClassVar[int]
    pages: int
    free_pages: int
    live_slots: int
    retired_slots: int
    dead_slots: int
    longest_list: int
    mean_list: float
    overflowed: int
    assignment_error: float
    def __init__(self, pages: _Optional[int] = ..., free_pages: _Optional[int] = ..., live_slots: _Optional[int] = ..., retired_slots: _Optional[int] = ..., dead_slots: _Optional[int] = ..., longest_list: _Optional[int] = ..., mean_list: _Optional[float] = ..., overflowed: _Optional[int] = ..., assignment_error: _Optional[float] = ...) -> None: ...

class UpdateReport(_message.Message):
    __slots__ = ("batches", "records", "urgent", "rejected", "longest_commit_us")
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    URGENT_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    LONGEST_COMMIT_US_FIELD_NUMBER: _ClassVar[int]
    batches: int
    records: int
    urgent: int
    rejected: int
    longest_commit_us: int
    def __init__(self, batches: _Optional[int] = ..., records: _Optional[int] = ..., urgent: _Optional[int] = ..., rejected: _Optional[int] = ..., longest_commit_us: _Optional[int] = ...) -> None: ...

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

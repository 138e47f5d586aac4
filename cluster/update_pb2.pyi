from silvershard.cluster import retrieval_pb2 as _retrieval_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LoggedMutation(_message.Message):
    __slots__ = ("mutation", "expires_unix_ms")
    MUTATION_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    mutation: _retrieval_pb2.Mutation
    expires_unix_ms: int
    def __init__(self, mutation: _Optional[_Union[_retrieval_pb2.Mutation, _Mapping]] = ..., expires_unix_ms: _Optional[int] = ...) -> None: ...

class SequencerReportRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SequencerReport(_message.Message):
    __slots__ = ("log_id", "model", "generation", "partitions", "blocked", "counts", "queued")
    LOG_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PARTITIONS_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    log_id: int
    model: str
    generation: int
    partitions: _containers.RepeatedCompositeFieldContainer[SequencedPartition]
    blocked: _containers.RepeatedCompositeFieldContainer[BlockedShard]
    counts: _containers.RepeatedCompositeFieldContainer[UpdateCount]
    queued: int
    def __init__(self, log_id: _Optional[int] = ..., model: _Optional[str] = ..., generation: _Optional[int] = ..., partitions: _Optional[_Iterable[_Union[SequencedPartition, _Mapping]]] = ..., blocked: _Optional[_Iterable[_Union[BlockedShard, _Mapping]]] = ..., counts: _Optional[_Iterable[_Union[UpdateCount, _Mapping]]] = ..., queued: _Optional[int] = ...) -> None: ...

class SequencedPartition(_message.Message):
    __slots__ = ("partition", "epoch", "start", "end")
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    partition: int
    epoch: int
    start: int
    end: int
    def __init__(self, partition: _Optional[int] = ..., epoch: _Optional[int] = ..., start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class BlockedShard(_message.Message):
    __slots__ = ("shard", "use", "limit")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    USE_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    shard: int
    use: float
    limit: float
    def __init__(self, shard: _Optional[int] = ..., use: _Optional[float] = ..., limit: _Optional[float] = ...) -> None: ...

class UpdateCount(_message.Message):
    __slots__ = ("op", "code", "count")
    OP_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    op: str
    code: int
    count: int
    def __init__(self, op: _Optional[str] = ..., code: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

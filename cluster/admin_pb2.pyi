import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OperationKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATION_KIND_UNSPECIFIED: _ClassVar[OperationKind]
    OPERATION_KIND_PLAN: _ClassVar[OperationKind]
    OPERATION_KIND_STAGE: _ClassVar[OperationKind]
    OPERATION_KIND_VERIFY: _ClassVar[OperationKind]
    OPERATION_KIND_WARM: _ClassVar[OperationKind]
    OPERATION_KIND_ACTIVATE: _ClassVar[OperationKind]
    OPERATION_KIND_ROLLBACK: _ClassVar[OperationKind]
    OPERATION_KIND_SET_ALIAS: _ClassVar[OperationKind]
    OPERATION_KIND_SCALE: _ClassVar[OperationKind]

class OperationState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATION_STATE_UNSPECIFIED: _ClassVar[OperationState]
    OPERATION_STATE_WAITING: _ClassVar[OperationState]
    OPERATION_STATE_RUNNING: _ClassVar[OperationState]
    OPERATION_STATE_DONE: _ClassVar[OperationState]
    OPERATION_STATE_FAILED: _ClassVar[OperationState]
    OPERATION_STATE_CANCELLED: _ClassVar[OperationState]
    OPERATION_STATE_ABANDONED: _ClassVar[OperationState]

class Checks(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHECKS_ALL: _ClassVar[Checks]
    CHECKS_FILES: _ClassVar[Checks]

class FaultKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAULT_KIND_UNSPECIFIED: _ClassVar[FaultKind]
    FAULT_KIND_KILL: _ClassVar[FaultKind]
    FAULT_KIND_HANG: _ClassVar[FaultKind]
    FAULT_KIND_SLOW: _ClassVar[FaultKind]
    FAULT_KIND_DROP: _ClassVar[FaultKind]
    FAULT_KIND_PARTITION: _ClassVar[FaultKind]
    FAULT_KIND_CORRUPT: _ClassVar[FaultKind]
    FAULT_KIND_STALL: _ClassVar[FaultKind]
    FAULT_KIND_FILL: _ClassVar[FaultKind]

class FaultState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAULT_STATE_UNSPECIFIED: _ClassVar[FaultState]
    FAULT_STATE_ACTIVE: _ClassVar[FaultState]
    FAULT_STATE_OVER: _ClassVar[FaultState]
    FAULT_STATE_CLEARED: _ClassVar[FaultState]
OPERATION_KIND_UNSPECIFIED: OperationKind
OPERATION_KIND_PLAN: OperationKind
OPERATION_KIND_STAGE: OperationKind
OPERATION_KIND_VERIFY: OperationKind
OPERATION_KIND_WARM: OperationKind
OPERATION_KIND_ACTIVATE: OperationKind
OPERATION_KIND_ROLLBACK: OperationKind
OPERATION_KIND_SET_ALIAS: OperationKind
OPERATION_KIND_SCALE: OperationKind
OPERATION_STATE_UNSPECIFIED: OperationState
OPERATION_STATE_WAITING: OperationState
OPERATION_STATE_RUNNING: OperationState
OPERATION_STATE_DONE: OperationState
OPERATION_STATE_FAILED: OperationState
OPERATION_STATE_CANCELLED: OperationState
OPERATION_STATE_ABANDONED: OperationState
CHECKS_ALL: Checks
CHECKS_FILES: Checks
FAULT_KIND_UNSPECIFIED: FaultKind
FAULT_KIND_KILL: FaultKind
FAULT_KIND_HANG: FaultKind
FAULT_KIND_SLOW: FaultKind
FAULT_KIND_DROP: FaultKind
FAULT_KIND_PARTITION: FaultKind
FAULT_KIND_CORRUPT: FaultKind
FAULT_KIND_STALL: FaultKind
FAULT_KIND_FILL: FaultKind
FAULT_STATE_UNSPECIFIED: FaultState
FAULT_STATE_ACTIVE: FaultState
FAULT_STATE_OVER: FaultState
FAULT_STATE_CLEARED: FaultState

class Operation(_message.Message):
    __slots__ = ("operation_id", "kind", "dry_run", "state", "progress", "error", "began", "ended", "plan", "staged", "verified", "moved", "scaled")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    BEGAN_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    SCALED_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    kind: OperationKind
    dry_run: bool
    state: OperationState
    progress: _containers.RepeatedScalarFieldContainer[str]
    error: OperationError
    began: _timestamp_pb2.Timestamp
    ended: _timestamp_pb2.Timestamp
    plan: MemoryPlan
    staged: StagedSnapshot
    verified: VerifiedSnapshot
    moved: MovedAlias
    scaled: ScaledCluster
    def __init__(self, operation_id: _Optional[str] = ..., kind: _Optional[_Union[OperationKind, str]] = ..., dry_run: _Optional[bool] = ..., state: _Optional[_Union[OperationState, str]] = ..., progress: _Optional[_Iterable[str]] = ..., error: _Optional[_Union[OperationError, _Mapping]] = ..., began: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., ended: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., plan: _Optional[_Union[MemoryPlan, _Mapping]] = ..., staged: _Optional[_Union[StagedSnapshot, _Mapping]] = ..., verified: _Optional[_Union[VerifiedSnapshot, _Mapping]] = ..., moved: _Optional[_Union[MovedAlias, _Mapping]] = ..., scaled: _Optional[_Union[ScaledCluster, _Mapping]] = ...) -> None: ...

class OperationError(_message.Message):
    __slots__ = ("code", "reason", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    message: str
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class MemoryPlan(_message.Message):
    __slots__ = ("generation", "mode", "reason", "held_bytes", "old_bytes", "new_bytes", "check_bytes", "free_bytes", "checks_fit")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    OLD_BYTES_FIELD_NUMBER: _ClassVar[int]
    NEW_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECK_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIT_FIELD_NUMBER: _ClassVar[int]
    generation: int
    mode: str
    reason: str
    held_bytes: int
    old_bytes: int
    new_bytes: int
    check_bytes: int
    free_bytes: int
    checks_fit: bool
    def __init__(self, generation: _Optional[int] = ..., mode: _Optional[str] = ..., reason: _Optional[str] = ..., held_bytes: _Optional[int] = ..., old_bytes: _Optional[int] = ..., new_bytes: _Optional[int] = ..., check_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., checks_fit: _Optional[bool] = ...) -> None: ...

class StagedSnapshot(_message.Message):
    __slots__ = ("generation", "url", "done", "present", "files", "copied", "copied_bytes")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    COPIED_FIELD_NUMBER: _ClassVar[int]
    COPIED_BYTES_FIELD_NUMBER: _ClassVar[int]
    generation: int
    url: str
    done: bool
    present: bool
    files: int
    copied: int
    copied_bytes: int
    def __init__(self, generation: _Optional[int] = ..., url: _Optional[str] = ..., done: _Optional[bool] = ..., present: _Optional[bool] = ..., files: _Optional[int] = ..., copied: _Optional[int] = ..., copied_bytes: _Optional[int] = ...) -> None: ...

class VerifiedSnapshot(_message.Message):
    __slots__ = ("generation", "live", "passed", "checks")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    live: int
    passed: bool
    checks: _containers.RepeatedCompositeFieldContainer[SnapshotCheck]
    def __init__(self, generation: _Optional[int] = ..., live: _Optional[int] = ..., passed: _Optional[bool] = ..., checks: _Optional[_Iterable[_Union[SnapshotCheck, _Mapping]]] = ...) -> None: ...

class SnapshotCheck(_message.Message):
    __slots__ = ("name", "passed", "text")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    name: str
    passed: bool
    text: str
    def __init__(self, name: _Optional[str] = ..., passed: _Optional[bool] = ..., text: _Optional[str] = ...) -> None: ...

class MovedAlias(_message.Message):
    __slots__ = ("alias", "generation", "before", "done", "seconds", "mode")
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    alias: str
    generation: int
    before: int
    done: bool
    seconds: float
    mode: str
    def __init__(self, alias: _Optional[str] = ..., generation: _Optional[int] = ..., before: _Optional[int] = ..., done: _Optional[bool] = ..., seconds: _Optional[float] = ..., mode: _Optional[str] = ...) -> None: ...

class ScaledCluster(_message.Message):
    __slots__ = ("before", "after", "done", "seconds", "starts", "ends", "new_bytes", "free_bytes")
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    NEW_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    before: ClusterSize
    after: ClusterSize
    done: bool
    seconds: float
    starts: int
    ends: int
    new_bytes: int
    free_bytes: int
    def __init__(self, before: _Optional[_Union[ClusterSize, _Mapping]] = ..., after: _Optional[_Union[ClusterSize, _Mapping]] = ..., done: _Optional[bool] = ..., seconds: _Optional[float] = ..., starts: _Optional[int] = ..., ends: _Optional[int] = ..., new_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ...) -> None: ...

class ClusterSize(_message.Message):
    __slots__ = ("shards", "replicas", "standby")
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    shards: int
    replicas: int
    standby: int
    def __init__(self, shards: _Optional[int] = ..., replicas: _Optional[int] = ..., standby: _Optional[int] = ...) -> None: ...

class PlanRequest(_message.Message):
    __slots__ = ("operation_id", "dry_run", "generation")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    dry_run: bool
    generation: int
    def __init__(self, operation_id: _Optional[str] = ..., dry_run: _Optional[bool] = ..., generation: _Optional[int] = ...) -> None: ...

class StageSnapshotRequest(_message.Message):
    __slots__ = ("operation_id", "dry_run", "generation", "url")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    dry_run: bool
    generation: int
    url: str
    def __init__(self, operation_id: _Optional[str] = ..., dry_run: _Optional[bool] = ..., generation: _Optional[int] = ..., url: _Optional[str] = ...) -> None: ...

class VerifySnapshotRequest(_message.Message):
    __slots__ = ("operation_id", "dry_run", "generation", "checks", "allow_schema")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    ALLOW_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    dry_run: bool
    generation: int
    checks: Checks
    allow_schema: bool
    def __init__(self, operation_id: _Optional[str] = ..., dry_run: _Optional[bool] = ..., generation: _Optional[int] = ..., checks: _Optional[_Union[Checks, str]] = ..., allow_schema: _Optional[bool] = ...) -> None: ...

class WarmSnapshotRequest(_message.Message):
    __slots__ = ("operation_id", "dry_run", "generation", "checks", "allow_schema")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    ALLOW_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    dry_run: bool
    generation: int
    checks: Checks
    allow_schema: bool
    def __init__(self, operation_id: _Optional[str] = ..., dry_run: _Optional[bool] = ..., generation: _Optional[int] = ..., checks: _Optional[_Union[Checks, str]] = ..., allow_schema: _Optional[bool] = ...) -> None: ...

class ActivateRequest(_message.Message):
    __slots__ = ("operation_id", "dry_run", "generation", "checks", "allow_schema")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    ALLOW_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    dry_run: bool
    generation: int
    checks: Checks
    allow_schema: bool
    def __init__(self, operation_id: _Optional[str] = ..., dry_run: _Optional[bool] = ..., generation: _Optional[int] = ..., checks: _Optional[_Union[Checks, str]] = ..., allow_schema: _Optional[bool] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("operation_id", "dry_run")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    dry_run: bool
    def __init__(self, operation_id: _Optional[str] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class SetAliasRequest(_message.Message):
    __slots__ = ("operation_id", "dry_run", "generation", "checks", "allow_schema", "alias")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    ALLOW_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    dry_run: bool
    generation: int
    checks: Checks
    allow_schema: bool
    alias: str
    def __init__(self, operation_id: _Optional[str] = ..., dry_run: _Optional[bool] = ..., generation: _Optional[int] = ..., checks: _Optional[_Union[Checks, str]] = ..., allow_schema: _Optional[bool] = ..., alias: _Optional[str] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("operation_id", "dry_run", "shards", "replicas", "standby")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    dry_run: bool
    shards: int
    replicas: int
    standby: int
    def __init__(self, operation_id: _Optional[str] = ..., dry_run: _Optional[bool] = ..., shards: _Optional[int] = ..., replicas: _Optional[int] = ..., standby: _Optional[int] = ...) -> None: ...

class GetOperationRequest(_message.Message):
    __slots__ = ("operation_id",)
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    def __init__(self, operation_id: _Optional[str] = ...) -> None: ...

class WaitOperationRequest(_message.Message):
    __slots__ = ("operation_id", "timeout")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    timeout: _duration_pb2.Duration
    def __init__(self, operation_id: _Optional[str] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class CancelOperationRequest(_message.Message):
    __slots__ = ("operation_id",)
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    def __init__(self, operation_id: _Optional[str] = ...) -> None: ...

class ListOperationsRequest(_message.Message):
    __slots__ = ("going_on",)
    GOING_ON_FIELD_NUMBER: _ClassVar[int]
    going_on: bool
    def __init__(self, going_on: _Optional[bool] = ...) -> None: ...

class ListOperationsResponse(_message.Message):
    __slots__ = ("operations",)
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    operations: _containers.RepeatedCompositeFieldContainer[Operation]
    def __init__(self, operations: _Optional[_Iterable[_Union[Operation, _Mapping]]] = ...) -> None: ...

class ListShardsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListShardsResponse(_message.Message):
    __slots__ = ("map_version", "generation", "documents", "shards", "generations")
    MAP_VERSION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    map_version: int
    generation: int
    documents: int
    shards: _containers.RepeatedCompositeFieldContainer[ShardState]
    generations: _containers.RepeatedCompositeFieldContainer[HeldGeneration]
    def __init__(self, map_version: _Optional[int] = ..., generation: _Optional[int] = ..., documents: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[ShardState, _Mapping]]] = ..., generations: _Optional[_Iterable[_Union[HeldGeneration, _Mapping]]] = ...) -> None: ...

class ShardState(_message.Message):
    __slots__ = ("shard", "replica", "state", "pid", "epoch", "address", "documents", "restarts", "reason")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    shard: int
    replica: int
    state: str
    pid: int
    epoch: int
    address: str
    documents: int
    restarts: int
    reason: str
    def __init__(self, shard: _Optional[int] = ..., replica: _Optional[int] = ..., state: _Optional[str] = ..., pid: _Optional[int] = ..., epoch: _Optional[int] = ..., address: _Optional[str] = ..., documents: _Optional[int] = ..., restarts: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class HeldGeneration(_message.Message):
    __slots__ = ("generation", "role", "prepared", "processes", "reason")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    generation: int
    role: str
    prepared: int
    processes: int
    reason: str
    def __init__(self, generation: _Optional[int] = ..., role: _Optional[str] = ..., prepared: _Optional[int] = ..., processes: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class AuditRequest(_message.Message):
    __slots__ = ("limit",)
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    def __init__(self, limit: _Optional[int] = ...) -> None: ...

class AuditResponse(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[AuditEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[AuditEntry, _Mapping]]] = ...) -> None: ...

class AuditEntry(_message.Message):
    __slots__ = ("time", "event", "who", "peer", "method", "code", "reason", "suppressed", "request")
    TIME_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SUPPRESSED_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    time: _timestamp_pb2.Timestamp
    event: str
    who: str
    peer: str
    method: str
    code: str
    reason: str
    suppressed: int
    request: str
    def __init__(self, time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., event: _Optional[str] = ..., who: _Optional[str] = ..., peer: _Optional[str] = ..., method: _Optional[str] = ..., code: _Optional[str] = ..., reason: _Optional[str] = ..., suppressed: _Optional[int] = ..., request: _Optional[str] = ...) -> None: ...

class FreshnessRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FreshnessResponse(_message.Message):
    __slots__ = ("generation", "degraded", "lag", "sequencer", "shards")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    LAG_FIELD_NUMBER: _ClassVar[int]
    SEQUENCER_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    degraded: bool
    lag: int
    sequencer: SequencerFreshness
    shards: _containers.RepeatedCompositeFieldContainer[ShardFreshness]
    def __init__(self, generation: _Optional[int] = ..., degraded: _Optional[bool] = ..., lag: _Optional[int] = ..., sequencer: _Optional[_Union[SequencerFreshness, _Mapping]] = ..., shards: _Optional[_Iterable[_Union[ShardFreshness, _Mapping]]] = ...) -> None: ...

class SequencerFreshness(_message.Message):
    __slots__ = ("log_id", "generation", "queued", "partitions", "blocked", "error")
    LOG_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    PARTITIONS_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    log_id: int
    generation: int
    queued: int
    partitions: _containers.RepeatedCompositeFieldContainer[LogPartition]
    blocked: _containers.RepeatedCompositeFieldContainer[FullShard]
    error: str
    def __init__(self, log_id: _Optional[int] = ..., generation: _Optional[int] = ..., queued: _Optional[int] = ..., partitions: _Optional[_Iterable[_Union[LogPartition, _Mapping]]] = ..., blocked: _Optional[_Iterable[_Union[FullShard, _Mapping]]] = ..., error: _Optional[str] = ...) -> None: ...

class LogPartition(_message.Message):
    __slots__ = ("partition", "start", "end")
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    partition: int
    start: int
    end: int
    def __init__(self, partition: _Optional[int] = ..., start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class FullShard(_message.Message):
    __slots__ = ("shard", "use", "limit")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    USE_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    shard: int
    use: float
    limit: float
    def __init__(self, shard: _Optional[int] = ..., use: _Optional[float] = ..., limit: _Optional[float] = ...) -> None: ...

class ShardFreshness(_message.Message):
    __slots__ = ("shard", "replica", "generation", "state", "documents", "cut", "lag", "staleness_s", "pages", "free_pages", "rejected", "error", "trouble")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    LAG_FIELD_NUMBER: _ClassVar[int]
    STALENESS_S_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    FREE_PAGES_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    shard: int
    replica: int
    generation: int
    state: str
    documents: int
    cut: _containers.RepeatedScalarFieldContainer[int]
    lag: int
    staleness_s: float
    pages: int
    free_pages: int
    rejected: int
    error: str
    trouble: str
    def __init__(self, shard: _Optional[int] = ..., replica: _Optional[int] = ..., generation: _Optional[int] = ..., state: _Optional[str] = ..., documents: _Optional[int] = ..., cut: _Optional[_Iterable[int]] = ..., lag: _Optional[int] = ..., staleness_s: _Optional[float] = ..., pages: _Optional[int] = ..., free_pages: _Optional[int] = ..., rejected: _Optional[int] = ..., error: _Optional[str] = ..., trouble: _Optional[str] = ...) -> None: ...

class InjectFaultRequest(_message.Message):
    __slots__ = ("operation_id", "dry_run", "kind", "target", "duration", "delay_ms", "share", "copy_url", "allow_outage")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    DELAY_MS_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    COPY_URL_FIELD_NUMBER: _ClassVar[int]
    ALLOW_OUTAGE_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    dry_run: bool
    kind: FaultKind
    target: str
    duration: _duration_pb2.Duration
    delay_ms: int
    share: float
    copy_url: str
    allow_outage: bool
    def __init__(self, operation_id: _Optional[str] = ..., dry_run: _Optional[bool] = ..., kind: _Optional[_Union[FaultKind, str]] = ..., target: _Optional[str] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., delay_ms: _Optional[int] = ..., share: _Optional[float] = ..., copy_url: _Optional[str] = ..., allow_outage: _Optional[bool] = ...) -> None: ...

class Fault(_message.Message):
    __slots__ = ("operation_id", "dry_run", "kind", "target", "duration", "delay_ms", "share", "copy_url", "state", "began", "ended", "pids")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    DELAY_MS_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    COPY_URL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BEGAN_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    PIDS_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    dry_run: bool
    kind: FaultKind
    target: str
    duration: _duration_pb2.Duration
    delay_ms: int
    share: float
    copy_url: str
    state: FaultState
    began: _timestamp_pb2.Timestamp
    ended: _timestamp_pb2.Timestamp
    pids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, operation_id: _Optional[str] = ..., dry_run: _Optional[bool] = ..., kind: _Optional[_Union[FaultKind, str]] = ..., target: _Optional[str] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., delay_ms: _Optional[int] = ..., share: _Optional[float] = ..., copy_url: _Optional[str] = ..., state: _Optional[_Union[FaultState, str]] = ..., began: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., ended: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., pids: _Optional[_Iterable[int]] = ...) -> None: ...

class ListFaultsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListFaultsResponse(_message.Message):
    __slots__ = ("faults",)
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    faults: _containers.RepeatedCompositeFieldContainer[Fault]
    def __init__(self, faults: _Optional[_Iterable[_Union[Fault, _Mapping]]] = ...) -> None: ...

class ClearFaultsRequest(_message.Message):
    __slots__ = ("operation_ids",)
    OPERATION_IDS_FIELD_NUMBER: _ClassVar[int]
    operation_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, operation_ids: _Optional[_Iterable[str]] = ...) -> None: ...

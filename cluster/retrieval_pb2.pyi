import datetime

from google.protobuf import any_pb2 as _any_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FilterMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FILTER_MODE_UNSPECIFIED: _ClassVar[FilterMode]
    FILTER_MODE_BLOOM: _ClassVar[FilterMode]
    FILTER_MODE_BLOOM_VERIFIED: _ClassVar[FilterMode]
    FILTER_MODE_EXACT: _ClassVar[FilterMode]

class DegradeReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DEGRADE_REASON_UNSPECIFIED: _ClassVar[DegradeReason]
    DEGRADE_REASON_SHARD_UNAVAILABLE: _ClassVar[DegradeReason]
    DEGRADE_REASON_SHARD_TIMEOUT: _ClassVar[DegradeReason]
    DEGRADE_REASON_SHARD_OVERLOADED: _ClassVar[DegradeReason]
    DEGRADE_REASON_VERSION_MISMATCH_DROPPED: _ClassVar[DegradeReason]
    DEGRADE_REASON_STALE_REPLICA_DROPPED: _ClassVar[DegradeReason]
    DEGRADE_REASON_NPROBE_REDUCED: _ClassVar[DegradeReason]
    DEGRADE_REASON_RERANK_DEPTH_REDUCED: _ClassVar[DegradeReason]
    DEGRADE_REASON_TASKS_SKIPPED: _ClassVar[DegradeReason]
    DEGRADE_REASON_EMBEDDING_FALLBACK: _ClassVar[DegradeReason]
    DEGRADE_REASON_UPDATES_LAGGING: _ClassVar[DegradeReason]

class Durability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DURABILITY_LOGGED: _ClassVar[Durability]
    DURABILITY_APPLIED_ONE: _ClassVar[Durability]
    DURABILITY_APPLIED_ALL_READY: _ClassVar[Durability]
FILTER_MODE_UNSPECIFIED: FilterMode
FILTER_MODE_BLOOM: FilterMode
FILTER_MODE_BLOOM_VERIFIED: FilterMode
FILTER_MODE_EXACT: FilterMode
DEGRADE_REASON_UNSPECIFIED: DegradeReason
DEGRADE_REASON_SHARD_UNAVAILABLE: DegradeReason
DEGRADE_REASON_SHARD_TIMEOUT: DegradeReason
DEGRADE_REASON_SHARD_OVERLOADED: DegradeReason
DEGRADE_REASON_VERSION_MISMATCH_DROPPED: DegradeReason
DEGRADE_REASON_STALE_REPLICA_DROPPED: DegradeReason
DEGRADE_REASON_NPROBE_REDUCED: DegradeReason
DEGRADE_REASON_RERANK_DEPTH_REDUCED: DegradeReason
DEGRADE_REASON_TASKS_SKIPPED: DegradeReason
DEGRADE_REASON_EMBEDDING_FALLBACK: DegradeReason
DEGRADE_REASON_UPDATES_LAGGING: DegradeReason
DURABILITY_LOGGED: Durability
DURABILITY_APPLIED_ONE: Durability
DURABILITY_APPLIED_ALL_READY: Durability

class RetrieveRequest(_message.Message):
    __slots__ = ("request_id", "model", "alias", "generation", "named", "k", "filter", "params", "exclude_ids", "search", "task_weights", "return_fields", "return_task_scores", "min_coverage", "degrade", "consistency", "priority", "tenant", "value")
    class ParamsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Values
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Values, _Mapping]] = ...) -> None: ...
    class TaskWeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NAMED_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_IDS_FIELD_NUMBER: _ClassVar[int]
    SEARCH_FIELD_NUMBER: _ClassVar[int]
    TASK_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    RETURN_FIELDS_FIELD_NUMBER: _ClassVar[int]
    RETURN_TASK_SCORES_FIELD_NUMBER: _ClassVar[int]
    MIN_COVERAGE_FIELD_NUMBER: _ClassVar[int]
    DEGRADE_FIELD_NUMBER: _ClassVar[int]
    CONSISTENCY_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    alias: str
    generation: int
    named: FeatureMap
    k: int
    filter: str
    params: _containers.MessageMap[str, Values]
    exclude_ids: _containers.RepeatedScalarFieldContainer[int]
    search: SearchParams
    task_weights: _containers.ScalarMap[str, float]
    return_fields: _containers.RepeatedScalarFieldContainer[str]
    return_task_scores: bool
    min_coverage: float
    degrade: DegradePolicy
    consistency: Consistency
    priority: int
    tenant: str
    value: str
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., alias: _Optional[str] = ..., generation: _Optional[int] = ..., named: _Optional[_Union[FeatureMap, _Mapping]] = ..., k: _Optional[int] = ..., filter: _Optional[str] = ..., params: _Optional[_Mapping[str, Values]] = ..., exclude_ids: _Optional[_Iterable[int]] = ..., search: _Optional[_Union[SearchParams, _Mapping]] = ..., task_weights: _Optional[_Mapping[str, float]] = ..., return_fields: _Optional[_Iterable[str]] = ..., return_task_scores: _Optional[bool] = ..., min_coverage: _Optional[float] = ..., degrade: _Optional[_Union[DegradePolicy, _Mapping]] = ..., consistency: _Optional[_Union[Consistency, _Mapping]] = ..., priority: _Optional[int] = ..., tenant: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class DegradePolicy(_message.Message):
    __slots__ = ("mode", "min_nprobe", "min_ann_k", "required_tasks")
    class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        MODE_UNSPECIFIED: _ClassVar[DegradePolicy.Mode]
        MODE_ALLOW: _ClassVar[DegradePolicy.Mode]
        MODE_NEVER: _ClassVar[DegradePolicy.Mode]
    MODE_UNSPECIFIED: DegradePolicy.Mode
    MODE_ALLOW: DegradePolicy.Mode
    MODE_NEVER: DegradePolicy.Mode
    MODE_FIELD_NUMBER: _ClassVar[int]
    MIN_NPROBE_FIELD_NUMBER: _ClassVar[int]
    MIN_ANN_K_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_TASKS_FIELD_NUMBER: _ClassVar[int]
    mode: DegradePolicy.Mode
    min_nprobe: int
    min_ann_k: int
    required_tasks: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, mode: _Optional[_Union[DegradePolicy.Mode, str]] = ..., min_nprobe: _Optional[int] = ..., min_ann_k: _Optional[int] = ..., required_tasks: _Optional[_Iterable[str]] = ...) -> None: ...

class Consistency(_message.Message):
    __slots__ = ("after", "max_staleness")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    MAX_STALENESS_FIELD_NUMBER: _ClassVar[int]
    after: _containers.RepeatedCompositeFieldContainer[UpdateToken]
    max_staleness: _duration_pb2.Duration
    def __init__(self, after: _Optional[_Iterable[_Union[UpdateToken, _Mapping]]] = ..., max_staleness: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class UpdateToken(_message.Message):
    __slots__ = ("log_epoch", "partition", "position")
    LOG_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    log_epoch: int
    partition: int
    position: int
    def __init__(self, log_epoch: _Optional[int] = ..., partition: _Optional[int] = ..., position: _Optional[int] = ...) -> None: ...

class SearchParams(_message.Message):
    __slots__ = ("nprobe", "ann_k", "plan", "exact", "filter_mode", "semantic_k")
    NPROBE_FIELD_NUMBER: _ClassVar[int]
    ANN_K_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    FILTER_MODE_FIELD_NUMBER: _ClassVar[int]
    SEMANTIC_K_FIELD_NUMBER: _ClassVar[int]
    nprobe: int
    ann_k: int
    plan: str
    exact: bool
    filter_mode: FilterMode
    semantic_k: int
    def __init__(self, nprobe: _Optional[int] = ..., ann_k: _Optional[int] = ..., plan: _Optional[str] = ..., exact: _Optional[bool] = ..., filter_mode: _Optional[_Union[FilterMode, str]] = ..., semantic_k: _Optional[int] = ...) -> None: ...

class RetrieveResponse(_message.Message):
    __slots__ = ("request_id", "item_ids", "scores", "task_scores", "fields", "exhausted", "version", "coverage", "counts", "timings_us", "warnings", "plan")
    class TaskScoresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: FloatColumn
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[FloatColumn, _Mapping]] = ...) -> None: ...
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Column
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Column, _Mapping]] = ...) -> None: ...
    class TimingsUsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    TASK_SCORES_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    EXHAUSTED_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_US_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    item_ids: _containers.RepeatedScalarFieldContainer[int]
    scores: _containers.RepeatedScalarFieldContainer[float]
    task_scores: _containers.MessageMap[str, FloatColumn]
    fields: _containers.MessageMap[str, Column]
    exhausted: bool
    version: VersionStamp
    coverage: Coverage
    counts: StageCounts
    timings_us: _containers.ScalarMap[str, int]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    plan: str
    def __init__(self, request_id: _Optional[str] = ..., item_ids: _Optional[_Iterable[int]] = ..., scores: _Optional[_Iterable[float]] = ..., task_scores: _Optional[_Mapping[str, FloatColumn]] = ..., fields: _Optional[_Mapping[str, Column]] = ..., exhausted: _Optional[bool] = ..., version: _Optional[_Union[VersionStamp, _Mapping]] = ..., coverage: _Optional[_Union[Coverage, _Mapping]] = ..., counts: _Optional[_Union[StageCounts, _Mapping]] = ..., timings_us: _Optional[_Mapping[str, int]] = ..., warnings: _Optional[_Iterable[str]] = ..., plan: _Optional[str] = ...) -> None: ...

class VersionStamp(_message.Message):
    __slots__ = ("model", "generation", "content_hash", "shard_map_version", "cut", "staleness")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CONTENT_HASH_FIELD_NUMBER: _ClassVar[int]
    SHARD_MAP_VERSION_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    model: str
    generation: int
    content_hash: str
    shard_map_version: int
    cut: _containers.RepeatedCompositeFieldContainer[UpdateToken]
    staleness: _duration_pb2.Duration
    def __init__(self, model: _Optional[str] = ..., generation: _Optional[int] = ..., content_hash: _Optional[str] = ..., shard_map_version: _Optional[int] = ..., cut: _Optional[_Iterable[_Union[UpdateToken, _Mapping]]] = ..., staleness: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Coverage(_message.Message):
    __slots__ = ("documents", "expected_recall", "degraded", "shards_total", "shards_full", "shards_degraded", "shards_failed", "reasons", "shards")
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_RECALL_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    SHARDS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FULL_FIELD_NUMBER: _ClassVar[int]
    SHARDS_DEGRADED_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FAILED_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    documents: float
    expected_recall: float
    degraded: bool
    shards_total: int
    shards_full: int
    shards_degraded: int
    shards_failed: int
    reasons: _containers.RepeatedScalarFieldContainer[DegradeReason]
    shards: _containers.RepeatedCompositeFieldContainer[ShardOutcome]
    def __init__(self, documents: _Optional[float] = ..., expected_recall: _Optional[float] = ..., degraded: _Optional[bool] = ..., shards_total: _Optional[int] = ..., shards_full: _Optional[int] = ..., shards_degraded: _Optional[int] = ..., shards_failed: _Optional[int] = ..., reasons: _Optional[_Iterable[_Union[DegradeReason, str]]] = ..., shards: _Optional[_Iterable[_Union[ShardOutcome, _Mapping]]] = ...) -> None: ...

class ShardOutcome(_message.Message):
    __slots__ = ("shard", "replica", "grpc_code", "reasons", "documents", "latency_us", "attempts", "hedged")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    GRPC_CODE_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    HEDGED_FIELD_NUMBER: _ClassVar[int]
    shard: int
    replica: str
    grpc_code: int
    reasons: _containers.RepeatedScalarFieldContainer[DegradeReason]
    documents: int
    latency_us: int
    attempts: int
    hedged: bool
    def __init__(self, shard: _Optional[int] = ..., replica: _Optional[str] = ..., grpc_code: _Optional[int] = ..., reasons: _Optional[_Iterable[_Union[DegradeReason, str]]] = ..., documents: _Optional[int] = ..., latency_us: _Optional[int] = ..., attempts: _Optional[int] = ..., hedged: _Optional[bool] = ...) -> None: ...

class StageCounts(_message.Message):
    __slots__ = ("addressed", "probed", "eligible", "ann_kept", "reranked", "semantic_kept")
    ADDRESSED_FIELD_NUMBER: _ClassVar[int]
    PROBED_FIELD_NUMBER: _ClassVar[int]
    ELIGIBLE_FIELD_NUMBER: _ClassVar[int]
    ANN_KEPT_FIELD_NUMBER: _ClassVar[int]
    RERANKED_FIELD_NUMBER: _ClassVar[int]
    SEMANTIC_KEPT_FIELD_NUMBER: _ClassVar[int]
    addressed: int
    probed: int
    eligible: int
    ann_kept: int
    reranked: int
    semantic_kept: int
    def __init__(self, addressed: _Optional[int] = ..., probed: _Optional[int] = ..., eligible: _Optional[int] = ..., ann_kept: _Optional[int] = ..., reranked: _Optional[int] = ..., semantic_kept: _Optional[int] = ...) -> None: ...

class RetrieveBatchRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[RetrieveRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[RetrieveRequest, _Mapping]]] = ...) -> None: ...

class RetrieveBatchResponse(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[BatchItem]
    def __init__(self, items: _Optional[_Iterable[_Union[BatchItem, _Mapping]]] = ...) -> None: ...

class BatchItem(_message.Message):
    __slots__ = ("code", "reason", "response", "details")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    response: RetrieveResponse
    details: _containers.RepeatedCompositeFieldContainer[_any_pb2.Any]
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ..., response: _Optional[_Union[RetrieveResponse, _Mapping]] = ..., details: _Optional[_Iterable[_Union[_any_pb2.Any, _Mapping]]] = ...) -> None: ...

class ApplyRequest(_message.Message):
    __slots__ = ("model", "mutations", "durability")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MUTATIONS_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    model: str
    mutations: _containers.RepeatedCompositeFieldContainer[Mutation]
    durability: Durability
    def __init__(self, model: _Optional[str] = ..., mutations: _Optional[_Iterable[_Union[Mutation, _Mapping]]] = ..., durability: _Optional[_Union[Durability, str]] = ...) -> None: ...

class Mutation(_message.Message):
    __slots__ = ("upsert", "patch", "delete", "rows", "version", "if_version")
    UPSERT_FIELD_NUMBER: _ClassVar[int]
    PATCH_FIELD_NUMBER: _ClassVar[int]
    DELETE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    IF_VERSION_FIELD_NUMBER: _ClassVar[int]
    upsert: ItemUpsert
    patch: ItemPatch
    delete: ItemDelete
    rows: RowUpdate
    version: int
    if_version: int
    def __init__(self, upsert: _Optional[_Union[ItemUpsert, _Mapping]] = ..., patch: _Optional[_Union[ItemPatch, _Mapping]] = ..., delete: _Optional[_Union[ItemDelete, _Mapping]] = ..., rows: _Optional[_Union[RowUpdate, _Mapping]] = ..., version: _Optional[int] = ..., if_version: _Optional[int] = ...) -> None: ...

class ItemUpsert(_message.Message):
    __slots__ = ("item_id", "embedding", "attributes", "features", "ttl", "signals", "fields")
    class SignalsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    SIGNALS_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    item_id: int
    embedding: Tensor
    attributes: FeatureMap
    features: FeatureMap
    ttl: _duration_pb2.Duration
    signals: _containers.ScalarMap[str, float]
    fields: FeatureMap
    def __init__(self, item_id: _Optional[int] = ..., embedding: _Optional[_Union[Tensor, _Mapping]] = ..., attributes: _Optional[_Union[FeatureMap, _Mapping]] = ..., features: _Optional[_Union[FeatureMap, _Mapping]] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., signals: _Optional[_Mapping[str, float]] = ..., fields: _Optional[_Union[FeatureMap, _Mapping]] = ...) -> None: ...

class ItemPatch(_message.Message):
    __slots__ = ("item_id", "attributes", "features", "signals", "fields")
    class SignalsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    SIGNALS_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    item_id: int
    attributes: FeatureMap
    features: FeatureMap
    signals: _containers.ScalarMap[str, float]
    fields: FeatureMap
    def __init__(self, item_id: _Optional[int] = ..., attributes: _Optional[_Union[FeatureMap, _Mapping]] = ..., features: _Optional[_Union[FeatureMap, _Mapping]] = ..., signals: _Optional[_Mapping[str, float]] = ..., fields: _Optional[_Union[FeatureMap, _Mapping]] = ...) -> None: ...

class ItemDelete(_message.Message):
    __slots__ = ("item_id", "urgent")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    URGENT_FIELD_NUMBER: _ClassVar[int]
    item_id: int
    urgent: bool
    def __init__(self, item_id: _Optional[int] = ..., urgent: _Optional[bool] = ...) -> None: ...

class RowUpdate(_message.Message):
    __slots__ = ("table", "rows", "values")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    table: str
    rows: _containers.RepeatedScalarFieldContainer[int]
    values: Tensor
    def __init__(self, table: _Optional[str] = ..., rows: _Optional[_Iterable[int]] = ..., values: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class ApplyResponse(_message.Message):
    __slots__ = ("tokens", "rejected")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[UpdateToken]
    rejected: _containers.RepeatedCompositeFieldContainer[Rejection]
    def __init__(self, tokens: _Optional[_Iterable[_Union[UpdateToken, _Mapping]]] = ..., rejected: _Optional[_Iterable[_Union[Rejection, _Mapping]]] = ...) -> None: ...

class Rejection(_message.Message):
    __slots__ = ("index", "code", "reason", "current_version")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CURRENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    index: int
    code: int
    reason: str
    current_version: int
    def __init__(self, index: _Optional[int] = ..., code: _Optional[int] = ..., reason: _Optional[str] = ..., current_version: _Optional[int] = ...) -> None: ...

class FeatureMap(_message.Message):
    __slots__ = ("features",)
    class FeaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Values
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Values, _Mapping]] = ...) -> None: ...
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    features: _containers.MessageMap[str, Values]
    def __init__(self, features: _Optional[_Mapping[str, Values]] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        D_TYPE_F32: _ClassVar[Tensor.DType]
        D_TYPE_F16: _ClassVar[Tensor.DType]
        D_TYPE_BF16: _ClassVar[Tensor.DType]
        D_TYPE_I8: _ClassVar[Tensor.DType]
    D_TYPE_F32: Tensor.DType
    D_TYPE_F16: Tensor.DType
    D_TYPE_BF16: Tensor.DType
    D_TYPE_I8: Tensor.DType
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: Tensor.DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[_Union[Tensor.DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Values(_message.Message):
    __slots__ = ("ints", "floats", "strings", "weights", "doubles")
    INTS_FIELD_NUMBER: _ClassVar[int]
    FLOATS_FIELD_NUMBER: _ClassVar[int]
    STRINGS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    DOUBLES_FIELD_NUMBER: _ClassVar[int]
    ints: _containers.RepeatedScalarFieldContainer[int]
    floats: _containers.RepeatedScalarFieldContainer[float]
    strings: _containers.RepeatedScalarFieldContainer[str]
    weights: bytes
    doubles: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, ints: _Optional[_Iterable[int]] = ..., floats: _Optional[_Iterable[float]] = ..., strings: _Optional[_Iterable[str]] = ..., weights: _Optional[bytes] = ..., doubles: _Optional[_Iterable[float]] = ...) -> None: ...

class FloatColumn(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class Column(_message.Message):
    __slots__ = ("floats", "ints", "strings", "doubles", "null_bitmap")
    FLOATS_FIELD_NUMBER: _ClassVar[int]
    INTS_FIELD_NUMBER: _ClassVar[int]
    STRINGS_FIELD_NUMBER: _ClassVar[int]
    DOUBLES_FIELD_NUMBER: _ClassVar[int]
    NULL_BITMAP_FIELD_NUMBER: _ClassVar[int]
    floats: FloatColumn
    ints: IntColumn
    strings: StringColumn
    doubles: DoubleColumn
    null_bitmap: bytes
    def __init__(self, floats: _Optional[_Union[FloatColumn, _Mapping]] = ..., ints: _Optional[_Union[IntColumn, _Mapping]] = ..., strings: _Optional[_Union[StringColumn, _Mapping]] = ..., doubles: _Optional[_Union[DoubleColumn, _Mapping]] = ..., null_bitmap: _Optional[bytes] = ...) -> None: ...

class IntColumn(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, values: _Optional[_Iterable[int]] = ...) -> None: ...

class StringColumn(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, values: _Optional[_Iterable[str]] = ...) -> None: ...

class DoubleColumn(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

"""The client of a cluster; servers are imported from their modules."""

from silvershard.cluster.client import Client, Query, Result
from silvershard.cluster.codec import FieldViolation, RequestRefused
from silvershard.cluster.consistency import UpdateToken
from silvershard.cluster.degrade_policy import DegradeMode, DegradePolicy
from silvershard.cluster.outcome import Coverage, DegradeReason, ShardOutcome
from silvershard.cluster.updates import (
    ApplyResult,
    Durability,
    ItemDelete,
    ItemPatch,
    ItemUpsert,
    TableRows,
    UpdateRejection,
)
from silvershard.model.request import WeightedIds

__all__ = [
    "ApplyResult",
    "Client",
    "Coverage",
    "DegradeMode",
    "DegradePolicy",
    "DegradeReason",
    "Durability",
    "FieldViolation",
    "ItemDelete",
    "ItemPatch",
    "ItemUpsert",
    "Query",
    "RequestRefused",
    "Result",
    "ShardOutcome",
    "TableRows",
    "UpdateRejection",
    "UpdateToken",
    "WeightedIds",
]

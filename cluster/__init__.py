"""The client of a cluster; servers are imported from their modules."""

from silvershard.cluster.client import Client, Query, Result
from silvershard.cluster.codec import FieldViolation, RequestRefused
from silvershard.cluster.outcome import Coverage, DegradeReason, ShardOutcome
from silvershard.model.request import WeightedIds

__all__ = [
    "Client",
    "Coverage",
    "DegradeReason",
    "FieldViolation",
    "Query",
    "RequestRefused",
    "Result",
    "ShardOutcome",
    "WeightedIds",
]

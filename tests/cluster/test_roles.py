import pytest
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from silvershard.cluster import admin_pb2, retrieval_pb2, shard_pb2
from silvershard.cluster.roles import (
    ANYBODY,
    CALLER,
    KNOWN,
    NOBODY,
    PEER,
    ROLES,
    Caller,
    needed,
    needed_within,
)

PUBLIC = ("retrieval", "update")
CHANGES = {
    "Plan",
    "StageSnapshot",
    "VerifySnapshot",
    "WarmSnapshot",
    "Activate",
    "Rollback",
    "SetAlias",
    "CancelOperation",
    "Audit",
    "Scale",
    "Restart",
    "InjectFault",
    "ClearFaults",
}


def methods(descriptor: object) -> list[str]:
    return [
        f"/{service.full_name}/{method.name}"
        for service in descriptor.services_by_name.values()  # type: ignore[attr-defined]
        for method in service.methods
    ]


def test_what_asks_needs_query_and_what_changes_items_update() -> None:
    found = {method: needed(method) for method in methods(retrieval_pb2.DESCRIPTOR)}
    assert found == {
        "/silvershard.v1.Retrieval/Retrieve": "query",
        "/silvershard.v1.Retrieval/RetrieveBatch": "query",
        "/silvershard.v1.Updates/Apply": "update",
        "/silvershard.v1.Updates/StreamUpdates": "update",
    }


def test_admin_calls_that_change_or_start_something_need_admin() -> None:
    for method in methods(admin_pb2.DESCRIPTOR):
        name = method.rpartition("/")[2]
        reads = name.startswith(("Get", "Wait", "List")) or name == "Freshness"
        assert needed(method) == ("view" if reads else "admin"), method
        assert reads != (name in CHANGES)


def test_health_is_for_anybody_and_reflection_for_any_token() -> None:
    assert needed("/grpc.health.v1.Health/Check") == ANYBODY
    assert needed("/grpc.health.v1.Health/Watch") == ANYBODY
    assert needed(f"/{reflection.SERVICE_NAME}/ServerReflectionInfo") == KNOWN
    assert hasattr(health_pb2_grpc, "HealthStub")


@pytest.mark.parametrize("method", ["", "/", "/a.B/C", "Retrieve", "/silvershard.v1.Shard/Execute"])
def test_what_is_not_known_needs_admin(method: str) -> None:
    assert needed(method) == "admin"


def test_within_a_cluster_only_health_is_for_anybody() -> None:
    for method in methods(shard_pb2.DESCRIPTOR):
        assert needed_within(method) == "admin"
    assert needed_within("/grpc.health.v1.Health/Check") == ANYBODY
    assert needed_within("/grpc.health.v1.HealthX/Check") == "admin"


@pytest.mark.parametrize("role", ROLES)
def test_a_role_is_good_for_itself_and_admin_for_all(role: str) -> None:
    caller = Caller("a", frozenset({role}))
    allowed = {need for need in ROLES if caller.may(need)}
    assert allowed == (set(ROLES) if role == "admin" else {role})
    assert caller.may(KNOWN)
    assert caller.may(ANYBODY)


def test_who_is_asked_nothing_is_nobody() -> None:
    assert CALLER.get() == NOBODY
    assert not any(NOBODY.may(role) for role in ROLES)
    assert all(PEER.may(role) for role in ROLES)

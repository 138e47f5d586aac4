import pytest

from silvershard.cluster import retrieval_pb2
from silvershard.cluster.degrade_policy import (
    UNDEMANDING,
    DegradeMode,
    DegradePolicy,
    policy_from,
    policy_to,
)
from silvershard.model.request import RequestError


def test_a_request_that_says_nothing_is_undemanding() -> None:
    assert policy_from(retrieval_pb2.RetrieveRequest().degrade) == UNDEMANDING


@pytest.mark.parametrize("mode", DegradeMode)
def test_a_policy_survives_the_wire(mode: DegradeMode) -> None:
    policy = DegradePolicy(mode, 3, 40, ("liked", "rated"))
    assert policy_from(policy_to(policy)) == policy


def test_a_task_that_is_required_twice_is_required() -> None:
    message = retrieval_pb2.DegradePolicy(required_tasks=["liked", "liked"])
    assert policy_from(message).required_tasks == ("liked",)


def test_an_unknown_mode_is_refused() -> None:
    message = retrieval_pb2.DegradePolicy.FromString(b"\x08\x09")
    with pytest.raises(RequestError, match="unknown mode 9") as raised:
        policy_from(message)
    assert raised.value.field == "degrade.mode"


@pytest.mark.parametrize("name", ["min_nprobe", "min_ann_k"])
def test_what_has_no_form_on_the_wire_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"degrade\.{name}: must be in 0\.\.4294967295, got -1"):
        policy_to(DegradePolicy(**{name: -1}))

from silvershard.deploy.cluster_store import HostReport
from silvershard.deploy.host_agents import HostAgents, actor_name


def said(**incarnations: int) -> dict[str, HostReport]:
    return {
        host: HostReport(host=host, beat=1, incarnation=incarnation)
        for host, incarnation in incarnations.items()
    }


def test_one_host_follows_when_the_agent_of_the_last_one_is_another() -> None:
    restarted: list[str] = []

    agents = HostAgents(["a", "b"], restarted.append, lambda _: True)
    agents.take(said(a=1, b=2))
    assert not agents.is_replacing
    assert restarted == []
    agents.replace()
    assert agents.is_replacing
    for _ in range(3):
        agents.take(said(a=1, b=2))
    assert restarted == ["a"]
    agents.take(said(a=3, b=2))
    agents.take(said(a=3, b=2))
    assert restarted == ["a", "b"]
    assert agents.is_replacing
    agents.take(said(a=3, b=4))
    assert not agents.is_replacing
    assert agents.refused == ""


def test_a_lost_host_is_passed_over_and_one_that_never_spoke_waited_for() -> None:
    lost, restarted = {"a"}, list[str]()
    agents = HostAgents(["a", "b", "c"], restarted.append, lambda host: host not in lost)
    agents.replace()
    for _ in range(3):
        agents.take({})
    assert restarted == ["b"]
    agents.take(said(a=1, b=7))
    agents.take(said(a=1, b=7, c=8))
    assert restarted == ["b", "c"]
    # It is lost while it is waited for.
    lost.add("c")
    assert agents.is_replacing
    agents.take(said(a=1, b=7, c=8))
    assert not agents.is_replacing


def test_a_second_time_begins_with_the_first_host() -> None:
    restarted: list[str] = []
    agents = HostAgents(["a", "b"], restarted.append, lambda _: True)
    agents.replace()
    agents.take(said(a=1))
    agents.replace()
    agents.take(said(a=1))
    assert restarted == ["a", "a"]


def test_the_name_of_the_actor() -> None:
    assert actor_name("h-1") == "host-h-1"

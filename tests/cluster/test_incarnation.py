from typing import Any

import pytest


@pytest.mark.parametrize("table", ["newer", "dead", "elsewhere"])
def test_a_process_in_whose_place_is_another_ends_itself_alone(
    monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    from silvershard.cluster import incarnation

    found = {"State": "ALIVE", "Pid": 7, "Address": {"NodeID": "here"}}
    found |= {
        "newer": {"Pid": 8},
        "dead": {"State": "DEAD"},
        "elsewhere": {"Address": {"NodeID": "there"}},
    }[table]
    answers = iter([ConnectionError("Ray is away"), found])
    ended: list[Any] = []

    def actor_table(actor_id: str) -> Any:
        assert actor_id == "actor"
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(incarnation.ray_state, "actor_table", actor_table)
    monkeypatch.setattr(incarnation.ray, "kill", lambda *_, **__: ended.append("actor"))
    monkeypatch.setattr(incarnation.os, "_exit", ended.append)
    monkeypatch.setattr(incarnation, "_RETRY_S", 1e-3)
    incarnation.Incarnation(None, "actor", "here", 7)._end()
    assert ended == [1]

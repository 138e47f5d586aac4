from pathlib import Path

from silvershard.cluster.staged import await_staged


def test_what_is_there_is_not_waited_for(tmp_path: Path) -> None:
    slept: list[float] = []
    assert await_staged(lambda: str(tmp_path), slept.append) == str(tmp_path)
    assert slept == []


def test_what_is_wanted_by_now_is_waited_for(tmp_path: Path) -> None:
    first, second = tmp_path / "gen-000001", tmp_path / "gen-000002"
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            second.mkdir()

    found = await_staged(lambda: str(second if slept else first), sleep)
    assert (found, len(slept)) == (str(second), 3)

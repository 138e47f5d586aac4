from silvershard.model.stages import Stopwatch, always


def test_the_times_of_a_stage_add_up() -> None:
    watch = Stopwatch()
    watch.mark("ann")
    watch._last -= 5_000_000
    watch.mark("rerank")
    watch._last -= 2_000_000
    watch.mark("ann")
    assert list(watch.times) == ["ann", "rerank"]
    assert watch.times["rerank"] >= 5_000
    assert 2_000 <= watch.times["ann"] < watch.times["rerank"] + 2_000


def test_nothing_keeps_a_stage_from_running_by_itself() -> None:
    always("rerank")

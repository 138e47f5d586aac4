from silvershard.deploy.crash_loop import CrashLoop


def test_quick_deaths_in_a_row_end_the_trying() -> None:
    loop = CrashLoop(limit=5, window_s=60)
    assert [loop.died(1.0) for _ in range(5)] == [False] * 4 + [True]


def test_a_long_life_starts_the_count_anew() -> None:
    loop = CrashLoop(limit=3, window_s=60)
    assert [loop.died(lived_s) for lived_s in (1, 1, 60, 1, 1)] == [
        False,
        False,
        False,
        False,
        True,
    ]


def test_the_pause_doubles_to_five_seconds() -> None:
    loop = CrashLoop(limit=100, window_s=60)
    pauses = []
    for _ in range(8):
        loop.died(0.0)
        pauses.append(loop.backoff_s)
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]

from pathlib import Path

import pytest

from silvershard.cluster.log_reach import reach_log
from silvershard.cluster.update_log import open_log
from silvershard.shard.errors import ConfigError


def test_a_log_that_is_not_there_yet_is_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"sqlite://{tmp_path}/late.db"
    waits: list[float] = []

    def make_it(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            open_log(url).close()

    found = reach_log(url, make_it)
    assert len(waits) == 3
    assert found.end(0) == 0
    found.close()
    assert caplog.text.count("the process waits for its update log") == 1
    with pytest.raises(ConfigError):
        reach_log("ftp://nowhere", make_it)
